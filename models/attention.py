"""Attention through diffusers' dispatcher, so that its backends (flash, sage, flex, ...) serve these networks too.

diffusers' own processors of SD3, SD2's UNet and the VAE call `scaled_dot_product_attention` directly and leave
`set_attention_backend` without effect.
"""

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from torch import Tensor, nn

# The kernels beside torch's own take heads of up to 256 numbers. The one head of a VAE has 512.
WIDEST_HEAD = 256


class Dispatched:
    """What `ModelMixin.set_attention_backend` and `enable_parallelism` set, and the attention that heeds it."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, fused: bool = False):
        self.fused = fused

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(d) + mask) v of (B, tokens, heads, d) as (B, tokens, heads * d)."""
        backend = self._attention_backend
        if backend is None and query.shape[-1] > WIDEST_HEAD:
            backend = AttentionBackendName.NATIVE
        result = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=backend, parallel_config=self._parallel_config
        )
        return result.flatten(2)


def _normed(heads: Tensor, norm: nn.Module | None) -> Tensor:
    return heads if norm is None else norm(heads)


class JointAttention(Dispatched):
    """Attention over the tokens of picture and prompt together (SD3, arXiv 2403.03206, figure 2).

    The second attention of SD3.5's blocks, over the picture alone, is the case without `encoder_hidden_states`.

    Args:
        fused: use the one projection for query, key and value that `fuse_qkv_projections` made.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, tokens, width) of the picture and the prompt to the same; (picture, prompt) where both are given."""

        def split(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (attn.heads, -1))

        if self.fused:
            query, key, value = (split(part) for part in attn.to_qkv(hidden_states).chunk(3, dim=-1))
        else:
            query, key, value = (split(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = _normed(query, attn.norm_q), _normed(key, attn.norm_k)
        if encoder_hidden_states is None:
            return _output(attn, self.attend(query, key, value))

        if self.fused:
            added = [split(part) for part in attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)]
        else:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            added = [split(layer(encoder_hidden_states)) for layer in layers]
        added[:2] = _normed(added[0], attn.norm_added_q), _normed(added[1], attn.norm_added_k)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), added, strict=True))
        picture, prompt = self.attend(query, key, value).tensor_split([hidden_states.shape[1]], dim=1)
        # The last block's prompt goes nowhere.
        return _output(attn, picture), prompt if attn.context_pre_only else attn.to_add_out(prompt)


class SelfOrCrossAttention(Dispatched):
    """Attention of the UNet and the VAE: over a picture's own tokens, or of them over the prompt's.

    Args:
        fused: use the one projection for query (without a prompt), key and value that `fuse_qkv_projections` made.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, tokens, width) or (B, width, H, W) to the same shape.

        `attention_mask` is added to the scores: (B, 1, keys) or (B, tokens, keys).
        """
        if hasattr(hidden_states, "attention"):
            # Not a tensor but a map that is worked on strip by strip (pipelines/strips.py).
            return hidden_states.attention(self, attn)
        tokens = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if hidden_states.ndim == 4:
            tokens = tokens.flatten(2).mT
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.mT).mT
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)

        if self.fused and encoder_hidden_states is None:
            projected = attn.to_qkv(tokens).chunk(3, dim=-1)
        elif self.fused:
            projected = attn.to_q(tokens), *attn.to_kv(context).chunk(2, dim=-1)
        else:
            projected = attn.to_q(tokens), attn.to_k(context), attn.to_v(context)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in projected)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], key.shape[0], out_dim=4)
        attended = self.attend(_normed(query, attn.norm_q), _normed(key, attn.norm_k), value, attention_mask)

        result = _output(attn, attended)
        if hidden_states.ndim == 4:
            result = result.mT.unflatten(-1, hidden_states.shape[-2:])
        if attn.residual_connection:
            result = result + hidden_states
        return result / attn.rescale_output_factor


def _output(attn: Attention, attended: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(attended))


