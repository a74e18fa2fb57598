"""A mask on SD3's transformer: soft or hard in training, for good in the pruned one (TinySR, arXiv 2508.17434).

    x_{i+1} = m_i * phi_i(x_i) + (1 - m_i) * x_i        x: the picture's tokens, and the prompt's
    min over p of min over dPhi of E[ L(x, Phi + dPhi, m) ],  m ~ p

phi_i are the blocks, Phi their frozen weights, dPhi a LoRA that learns along with the mask's distribution p, so that
a choice is judged by how well the rest can make up for it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn

from ...models import lora_targets
from ..base import lora_config
from ..config import ConfigError
from ..export import merged
from ..families import Family, Prompt
from ..networks import STUDENT, SharedBase
from .masks import MaskDistribution, kept_layers

_BLOCKS = "transformer_blocks."


class BlockMask:
    """What mixes the output of each block of a transformer with its input.

    Every block is run, also where its mask is 0, because the gradient of the mask asks for its output. In the last
    block SD3 drops the prompt's tokens, so there only the picture's are mixed.

    Args:
        transformer: gets a forward hook on each block; names of weights stay.

    Attributes:
        mask: (depth,), or (B, depth) with one for each of B pictures; None leaves the transformer as it is.

    Raises:
        ConfigError: for another network than SD3's.
    """

    def __init__(self, transformer: Any):
        _check_kind(transformer)
        self.mask: Tensor | None = None
        self._depth = len(transformer.transformer_blocks)
        self._hooks = [
            block.register_forward_hook(partial(self._mix, index), with_kwargs=True)
            for index, block in enumerate(transformer.transformer_blocks)
        ]

    @contextmanager
    def __call__(self, mask: Tensor | None) -> Iterator[None]:
        """The mask holds until the end of the block; then the one before.

        A backward pass that recomputes (gradient checkpointing) belongs into the block of its forward pass.

        Raises:
            ConfigError: for a mask of another depth.
        """
        if mask is not None and mask.shape[-1] != self._depth:
            raise ConfigError(f"The mask is for {mask.shape[-1]} blocks, but the transformer has {self._depth}.")
        before, self.mask = self.mask, mask
        try:
            yield
        finally:
            self.mask = before

    def remove(self) -> None:
        """Take the hooks off the transformer."""
        for hook in self._hooks:
            hook.remove()

    def _mix(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.mask is None:
            return output
        # Gradient checkpointing hands arguments over by their order.
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        share = self.mask[..., index].reshape(-1, 1, 1)

        def mix(new: Tensor | None, old: Tensor) -> Tensor | None:
            return None if new is None else new * share.to(new) + old * (1 - share).to(new)

        prompt, picture = output
        return mix(prompt, given["encoder_hidden_states"]), mix(picture, given["hidden_states"])


@contextmanager
def masked(transformer: SD3Transformer2DModel, mask: Tensor) -> Iterator[SD3Transformer2DModel]:
    """The transformer under a mask (depth,) or (B, depth), values 0..1, until the end of the block.

    With a mask of 0 and 1 it computes what `prune` makes of it.

    Raises:
        ConfigError: for another network than SD3's, or a mask of another depth.
    """
    blocks = BlockMask(transformer)
    try:
        with blocks(mask):
            yield transformer
    finally:
        blocks.remove()


def pruned_config(config: Mapping[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
    """The config of an SD3 transformer of which some blocks stay, which are numbered anew from 0.

    Args:
        config: of `SD3Transformer2DModel`.
        kept: rising numbers of the blocks that stay.
    """
    dual = set(config.get("dual_attention_layers") or ())
    renumbered = tuple(new for new, old in enumerate(kept) if old in dual)
    return {**config, "num_layers": len(kept), "dual_attention_layers": renumbered}


def pruned_weights(state: Mapping[str, Tensor], depth: int, kept: tuple[int, ...]) -> dict[str, Tensor]:
    """The weights that go with `pruned_config`, copied.

    SD3's last block reads the prompt but does not renew it. So a block that becomes the last loses what renewed it
    (`attn.to_add_out`, `ff_context`), and of its modulation of the prompt only scale and shift of the attention stay,
    in the order that `AdaLayerNormContinuous` has them.

    Args:
        state: of `SD3Transformer2DModel`, without adapters.
        depth: number of its blocks.
        kept: rising numbers of the blocks that stay.
    """
    numbers = {old: new for new, old in enumerate(kept)}
    found = {}
    for name, tensor in state.items():
        if not name.startswith(_BLOCKS):
            found[name] = tensor.detach().clone()
            continue
        number, rest = name.removeprefix(_BLOCKS).split(".", 1)
        old = int(number)
        if old not in numbers:
            continue
        if old == kept[-1] != depth - 1:
            if rest.startswith(("attn.to_add_out.", "ff_context.")):
                continue
            if rest.startswith("norm1_context.linear."):  # shift, scale, gate of the attention; of the feed-forward
                shift, scale, *_ = tensor.chunk(6)
                tensor = torch.cat([scale, shift])
        found[f"{_BLOCKS}{numbers[old]}.{rest}"] = tensor.detach().clone()
    return found


def prune(transformer: SD3Transformer2DModel, mask: Tensor) -> SD3Transformer2DModel:
    """The transformer without the blocks whose mask is 0: a copy, of its type and on its device.

    Args:
        transformer: without adapters.
        mask: (depth,) of 0 and 1.

    Raises:
        ConfigError: for another network than SD3's, for one with LoRAs beside its weights, and for a mask that does not
            decide or is of another depth.
    """
    _check_kind(transformer)
    _check_plain(transformer)
    return _pruned(transformer, transformer.state_dict(), mask)


class DepthSearch(nn.Module):
    """The search for the blocks that stay: a transformer, a distribution over masks, and a LoRA that learns with it.

    It has the face that `Optimisation` knows of `Networks`. As there, the teacher is the transformer itself, with mask
    and LoRA off. What has a backward pass is called through what DDP put around it.

    Args:
        family: of the transformer; it knows the one step.
        transformer: the one-step model, LoRAs added to its weights. It is frozen.
        masks: for as many blocks.
        rank: of the LoRA (published: 64, alpha = rank, Gaussian A); 0 trains the gates alone.
        targets: layers that the LoRA is on; by default those of TSD-SR's student, which are TinySR's.

    Raises:
        ConfigError: for another network than SD3's, for one with LoRAs beside its weights, and for masks of another
            depth.
    """

    def __init__(
        self,
        family: Family,
        transformer: SD3Transformer2DModel,
        masks: MaskDistribution,
        rank: int = 64,
        targets: tuple[str, ...] = lora_targets.STUDENT,
    ):
        super().__init__()
        _check_kind(transformer)
        _check_plain(transformer)
        if masks.depth != len(transformer.transformer_blocks):
            raise ConfigError(
                f"The groups hold {masks.depth} blocks, but the transformer has {len(transformer.transformer_blocks)}."
            )
        self.family, self.masks = family, masks
        self.shared = SharedBase(transformer, {STUDENT: lora_config(rank, targets)} if rank else {})
        self.network = transformer
        self._mask = BlockMask(transformer)
        cast_training_params([self], dtype=torch.float32)

    @contextmanager
    def role(self, role: str, mask: Tensor | None = None) -> Iterator[Any]:
        """The transformer in one role, until the end of the block; then in the one before, with its mask.

        A backward pass with gradient checkpointing belongs into the block of its forward pass.

        Args:
            role: the student, with the LoRA; or the teacher, without.
            mask: (depth,) or (B, depth) for the student; None runs all blocks.

        Raises:
            ConfigError: for a mask of another depth.
        """
        with self._mask(mask), self.shared.role(role) as network:
            yield network

    def forward(self, latents: Tensor, prompt: Prompt) -> Tensor:
        """z^ = z_L - v(z_L), the one step of the transformer in the role that it has: (B, C, h, w), float32.

        Args:
            latents: z_L, encoded pictures (B, C, h, w).
            prompt: what the transformer is conditioned on.
        """
        return self.family.one_step(self.network, latents, prompt)

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """What is trained in a role: of the student, LoRA and gates (at one rate, as published); else nothing."""
        return self.shared.parameters(role) + list(self.masks.parameters()) if role == STUDENT else []

    def trained(self) -> dict[str, Tensor]:
        """What a search changes, by name: LoRA, and gates of groups and of pairs."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def stepped(self, role: str) -> None:
        """A role's weights have moved; nothing depends on them."""

    def pruned(self, mask: Tensor, with_lora: bool = False) -> SD3Transformer2DModel:
        """The transformer without the blocks whose mask is 0, on its own: frozen weights are copied.

        Args:
            mask: (depth,) of 0 and 1, as `masks.final` gives it.
            with_lora: add the LoRA of the search to the weights. Published is without: it helped to decide, and
                restoration begins at the teacher's weights.

        Raises:
            ConfigError: for a mask that does not decide or is of another depth.
        """
        if with_lora and STUDENT in self.shared.names:
            plain = merged(self.shared, self.network.dtype)
            return _pruned(plain, plain.state_dict(), mask).to(self.network.device)
        state = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in self.network.state_dict().items()
            if ".lora_" not in name
        }
        return _pruned(self.network, state, mask)


def _check_kind(transformer: Any) -> None:
    if not isinstance(transformer, SD3Transformer2DModel):
        raise ConfigError(f"Only SD3's transformers can be pruned in depth, not a {type(transformer).__name__}.")


def _check_plain(transformer: Any) -> None:
    if getattr(transformer, "peft_config", None):
        raise ConfigError(
            "LoRAs lie beside the transformer's weights: add them first (`fuse_lora`, then `unload_lora_weights`)."
        )


def _pruned(transformer: SD3Transformer2DModel, state: Mapping[str, Tensor], mask: Tensor) -> SD3Transformer2DModel:
    depth, kept = len(transformer.transformer_blocks), kept_layers(mask)
    if len(mask) != depth:
        raise ConfigError(f"The mask is for {len(mask)} blocks, but the transformer has {depth}.")
    with init_empty_weights(include_buffers=False):
        model = SD3Transformer2DModel.from_config(pruned_config(transformer.config, kept))
    model.load_state_dict(pruned_weights(state, depth, kept), assign=True)
    return model.train(transformer.training)
