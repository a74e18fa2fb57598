"""Where a pipeline's weights lie and which kernels compute with them."""

import tempfile
from pathlib import Path
from typing import Any

from ..models.attention import fuse_qkv_projections, set_attention_backend, unfuse_qkv_projections


class TSDSRPlacementMixin:
    """Speed and memory beyond what `DiffusionPipeline` has."""

    denoiser: Any
    vae: Any

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
