"""LoRA weights of a one-step model: the denoiser's and the VAE encoder's in one file."""

import copy
import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ..models.attention import check_not_fused

logger = logging.get_logger(__name__)

# The two files of the published release and the names under which `fidelity` looks for its two models.
PUBLISHED_FILES = ("transformer.safetensors", "vae.safetensors")
REALISM_ADAPTER, FIDELITY_ADAPTER = "tsdsr", "tsdsr-mse"
# Where an AutoencoderKL's layers begin. The published VAE file has them behind the prefix `transformer.` too, and no
# SD3 transformer has layers of these names.
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def keeps_adapters(call: Callable) -> Callable:
    """A pipeline's method after which the LoRAs of its networks are active, and as strong, as they were before."""

    @functools.wraps(call)
    def kept(self, *args: Any, **kwargs: Any) -> Any:
        networks = [network for network in (self.denoiser, self.vae) if network is not None]
        layers = [layer for network in networks for layer in network.modules() if isinstance(layer, LoraLayer)]
        # After `enable_lora_hotswap` strengths are tensors, which are changed in place.
        before = [(layer._active_adapter, layer.disable_adapters, copy.deepcopy(layer.scaling)) for layer in layers]
        try:
            return call(self, *args, **kwargs)
        finally:
            for layer, (active, disabled, scaling) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled
                layer.scaling.update(scaling)

    return kept


