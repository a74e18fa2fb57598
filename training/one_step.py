"""A whole one-step model as a teacher: LQ pictures to its latents and to what it makes of them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..models.fast_layers import use_fast_layers
from ..models.licences import licence_of
from ..models.prompt_embeddings import PromptEmbeddings
from ..pipelines.loading import find_model, load_pipeline
from ..pipelines.pipeline_tsdsr import TSDSRPipeline
from .config import ConfigError, reason
from .families import Prompt, RectifiedFlow
from .objectives import clean_from_velocity


@dataclass
class OneStepModel:
    """An SD3-family `TSDSRPipeline`, LoRAs added to its weights, in float32 on the CPU until it is moved.

    Attributes:
        name: what it was loaded from.
        family: its schedule and timestep.
        transformer: SD3's.
        vae: its autoencoder, of which the encoder takes the enlarged LQ pictures.
        plain_vae: the same without LoRAs: the base's own encoder, which HQ latents are of.
        prompt: the fixed one.
        shift: taken off latents before they are scaled; 0 where the pipeline does not use it.
        use_shift_factor: whether it does.
        grain, degrid: what it adds to its results, and takes off them.
        licence: fields of a model card.
    """

    name: str
    family: RectifiedFlow
    transformer: Any
    vae: Any
    plain_vae: Any
    prompt: PromptEmbeddings
    shift: float
    use_shift_factor: bool
    grain: float
    degrid: float
    licence: dict[str, str]
    dtype: torch.dtype = torch.float32  # of the transformer's frozen weights

    @classmethod
    def load(cls, name: str | Path) -> "OneStepModel":
        """From "embedded", a pipeline folder or a Hub id; a LoRA beside the weights is added to them.

        Raises:
            ConfigError: if it cannot be found or read, is baked, is not of SD3's family, or has no fixed prompt.
        """
        try:
            place, local = find_model(name)
            folder = Path(place if local else TSDSRPipeline.download(place))
            config = TSDSRPipeline.load_config(folder)
            kind = (config.get("transformer") or (None, None))[1]
            if kind == "OneStepSD3Transformer2DModel":
                raise ConfigError(
                    f"{name} is baked, so that there are no prompt and timestep to look at: name the model it was "
                    "baked from."
                )
            if kind != "SD3Transformer2DModel":
                raise ConfigError(f"{name} has no SD3 transformer, and no other network can be compressed.")
            pipeline: Any = load_pipeline(folder, dtype="fp32", device="cpu")
            plain = pipeline.vae
            if any(pipeline.get_list_adapters().values()):
                plain = type(plain).from_pretrained(
                    folder, subfolder="vae", torch_dtype=torch.float32, local_files_only=True
                )
                use_fast_layers(plain)  # as the pipeline's own is
                plain.to(memory_format=torch.channels_last)
                pipeline.fuse_lora()
                pipeline.unload_lora_weights()
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"The model {name} cannot be loaded ({reason(error)}).") from error
        if pipeline.prompt_embeddings is None:
            raise ConfigError(f"{name} has no fixed prompt: save it with prompt_embeddings (`tsdsr embed`) first.")
        for network in (pipeline.transformer, pipeline.vae, plain, pipeline.prompt_embeddings):
            network.requires_grad_(False).eval()
        shift = (pipeline.vae.config.get("shift_factor") or 0.0) if pipeline.config.use_shift_factor else 0.0
        return cls(
            str(name),
            RectifiedFlow(pipeline.scheduler, pipeline.config.timestep),
            pipeline.transformer,
            pipeline.vae,
            plain,
            pipeline.prompt_embeddings,
            shift,
            bool(pipeline.config.use_shift_factor),
            pipeline.config.grain,
            pipeline.config.degrid,
            licence_of(folder, dict(pipeline.transformer.config)),
        )

    @property
    def scaling(self) -> float:
        """What latents are multiplied with."""
        return self.vae.config.scaling_factor

    @property
    def latent_side(self) -> int:
        """Pixels a side of one latent."""
        return latent_side(self.vae)

    @property
    def size_multiple(self) -> int:
        """What sides of pictures are multiples of: pixels a side of one patch."""
        return self.latent_side * self.transformer.config.patch_size

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32, transformer: bool = True) -> "OneStepModel":
        """Move it, by default with its transformer; returns itself."""
        for network in {self.vae, self.plain_vae, *([self.transformer] if transformer else [])}:
            network.to(device)
            if network.dtype != dtype:
                network.to(dtype)
        self.dtype = dtype
        return self

    def fixed_prompt(self, device: torch.device) -> Prompt:
        """Its embeddings, (1, tokens, width) and (1, pooled width), in the number format of the transformer."""
        found = (self.prompt.prompt_embeds, self.prompt.pooled_prompt_embeds)
        embeds, pooled = (tensor.detach().to(device, self.dtype) for tensor in found)
        return embeds, pooled

    @torch.no_grad()
    def lq_latents(self, pictures: Tensor) -> Tensor:
        """z_L, scaled, of enlarged LQ pictures (B, 3, H, W) in -1..1: the mode of the posterior; float32."""
        return scaled_latents(self.vae, pictures, self.shift)

    @torch.no_grad()
    def plain_latents(self, pictures: Tensor) -> Tensor:
        """The same of the base's own encoder."""
        return scaled_latents(self.plain_vae, pictures, self.shift)

    @torch.no_grad()
    def restored(self, lq_latents: Tensor) -> Tensor:
        """z_tea = z_L - sigma * v(z_L), (B, C, h, w), float32."""
        return self.family.one_step(self.transformer, lq_latents, self.fixed_prompt(lq_latents.device))

    def decoded(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about -1..1, float32, of scaled latents; with gradient to them."""
        return decoded(self.vae, latents, self.shift)

    def fingerprint(self) -> str:
        """16 letters that differ for models whose targets differ; of one that nobody has moved or cast."""
        digest = hashlib.sha256(repr((self.family.timestep, self.scaling, self.shift)).encode())
        for network in (self.vae, self.transformer, self.prompt):
            for name, tensor in sorted(network.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


def latent_side(vae: Any) -> int:
    """Pixels a side of one latent of an AutoencoderKL or AutoencoderTiny."""
    channels = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels")
    return 2 ** (len(channels) - 1)


def scaled_latents(vae: Any, pictures: Tensor, shift: float) -> Tensor:
    """(mode of the posterior - shift) * scaling factor, float32, of pictures (B, 3, H, W) in -1..1."""
    encoded = vae.encode(pictures.to(vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return (latents.float() - shift) * vae.config.scaling_factor


def decoded(vae: Any, latents: Tensor, shift: float) -> Tensor:
    """Pictures (B, 3, H, W), about -1..1, float32, of scaled latents (B, C, h, w)."""
    return vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0].float()


def baked_step(transformer: Any, latents: Tensor) -> Tensor:
    """z^ = z_L - sigma * v(z_L) of a `OneStepSD3Transformer2DModel`, float32, with gradient."""
    sigma = torch.full((len(latents),), transformer.config.timestep / 1000, device=latents.device)
    velocity = transformer(latents.to(transformer.dtype), return_dict=False)[0].float()
    return clean_from_velocity(latents.float(), velocity, sigma)
