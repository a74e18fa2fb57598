"""LoRA weights of a one-step model: the transformer's and the VAE encoder's in one file."""

from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.utils import logging

logger = logging.get_logger(__name__)


class TSDSRLoraLoaderMixin(SD3LoraLoaderMixin):
    """diffusers' SD3 LoRA loading, extended by the keys `vae.*`."""

    _lora_loadable_modules = ["transformer", "vae", "text_encoder", "text_encoder_2"]
    vae_name = "vae"

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, hotswap: bool = False, **kwargs
    ) -> None:
        """Load `transformer.*` and `vae.*` adapters under one name.

        Args:
            pretrained_model_name_or_path_or_dict: a folder with `pytorch_lora_weights.safetensors`, a file, a Hub id,
                or a state dict.
            adapter_name: name of the adapter, the same in both networks.
            hotswap: replace the weights of a loaded adapter in place.

        Raises:
            ValueError: if the file holds other keys than LoRA weights, or none for the VAE and the transformer.
        """
        if adapter_name is None:
            # Both networks must take the same name, also where only one of them has adapters already.
            taken = {name for names in self.get_list_adapters().values() for name in names}
            adapter_name = next(f"default_{i}" for i in range(len(taken) + 1) if f"default_{i}" not in taken)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, **{**kwargs, "return_lora_metadata": True}
        )
        prefixes = {key.split(".", 1)[0] for key in state_dict}
        if not prefixes & {"transformer", "vae"}:
            raise ValueError(f"The LoRA file holds no keys `transformer.*` or `vae.*`, but {sorted(prefixes)[:4]}.")
        others = {key: value for key, value in state_dict.items() if not key.startswith("vae.")}
        low_cpu_mem_usage = kwargs.get("low_cpu_mem_usage", False)
        if others:
            self.load_lora_into_transformer(
                others,
                transformer=self.transformer,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )
        if "vae" in prefixes:
            self.vae.load_lora_adapter(
                {key: value for key, value in state_dict.items() if key.startswith("vae.")},
                prefix=self.vae_name,
                network_alphas=None,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )
