"""Modules: Jakiro's draft head, and a drop-in for the sparse blocks of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tranche.bits.packed import STORED_BITS
from tranche.bits.switch import Switchable
from tranche.moe.ops import MAX_EXPERTS, Activation, Variant, draft_moe, fused_experts, route
from tranche.moe.packed import PackedExperts, pack_experts

_PROJECTIONS = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down"}


class JakiroMoE(nn.Module):
    """The mixture of experts of Jakiro's draft layer (arXiv:2502.06282), in place of its MLP.

    Weights are stacked: w_gate and w_up [E, I, H], w_down [E, H, I]. The state dict has the published keys,
    gate.weight and experts.{i}.{gate,up,down}_proj.weight, whose tensors are views of the stacks.

    Args:
        hidden_size: H.
        intermediate_size: I; H when left out, as in the published heads.
        num_experts: E.
        top_k: experts of a token.
        variant: "jakiro" (E = top_k = 2) or "topk"; see `draft_moe`.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: another variant, or numbers of experts that the variant does not have.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        num_experts: int = 2,
        top_k: int = 2,
        variant: Variant = "jakiro",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if variant not in ("jakiro", "topk"):
            raise ValueError(
                f"tranche.JakiroMoE: expected variant 'jakiro' or 'topk', got {variant!r}. Name one of these."
            )
        if variant == "jakiro" and (num_experts, top_k) != (2, 2):
            raise ValueError(
                "tranche.JakiroMoE: expected num_experts == 2 and top_k == 2 for variant 'jakiro', got "
                f"{num_experts} and {top_k}. Other numbers are variant 'topk'."
            )
        if not 1 <= top_k <= num_experts <= MAX_EXPERTS:
            raise ValueError(
                f"tranche.JakiroMoE: expected 1 <= top_k <= num_experts <= {MAX_EXPERTS}, got top_k {top_k} and "
                f"num_experts {num_experts}. A token has experts of its own among these."
            )
        inner = hidden_size if intermediate_size is None else intermediate_size
        self.num_experts, self.top_k, self.variant = num_experts, top_k, variant
        self.gate = nn.Linear(hidden_size, num_experts + 2, bias=False, device=device, dtype=dtype)

        def stack(rows: int, columns: int) -> nn.Parameter:
            values = torch.empty(num_experts, rows, columns, device=device, dtype=dtype)
            return nn.Parameter(nn.init.uniform_(values, -(columns**-0.5), columns**-0.5))

        self.w_gate = stack(inner, hidden_size)
        self.w_up = stack(inner, hidden_size)
        self.w_down = stack(hidden_size, inner)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, contrast: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The block's output and, on demand, its second, contrastive one.

        Args:
            x: [..., H], of the weights' dtype and device.
            residual: [..., H] like x, added to both outputs.
            contrast: also return the second output; it costs no weight bytes.

        Returns:
            [..., H], or with `contrast` two of them. Differentiable in x, residual and the weights.

        Raises:
            ValueError: another size, dtype or device than the weights'; contrast with top_k 1.
        """
        hidden = self.gate.in_features
        if x.dim() == 0 or x.size(-1) != hidden:
            raise ValueError(
                f"tranche.JakiroMoE: expected x.size(-1) == H ({hidden}), got "
                f"{x.size(-1) if x.dim() else 'a scalar'}. It is the head's hidden_size."
            )
        if residual is not None and residual.shape != x.shape:
            raise ValueError(
                f"tranche.JakiroMoE: expected residual of x's shape {list(x.shape)}, got {list(residual.shape)}. "
                "It is what the block adds to."
            )
        flat = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(flat.shape)
        got = draft_moe(
            flat,
            self.gate.weight,
            self.w_gate,
            self.w_up,
            self.w_down,
            top_k=self.top_k,
            contrast=contrast,
            residual=added,
            variant=self.variant,
        )
        return (got[0].view(x.shape), got[1].view(x.shape)) if isinstance(got, tuple) else got.view(x.shape)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for i in range(self.num_experts):
            for projection, name in _PROJECTIONS.items():
                weight = getattr(self, name)[i]
                destination[f"{prefix}experts.{i}.{projection}.weight"] = (
                    weight if keep_vars else weight.detach()
                )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = set()
        for i in range(self.num_experts):
            for projection, name in _PROJECTIONS.items():
                key = f"{prefix}experts.{i}.{projection}.weight"
                known.add(key)
                own = getattr(self, name)[i]
                if key not in state_dict:
                    missing_keys.append(key)
                elif state_dict[key].shape != own.shape:
                    error_msgs.append(
                        f"{key}: expected shape {tuple(own.shape)}, got {tuple(state_dict[key].shape)}."
                    )
                else:
                    with torch.no_grad():
                        own.copy_(state_dict[key])
        if strict:
            for key in state_dict:
                child = key[len(prefix) :].split(".")[0]
                if key.startswith(prefix) and key not in known and child not in self._modules:
                    unexpected_keys.append(key)


def _activation_of(module: nn.Module) -> Activation | None:
    exact_gelu = isinstance(module, nn.GELU) and module.approximate == "none"
    if exact_gelu or type(module).__name__ == "GELUActivation":
        return "gelu"
    if isinstance(module, nn.ReLU):
        return "relu"
    return "silu" if isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation" else None


class BitSwitchExperts(Switchable):
    """The experts of a sparse layer, packed: computed at the precision that `set_bits` or `at_bits` of
    `tranche.bits` say, of one stored integer. Inference only.

    Args:
        w_gate: [E, I, H] or None.
        w_up: [E, I, H].
        w_down: [E, H, I].
        activation: as in `fused_experts`.
        bits: the precision to begin with.

    Raises:
        ValueError: a wrong shape or dtype, or bits that are not 2 to 8.
    """

    def __init__(
        self,
        w_gate: Tensor | None,
        w_up: Tensor,
        w_down: Tensor,
        activation: Activation = "silu",
        *,
        bits: int = STORED_BITS,
    ):
        super().__init__()
        self.activation: Activation = activation
        self.bits = bits
        self._layouts: dict[str, tuple[int, int, int]] = {}
        for name, weight in (("gate", w_gate), ("up", w_up), ("down", w_down)):
            if weight is None:
                continue
            packed = pack_experts(weight.detach())
            self.register_buffer(name, packed.data)
            self.register_buffer(name + "_scale", packed.scale)
            self._layouts[name] = (packed.out_features, packed.in_features, packed.layout)
        self._stay_float32 = tuple(name + "_scale" for name in self._layouts)

    def packed(self, name: str) -> PackedExperts | None:
        """The stack "gate", "up" or "down" as `fused_experts` takes it."""
        if name not in self._layouts:
            return None
        return PackedExperts(getattr(self, name), getattr(self, name + "_scale"), *self._layouts[name])

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """`fused_experts` of x [T, H]."""
        up, down = self.packed("up"), self.packed("down")
        assert up is not None and down is not None
        return fused_experts(
            x,
            self.packed("gate"),
            up,
            down,
            topk_weights,
            topk_ids,
            activation=self.activation,
            bits=self.bits_in_force(),
        )

    def get_extra_state(self) -> dict[str, tuple[int, int, int]]:
        """Shapes and layouts go with the packed data."""
        return self._layouts

    def set_extra_state(self, state: dict[str, tuple[int, int, int]]) -> None:
        """Refuse data of a layout or shape that this module does not have."""
        if state != self._layouts:
            raise ValueError(
                f"tranche.moe.BitSwitchExperts: expected packed experts with {self._layouts}, got {state}. "
                "Pack the experts' weights with this version."
            )

    def extra_repr(self) -> str:
        """Shapes and precision."""
        sizes = {name: layout[:2] for name, layout in self._layouts.items()}
        return f"{sizes}, bits={self.bits}, activation={self.activation}"


class SparseMoE(nn.Module):
    """A drop-in for the sparse block of a Mixtral, Qwen2-MoE or Qwen3-MoE model of transformers (5 or newer).

    It holds the block's own submodules, so parameters and state-dict keys stay as they were, and reads the fused
    gate_up_proj [E, 2I, H] as two views. Logits are fp32 where the block rounds them to the dtype of its input, so
    that a 16-bit block may route a token whose scores nearly tie to another expert. The router's module is not
    called: hooks on it, such as output_router_logits, see nothing.

    Args:
        block: the block to stand for.
        bits: a number from 2 to 8 packs the experts as a `BitSwitchExperts`, whose precision this is to begin with;
            their parameters are left to `block`, and with them their keys.

    Raises:
        ValueError: a block of another shape; `SparseMoE.fits` tells.
    """

    def __init__(self, block: nn.Module, bits: int | None = None):
        super().__init__()
        if not self.fits(block):
            raise ValueError(
                f"tranche.SparseMoE: expected a Mixtral-, Qwen2-MoE- or Qwen3-MoE-shaped block, got "
                f"{type(block).__name__}. Call fused_experts with its weights."
            )
        self.gate: nn.Module = block.gate  # type: ignore[assignment]
        self.experts: nn.Module = block.experts  # type: ignore[assignment]
        self.top_k = int(self.gate.top_k)  # type: ignore[arg-type]
        # Mixtral's router has no such switch: it always divides
        self.renormalize = bool(getattr(self.gate, "norm_topk_prob", True))
        activation = _activation_of(self.experts.act_fn)  # type: ignore[arg-type]
        assert activation is not None
        self.activation: Activation = activation
        if bits is not None:
            self.experts = BitSwitchExperts(*self._matrices(), activation, bits=bits)
        self.jitter_noise = float(getattr(block, "jitter_noise", 0.0) or 0.0)
        self.has_shared_expert = hasattr(block, "shared_expert")
        if self.has_shared_expert:
            self.shared_expert: nn.Module = block.shared_expert  # type: ignore[assignment]
            self.shared_expert_gate: nn.Module = block.shared_expert_gate  # type: ignore[assignment]

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether `block` is one that this class can stand for."""
        if type(block).__name__ not in (
            "MixtralSparseMoeBlock",
            "Qwen2MoeSparseMoeBlock",
            "Qwen3MoeSparseMoeBlock",
        ):
            return False
        experts = getattr(block, "experts", None)
        has_weights = isinstance(getattr(experts, "gate_up_proj", None), Tensor)
        return has_weights and _activation_of(experts.act_fn) is not None  # type: ignore[union-attr]

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        experts: Any = self.experts
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        return gate, up, experts.down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The block's output for hidden_states [..., H]."""
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            hidden_states = hidden_states * noise
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, ids = route(x, self.gate.weight, self.top_k, renormalize=self.renormalize)  # type: ignore[arg-type]
        if isinstance(self.experts, BitSwitchExperts):
            out = self.experts(x, weights, ids)
        else:
            out = fused_experts(x, *self._matrices(), weights, ids, activation=self.activation)
        if self.has_shared_expert:
            out = out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return out.view(hidden_states.shape)


def convert_moe(model: nn.Module, bits: int | None = None) -> int:
    """Put a `SparseMoE` in the place of every sparse block in `model` that it fits.

    Args:
        model: changed in place; parameters are kept, not copied.
        bits: 2 to 8 packs the experts, which then compute at the precision that `bits.set_bits(model, ...)` and
            `bits.at_bits` say, this one to begin with.

    Returns:
        How many blocks were replaced.
    """
    blocks = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if SparseMoE.fits(child)
    ]
    for parent, name, child in blocks:
        replacement = SparseMoE(child, bits)
        replacement.train(child.training)
        setattr(parent, name, replacement)
    return len(blocks)
