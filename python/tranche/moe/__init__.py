"""Mixtures of experts for few tokens: routing, the experts in one pass over their weights, and Jakiro's draft head."""

from tranche.moe.modules import BitSwitchExperts, JakiroMoE, SparseMoE, convert_moe
from tranche.moe.ops import RoutingPlan, draft_moe, draft_moe_star, fused_experts, route
from tranche.moe.packed import PackedExperts, pack_experts

__all__ = [
    "BitSwitchExperts",
    "JakiroMoE",
    "PackedExperts",
    "RoutingPlan",
    "SparseMoE",
    "convert_moe",
    "draft_moe",
    "draft_moe_star",
    "fused_experts",
    "pack_experts",
    "route",
]