class TSDSRLoraLoaderMixin(SD3LoraLoaderMixin):
    """diffusers' SD3 LoRA loading for what a one-step model trains: the denoiser and the VAE's encoder.

    The prompt is fixed, so LoRAs of text encoders are left aside.
    """

    _lora_loadable_modules = ["transformer", "unet", "vae"]
    unet_name = "unet"
    vae_name = "vae"

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """Weights of LoRAs by their keys `transformer.*`, `unet.*` and `vae.*`, and their metadata if asked for.

        Takes what diffusers takes, and the published layout: a local folder with `transformer.safetensors` and
        `vae.safetensors`, or either file, where the VAE's keys begin with `transformer.` as well.

        Args:
            pretrained_model_name_or_path_or_dict: folder, file, Hub id or state dict.
            kwargs: as in diffusers: `weight_name`, `subfolder`, `return_lora_metadata`, ...
        """
        source, metadata_too = pretrained_model_name_or_path_or_dict, kwargs.get("return_lora_metadata", False)
        kwargs["return_lora_metadata"] = True
        names = [kwargs.pop("weight_name", None)]
        if not isinstance(source, dict) and names == [None] and os.path.isdir(source):
            folder = Path(source, kwargs.get("subfolder") or "")
            present = [name for name in PUBLISHED_FILES if (folder / name).is_file()]
            if present and not any((folder / name).is_file() for name in (LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME)):
                names = present
        state_dict: dict[str, Tensor] = {}
        metadata: dict[str, Any] | None = None
        for name in names:
            found, metadata = super().lora_state_dict(source, weight_name=name, **kwargs)
            for key, tensor in found.items():
                layer = key.removeprefix(f"{cls.transformer_name}.")
                ours = layer != key and layer.startswith(_VAE_PARTS)
                state_dict[f"{cls.vae_name}.{layer}" if ours else key] = tensor
        return (state_dict, metadata) if metadata_too else state_dict

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, hotswap: bool = False, **kwargs
    ) -> None:
        """Load `transformer.*` or `unet.*`, and `vae.*` adapters under one name.

        Args:
            pretrained_model_name_or_path_or_dict: a folder with `pytorch_lora_weights.safetensors` or with the two
                published files, a file, a Hub id, or a state dict.
            adapter_name: name of the adapter, the same in both networks.
            hotswap: replace the weights of a loaded adapter in place.

        Raises:
            ValueError: if the file holds something else than LoRA weights, or some for the kind of denoiser that this
                pipeline has not.
        """
        if adapter_name is None:
            # Both networks must take the same name, also where only one of them has adapters already.
            taken = {name for names in self.get_list_adapters().values() for name in names}
            adapter_name = next(f"default_{i}" for i in range(len(taken) + 1) if f"default_{i}" not in taken)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, **{**kwargs, "return_lora_metadata": True}
        )
        strange = [key for key in state_dict if "lora" not in key]
        if strange:
            raise ValueError(f"LoRA weights have `lora` in their names, but this file holds {strange[0]!r}.")
        prefixes = {key.split(".", 1)[0] for key in state_dict}
        ours, other = self.transformer_name, self.unet_name
        if self.unet is not None:
            ours, other = other, ours
        if other in prefixes:
            raise ValueError(
                f"This pipeline takes LoRA keys `{ours}.*` and `{self.vae_name}.*`, but the file holds "
                f"{sorted(prefixes)[:4]}."
            )
        if not prefixes & {ours, self.vae_name}:
            logger.warning(
                f"No LoRA keys associated to `{ours}.*` or `{self.vae_name}.*` were found, only {sorted(prefixes)[:4]}:"
                " nothing was loaded."
            )
        if getattr(self, "_offloads_to_disk", False):
            raise ValueError("Load LoRAs before weights are offloaded to disk; there they cannot be changed.")
        for name in (ours, self.vae_name):
            layers = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
            if layers:
                network = getattr(self, name)
                check_not_fused(network)
                modules = {key.removeprefix(f"{name}.").split(".lora")[0] for key in layers}
                baked = name == ours and "timestep" in network.config
                if baked and modules - {module for module, _ in network.named_modules()}:
                    raise ValueError(
                        "This LoRA is for the original transformer, not for one that is baked: load it into the"
                        " original and bake that."
                    )
                if any(weight.dtype.is_floating_point and weight.itemsize == 1 for weight in network.parameters()):
                    raise ValueError(
                        "Load LoRAs before `enable_layerwise_casting`; afterwards they too would be rounded to 8 bits."
                    )
                # Where a file states the settings of only some networks, those of the others follow from the weights.
                stated = any(key.startswith(f"{name}.") for key in metadata or ())
                with warnings.catch_warnings():
                    # Several LoRAs side by side are what this method is for.
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")
                    network.load_lora_adapter(
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
                # Sets in an order, so that the same LoRA gives the same file.
                lora_metadata={
                    name: metadata and {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}
                    for name, (_, metadata) in given.items()
                },
                weight_name=file_name,
                save_function=save_function,
                safe_serialization=safe_serialization,
            )
            os.replace(Path(partial, file_name), folder / file_name)

    def save_lora_adapter(
        self, save_directory: str | os.PathLike, adapter_name: str | None = None, weight_name: str | None = None
    ) -> None:
        """Write a loaded LoRA into one file with its settings, however it was loaded.

        Args:
            save_directory: made where it does not exist; the file is `pytorch_lora_weights.safetensors` in it.
            adapter_name: may be left out where only one is loaded.
            weight_name: another name of the file.

        Raises:
            ValueError: if there is no such LoRA.
            OSError: if the file cannot be written.
        """
        loaded = self.get_list_adapters()
        names = sorted({name for component in loaded.values() for name in component})
        if adapter_name is None and len(names) == 1:
            adapter_name = names[0]
        if adapter_name not in names:
            raise ValueError(
                f"`adapter_name` must be one of the loaded LoRAs ({names or 'none'}), not {adapter_name!r}."
            )
        arguments: dict[str, Any] = {}
        for component, adapters in loaded.items():
            if adapter_name in adapters:
                network = getattr(self, component)
                layers = get_peft_model_state_dict(network, adapter_name=adapter_name)
                arguments[f"{component}_lora_layers"] = {name: layer.contiguous() for name, layer in layers.items()}
                arguments[f"{component}_lora_adapter_metadata"] = network.peft_config[adapter_name].to_dict()
        self.save_lora_weights(save_directory, weight_name=weight_name, **arguments)

    def mix_adapters(self, fidelity: float) -> None:
        """Activate the realism adapter at strength 1 - fidelity and the fidelity adapter at strength fidelity.

        Which two is said at `fidelity` of the pipeline's call, which leaves everything as it was; this method does not.

        Raises:
            ValueError: if the two cannot be told, or are fused into the weights.
        """
        loaded = self.get_list_adapters()
        names = list(dict.fromkeys(name for component in loaded.values() for name in component))
        pair = [REALISM_ADAPTER, FIDELITY_ADAPTER]
        if not set(pair) <= set(names):
            pair = names
        if len(pair) != 2:
            raise ValueError(
                f"`fidelity` mixes two LoRAs, {REALISM_ADAPTER!r} and {FIDELITY_ADAPTER!r} or the only two there are; "
                f"loaded: {names or 'none'}. Load both with `load_lora_weights(..., adapter_name=...)`."
            )
        for layer in (layer for component in loaded for layer in getattr(self, component).modules()):
            if isinstance(layer, LoraLayer):
                if layer.merged:
                    raise ValueError("`fidelity` cannot mix LoRAs that are fused; call `unfuse_lora()` first.")
                layer._disable_adapters = False
                layer._active_adapter = list(pair)
                for name, strength in zip(pair, (1 - fidelity, fidelity), strict=True):
                    layer.set_scale(name, strength)

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
