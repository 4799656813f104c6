"""`JakiroHead`: one decoder layer with decoupled experts that drafts from a target's features (arXiv 2502.06282)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tranche.moe import JakiroMoE

Mlp = Literal["moe", "plain"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class PlainMLP(nn.Module):
    """The gated MLP of a Llama layer, to compare the experts with; it has no second output."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + down(silu(gate(x)) * up(x)), all [..., H]."""
        return residual + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Attention(nn.Module):
    """The four projections under their published names."""

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)


class _Layer(nn.Module):
    """A Llama layer without a norm before its attention, as the published heads are."""

    def __init__(self, config: LlamaConfig, mlp: Mlp, intermediate_size: int):
        super().__init__()
        hidden = config.hidden_size
        self.self_attn = _Attention(hidden, *_heads(config))
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        if mlp == "moe":
            self.mlp_moe = JakiroMoE(hidden, intermediate_size)
        else:
            self.mlp = PlainMLP(hidden, intermediate_size)


def _heads(config: LlamaConfig) -> tuple[int, int, int]:
    """Query heads, heads of keys and values, and their size."""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads or heads, config.head_dim or config.hidden_size // heads


class JakiroHead(nn.Module):
    """Predicts a target's next feature, and by contrast of its experts the one after that, from one pass.

    With e(x) the target's embedding of a token and f_t its last hidden state at position t,

        z_t = fc([e(x_{t+1}); f_t]),    h_t = z_t + attention(z_<=t),    n_t = RMSNorm(h_t)
        f'_{t+1} = h_t + a0 E_0(n_t) + a1 E_1(n_t)              the autoregressive output
        f'_{t+2} = h_t + s (b0 E_0(n_t) - b1 E_1(n_t))          the contrastive one (`tranche.moe.draft_moe`)

    and the target's output embeddings make logits of either. Jakiro, arXiv 2502.06282.

    The state dict has the published keys: embed_tokens.weight, fc.weight, fc.bias, layers.0.self_attn.{q,k,v,o}_proj.
    weight, layers.0.post_attention_layernorm.weight, layers.0.mlp_moe.gate.weight and
    layers.0.mlp_moe.experts.{i}.{gate,up,down}_proj.weight.

    Attributes:
        config: a LlamaConfig of one layer: sizes, heads and rotary embedding.
        contrastive: whether there is the second output.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        mlp: Mlp = "moe",
        intermediate_size: int | None = None,
        bias: bool = True,
        embedding: Tensor | None = None,
    ):
        """A head with fresh weights, fp32.

        Args:
            config: a LlamaConfig; its layers and intermediate_size are not looked at.
            mlp: "moe", or "plain": a gated MLP without the second output.
            intermediate_size: of each expert, or of the plain MLP. When left out, hidden_size for experts, and for
                the plain MLP what gives it as many parameters as the experts and their router have.
            bias: whether fc has one.
            embedding: the target's embeddings [V, H], shared and not trained; zeros when left out.

        Raises:
            ValueError: an unknown mlp.
        """
        super().__init__()
        if mlp not in ("moe", "plain"):
            raise ValueError(
                f"tranche.JakiroHead: expected mlp 'moe' or 'plain', got {mlp!r}. Name one of these."
            )
        hidden = config.hidden_size
        if intermediate_size is None:
            # two experts of hidden_size rows, and a router of four rows, of hidden_size numbers each
            intermediate_size = hidden if mlp == "moe" else round((6 * hidden + 4) / 3)
        self.config, self.contrastive = config, mlp == "moe"
        if embedding is None:
            embedding = torch.zeros(config.vocab_size, hidden)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding.detach(), freeze=True)
        self.fc = nn.Linear(2 * hidden, hidden, bias=bias)
        self.layers = nn.ModuleList([_Layer(config, mlp, intermediate_size)])
        # by device, and no submodules: their frequencies stay fp32 whatever the weights become
        self._rotaries: dict[torch.device, LlamaRotaryEmbedding] = {}

    @classmethod
    def for_model(cls, model: PreTrainedModel, *, mlp: Mlp = "moe", seed: int = 0) -> JakiroHead:
        """An untrained head of a target's sizes on its device, fp32; the target's embeddings are shared.

        Args:
            model: the target.
            mlp: "moe" or "plain".
            seed: of the weights.
        """
        theirs = model.config.get_text_config()
        config = LlamaConfig(
            vocab_size=theirs.vocab_size,
            hidden_size=theirs.hidden_size,
            intermediate_size=theirs.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=theirs.num_attention_heads,
            num_key_value_heads=theirs.num_key_value_heads,
            head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
            max_position_embeddings=theirs.max_position_embeddings,
            rms_norm_eps=theirs.rms_norm_eps,
            rope_parameters=theirs.rope_parameters,
            bos_token_id=None,
            eos_token_id=None,
        )
        embedding = model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(config, mlp=mlp, embedding=embedding)
        return head.to(embedding.device)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Refuse a target whose features or tokens are not those that the head reads.

        Raises:
            ValueError: a head of another hidden size, vocabulary or device.
        """
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        ours = self.embed_tokens.weight
        if ours.shape != weight.shape:
            raise ValueError(
                f"tranche.JakiroHead: expected a head for a target of {weight.size(0)} tokens and hidden size "
                f"{weight.size(1)}, got one for {ours.size(0)} and {ours.size(1)}. Train one with train_head, or load "
                "the head that was trained for this target."
            )
        if ours.device != weight.device:
            raise ValueError(
                f"tranche.JakiroHead: expected a head on the target's device ({weight.device}), got one on "
                f"{ours.device}. Move it with head.to(...)."
            )

    # ---- the layer ----------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.fc.weight.dtype

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads and size of a position's keys, and of its values."""
        return _heads(self.config)[1:]

    @property
    def _layer(self) -> _Layer:
        layer = self.layers[0]
        assert isinstance(layer, _Layer)
        return layer

    def fuse(self, tokens: Tensor, features: Tensor) -> Tensor:
        """The layer's input z [B, T, H] from tokens int64 [B, T] and the features [B, T, H] before them."""
        embedded = self.embed_tokens(tokens).to(self.dtype)
        return self.fc(torch.cat([embedded, features.to(self.dtype)], dim=-1))

    def attention(self, z: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """h = z + attention(z).

        Args:
            z: [B, T, H], from `fuse`.
            positions: int64 [B, T].
            attend: takes the rotated q [B, T, Hq, D] and k, and v [B, T, Hkv, D]; returns [B, T, Hq, D].
        """
        layer = self._layer.self_attn
        heads = (*z.shape[:2], -1, _heads(self.config)[2])
        q, k, v = (proj(z).view(heads) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        if z.device not in self._rotaries:
            self._rotaries[z.device] = LlamaRotaryEmbedding(self.config).to(z.device)
        cos, sin = (table[:, :, None] for table in self._rotaries[z.device](z, positions))
        out = attend(_rotated(q, cos, sin), _rotated(k, cos, sin), v)
        return z + layer.o_proj(out.flatten(2))

    def outputs(self, h: Tensor, contrast: bool) -> tuple[Tensor, Tensor | None]:
        """Both features [..., H] that follow from h; the second only if there is one and it is asked for."""
        layer = self._layer
        h = h.to(self.dtype)  # under autocast too: the experts' kernel takes one dtype
        normed = layer.post_attention_layernorm(h).to(self.dtype)
        if not self.contrastive:
            return layer.mlp(normed, h), None
        got = layer.mlp_moe(normed, h, contrast)
        return got if contrast else (got, None)

    def forward(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """All positions of a text at once, as training wants it.

        Args:
            tokens: int64 [B, T], x_1 to x_T.
            features: [B, T, H], f_0 to f_{T-1}.

        Returns:
            [B, T, H], what f_1 to f_T should be; and what f_2 to f_{T+1} should be, or None from a plain head.
        """
        positions = torch.arange(tokens.size(1), device=tokens.device).expand(tokens.shape)
        return self.outputs(self.attention(self.fuse(tokens, features), positions, _causal), contrast=True)

    # ---- files --------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write a directory as the published heads are: config.json, and the weights as safetensors."""
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        described: dict[str, Any] = self.config.to_dict()
        if self.contrastive:
            described |= {"num_local_experts": 2, "num_experts_per_tok": 2}
        (path / _CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        state = {key: value.detach().cpu().contiguous().clone() for key, value in self.state_dict().items()}
        save_file(state, path / _WEIGHTS[0])

    @classmethod
    def load(cls, path: Path | str) -> JakiroHead:
        """Read a directory that `save` wrote, or a published head: config.json, and safetensors or pytorch_model.bin.

        Sizes are the weights' own. On the CPU, in the dtype of the weights.

        Raises:
            FileNotFoundError: no such files.
            ValueError: weights that are no Jakiro head's.
        """
        path = Path(path)
        config = LlamaConfig.from_pretrained(path) if (path / _CONFIG).is_file() else None
        weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
        if config is None or weights is None:
            raise FileNotFoundError(
                f"tranche.JakiroHead.load: expected {_CONFIG} and one of {', '.join(_WEIGHTS)} under {path}, got none. "
                "Give the directory that JakiroHead.save wrote."
            )
        if weights.suffix == ".bin":
            state = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file

            state = load_file(weights)
        # older checkpoints carry the table of frequencies, which config.json determines
        state = {key: value for key, value in state.items() if not key.endswith("rotary_emb.inv_freq")}
        layer = "layers.0.mlp_moe.experts.0.up_proj.weight"
        mlp: Mlp = "moe" if layer in state else "plain"
        up = state.get(layer if mlp == "moe" else "layers.0.mlp.up_proj.weight")
        if up is None or "embed_tokens.weight" not in state or "fc.weight" not in state:
            raise ValueError(
                f"tranche.JakiroHead.load: expected the keys embed_tokens.weight, fc.weight and {layer}, got "
                f"{', '.join(sorted(state)[:4])} and so on. This is no Jakiro head."
            )
        with torch.device("meta"):
            head = cls(config, mlp=mlp, intermediate_size=up.size(0), bias="fc.bias" in state)
        head = head.to(state["fc.weight"].dtype).to_empty(device="cpu")
        head.load_state_dict(state)
        return head


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves, as transformers' models have it (arXiv 2104.09864)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ordinary causal attention of [B, T, heads, D]."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2)
