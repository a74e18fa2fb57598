"""Where a pipeline's weights lie, what of them is worked out beforehand, and which kernels compute with them."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..models.attention import fuse_qkv_projections, set_attention_backend, unfuse_qkv_projections
from ..models.one_step_sd3 import OneStepSD3Transformer2DModel


class TSDSRPlacementMixin:
    """Speed and memory beyond what `DiffusionPipeline` has."""

    denoiser: Any
    vae: Any
    transformer: Any

    def bake(self, text_stream: str = "full", dtype: torch.dtype | None = None) -> None:
        """Work out everything that does not depend on the picture: a third of SD3-medium's parameters.

        LoRAs are added to the weights for good, at their present strengths; the transformer becomes a
        `OneStepSD3Transformer2DModel` for the pipeline's prompt and timestep, and the prompt goes. Results stay the
        same but for rounding.

        Args:
            text_stream: "full", or "none" for a transformer that was trained without the prompt's tokens.
            dtype: of the transformer; None for the present one.

        Raises:
            ValueError: for a pipeline with a UNet, without a prompt, or baked before, and for weights that are
                quantized, stored in 8 bits, or offloaded.
        """
        prompt = self.prompt_embeddings  # type: ignore[attr-defined]
        if self.transformer is None or self.is_baked:  # type: ignore[attr-defined]
            what = "is baked already" if self.transformer is not None else "has no transformer (UNets cannot be baked)"
            raise ValueError(f"This pipeline {what}; bake one with SD3's transformer.")
        if prompt is None:
            raise ValueError("This pipeline holds no `prompt_embeddings`, so there is no prompt to bake it for.")
        if any(weight.is_meta or weight.itemsize == 1 for weight in self.transformer.parameters()):
            raise ValueError("The transformer's weights are offloaded or stored in 8 bits; bake it before that.")
        if any(self.get_list_adapters().values()):  # type: ignore[attr-defined]
            self.fuse_lora()  # type: ignore[attr-defined]
            self.unload_lora_weights()  # type: ignore[attr-defined]
        transformer = OneStepSD3Transformer2DModel.from_sd3(
            self.transformer,
            prompt,
            self.config.timestep,  # type: ignore[attr-defined]
            text_stream,
            dtype,
        )
        self.register_modules(transformer=transformer, prompt_embeddings=None)  # type: ignore[attr-defined]
        self._optional_components = [*self._optional_components, "prompt_embeddings"]  # type: ignore[has-type]

    def set_attention_backend(self, backend: str) -> None:
        """Compute the denoiser's attention with another of diffusers' backends: "native", "flex", "flash", "sage", ...

        The VAE's one wide head stays with torch's own, as most kernels cannot take it; `vae.set_attention_backend`
        moves it.

        Raises:
            ValueError: for a backend that does not exist or whose package is missing.
        """
        set_attention_backend(self.denoiser, backend)

    def fuse_qkv_projections(self) -> None:
        """Compute query, key and value with one matrix product in the denoiser and the VAE.

        LoRAs must have been added for good (`fuse_lora()`, `unload_lora_weights()`).

        Raises:
            ValueError: for projections with LoRAs beside them, quantized, cast or offloaded ones.
        """
        for network in (self.denoiser, self.vae):
            fuse_qkv_projections(network)

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        for network in (self.denoiser, self.vae):
            unfuse_qkv_projections(network)

    def enable_group_offload(self, *args: Any, offload_to_disk_path: str | None = None, **kwargs: Any) -> None:
        """As in diffusers; on disk, every call gets a folder of its own in `offload_to_disk_path`.

        diffusers names the files by layers alone and never overwrites them, so that a folder used before would give
        another model's weights.
        """
        if offload_to_disk_path is not None:
            Path(offload_to_disk_path).mkdir(parents=True, exist_ok=True)
            offload_to_disk_path = tempfile.mkdtemp(dir=offload_to_disk_path)
        super().enable_group_offload(  # type: ignore[misc]
            *args, offload_to_disk_path=offload_to_disk_path, **kwargs
        )
        self._offloads_to_disk = offload_to_disk_path is not None