_REPLACES = {
    JointAttnProcessor2_0: (JointAttention, False),
    FusedJointAttnProcessor2_0: (JointAttention, True),
    AttnProcessor2_0: (SelfOrCrossAttention, False),
    FusedAttnProcessor2_0: (SelfOrCrossAttention, True),
}


def _attentions(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def use_dispatcher(model: nn.Module) -> None:
    """Replace diffusers' attention processors by those of this module, which compute the same.

    Weights stay as they are, and so do processors of other kinds (sliced, IP adapters, ...).
    """
    for attn in _attentions(model):
        if type(attn.processor) in _REPLACES:
            kind, fused = _REPLACES[type(attn.processor)]
            attn.set_processor(kind(fused))


def set_attention_backend(model: nn.Module, backend: str) -> None:
    """`ModelMixin.set_attention_backend` for this model alone; diffusers' own also makes it the default of all others.

    Raises:
        ValueError: for a backend that does not exist, or that this installation lacks.
    """
    names = [name.value for name in AttentionBackendName]
    if backend not in names:
        raise ValueError(f"`backend` must be one of {', '.join(names)}, not {backend!r}.")
    use_dispatcher(model)
    try:
        with attention_backend("native"):  # restores the default when it ends
            model.set_attention_backend(backend)
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).replace(". Please", "; please")
        raise ValueError(f"The attention backend {backend!r} cannot be used here: {reason}") from error


def _is_fused(attn: Attention) -> bool:
    return isinstance(attn.processor, FusedJointAttnProcessor2_0 | FusedAttnProcessor2_0) or (
        isinstance(attn.processor, Dispatched) and attn.processor.fused
    )


def _projections(attn: Attention) -> list[nn.Module]:
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    return [layer for name in names if (layer := getattr(attn, name, None)) is not None]


def fuse_qkv_projections(model: nn.Module) -> None:
    """Compute query, key and value with one matrix product, from a copy of their weights.

    A model without attention stays as it is.

    Raises:
        ValueError: for projections that are more than their weights: with LoRAs beside them, quantized, stored in fewer
            bits than they compute in, or offloaded.
    """
    attentions = _attentions(model)
    for layer in (layer for attn in attentions for layer in _projections(attn)):
        plain = type(layer) is nn.Linear and type(layer.weight.data) is Tensor
        if not plain or hasattr(layer, "_diffusers_hook") or hasattr(layer, "_hf_hook"):
            raise ValueError(
                "Query, key and value can be fused only where they are plain weights: fuse them before quantizing,"
                " casting or offloading the model, and add its LoRAs for good first (`fuse_lora()`, then"
                " `unload_lora_weights()`)."
            )
    if attentions and not any(map(_is_fused, attentions)):
        model.fuse_qkv_projections()
    use_dispatcher(model)


def unfuse_qkv_projections(model: nn.Module) -> None:
    """Undo `fuse_qkv_projections` and drop the copies, which would be saved with the model."""
    attentions = _attentions(model)
    if any(map(_is_fused, attentions)):
        model.unfuse_qkv_projections()
    for attn in attentions:
        attn.fused_projections = False
        for name in ("to_qkv", "to_kv", "to_added_qkv"):
            if hasattr(attn, name):
                delattr(attn, name)


def check_fused_projections(model: nn.Module) -> None:
    """Raises a `ValueError` where LoRAs lie on query, key or value projections that are fused and so not called."""
    for attn in _attentions(model):
        if _is_fused(attn) and any(hasattr(layer, "base_layer") for layer in _projections(attn)):
            raise ValueError(
                "The LoRA has no effect on fused query, key and value projections; call `unfuse_qkv_projections()`"
                " first, or load and fuse the LoRA before them."
            )


def check_not_fused(model: nn.Module) -> None:
    """Raises a `ValueError` where a LoRA would come too late for projections that are fused."""
    if any(map(_is_fused, _attentions(model))):
        raise ValueError(
            "Query, key and value are fused, and a LoRA loaded now would not reach them; call"
            " `unfuse_qkv_projections()` first."
        )
