"""LoRA weights of a one-step model: the denoiser's and the VAE encoder's in one file."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from torch import Tensor, nn


class TSDSRLoraLoaderMixin(SD3LoraLoaderMixin):
    """diffusers' SD3 LoRA loading, extended by the keys `unet.*` and `vae.*`."""

    _lora_loadable_modules = ["transformer", "unet", "vae", "text_encoder", "text_encoder_2"]
    unet_name = "unet"
    vae_name = "vae"

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, hotswap: bool = False, **kwargs
    ) -> None:
        """Load `transformer.*` or `unet.*`, and `vae.*` adapters under one name.

        Args:
            pretrained_model_name_or_path_or_dict: a folder with `pytorch_lora_weights.safetensors`, a file, a Hub id,
                or a state dict.
            adapter_name: name of the adapter, the same in both networks.
            hotswap: replace the weights of a loaded adapter in place.

        Raises:
            ValueError: if the file holds other keys than LoRA weights, none for the networks of this pipeline, or some
                for the kind of denoiser that it has not.
        """
        if adapter_name is None:
            # Both networks must take the same name, also where only one of them has adapters already.
            taken = {name for names in self.get_list_adapters().values() for name in names}
            adapter_name = next(f"default_{i}" for i in range(len(taken) + 1) if f"default_{i}" not in taken)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, **{**kwargs, "return_lora_metadata": True}
        )
        prefixes = {key.split(".", 1)[0] for key in state_dict}
        ours, other = self.transformer_name, self.unet_name
        if self.unet is not None:
            ours, other = other, ours
        if other in prefixes or not prefixes & {ours, self.vae_name}:
            raise ValueError(
                f"This pipeline takes LoRA keys `{ours}.*` and `{self.vae_name}.*`, but the file holds "
                f"{sorted(prefixes)[:4]}."
            )
        for name in (ours, self.vae_name):
            layers = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
            if layers:
                # Where a file states the settings of only some networks, those of the others follow from the weights.
                stated = any(key.startswith(f"{name}.") for key in metadata or ())
                getattr(self, name).load_lora_adapter(
                    layers,
                    prefix=name,
                    network_alphas=None,
                    adapter_name=adapter_name,
                    metadata=metadata if stated else None,
                    _pipeline=self,
                    low_cpu_mem_usage=kwargs.get("low_cpu_mem_usage", False),
                    hotswap=hotswap,
                )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, Tensor] | nn.Module | None = None,
        unet_lora_layers: dict[str, Tensor] | nn.Module | None = None,
        vae_lora_layers: dict[str, Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        unet_lora_adapter_metadata: dict[str, Any] | None = None,
        vae_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write the LoRAs of all networks into one file, whole or not at all.

        Args:
            save_directory: made where it does not exist; the file is `pytorch_lora_weights.safetensors` in it.
            transformer_lora_layers, unet_lora_layers, vae_lora_layers: weights by their names in the network, as peft's
                `get_peft_model_state_dict` gives them.
            is_main_process: other processes write nothing.
            weight_name: another name of the file.
            save_function: called as `(state dict, path)` instead of diffusers' own; it leaves out the metadata.
            safe_serialization: False writes `pytorch_lora_weights.bin` with torch.save, without metadata.
            transformer_lora_adapter_metadata, unet_lora_adapter_metadata, vae_lora_adapter_metadata: settings (rank,
                alpha, targets, ...) as `LoraConfig.to_dict` gives them, for the header. Without them loading takes
                alpha to be the rank.

        Raises:
            ValueError: if there are no layers, or metadata without `safe_serialization`.
            OSError: if the file cannot be written.
        """
        if not is_main_process:
            return
        given = {
            cls.transformer_name: (transformer_lora_layers, transformer_lora_adapter_metadata),
            cls.unet_name: (unet_lora_layers, unet_lora_adapter_metadata),
            cls.vae_name: (vae_lora_layers, vae_lora_adapter_metadata),
        }
        given = {name: (layers, metadata) for name, (layers, metadata) in given.items() if layers}
        if not given:
            raise ValueError(
                "Pass at least one of `transformer_lora_layers`, `unet_lora_layers` and `vae_lora_layers`."
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        file_name = weight_name or (LORA_WEIGHT_NAME_SAFE if safe_serialization else LORA_WEIGHT_NAME)
        # The same folder, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as partial:
            cls._save_lora_weights(
                save_directory=partial,
                lora_layers={name: layers for name, (layers, _) in given.items()},
                lora_metadata={name: metadata for name, (_, metadata) in given.items()},
                weight_name=file_name,
                save_function=save_function,
                safe_serialization=safe_serialization,
            )
            os.replace(Path(partial, file_name), folder / file_name)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Add LoRAs to the weights as diffusers does it, by default in all networks."""
        components = self._lora_loadable_modules if components is None else components
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        """Take fused LoRAs out of the weights again as diffusers does it, by default in all networks."""
        super().unfuse_lora(self._lora_loadable_modules if components is None else components)
