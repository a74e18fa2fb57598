"""What a compression trains: the tiny VAE's halves, and the pruned transformer."""

from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from ...models.autoencoder_tiny_separable import AutoencoderTinySeparable
from ..base import lora_config
from ..config import ConfigError
from ..networks import STUDENT
from ..one_step import OneStepModel, baked_step, decoded, latent_side, scaled_latents
from .config import CompressConfig, Half, StudentStage

# Layers of a `OneStepSD3Transformer2DModel` that the student's LoRA is on. These are TinySR's (spec: to_q, to_k, to_v,
# to_out.0, net.0.proj, net.2 and the patches' projection), of which the first three are one layer here; those of the
# modulation are part of these.
LORA_TARGETS = ("to_qkv", "to_out", "to_added_qkv", "to_added_out", "net.0.proj", "net.2", "proj_in")


class Encoder(nn.Module):
    """An autoencoder's encoder alone: pictures (B, 3, H, W) in -1..1 to scaled latents."""

    def __init__(self, vae: Any, shift: float):
        super().__init__()
        self.vae, self.shift = vae.requires_grad_(False), shift

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, C, h, w), float32, with gradient."""
        return scaled_latents(self.vae, pictures, self.shift)


class Decoder(nn.Module):
    """An autoencoder's decoder alone: scaled latents (B, C, h, w) to pictures, about -1..1."""

    def __init__(self, vae: Any, shift: float):
        super().__init__()
        self.vae, self.shift = vae.requires_grad_(False), shift

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W), float32, with gradient."""
        return decoded(self.vae, latents, self.shift)


class Student(nn.Module):
    """The pruned and baked transformer, in training.

    Args:
        transformer: `OneStepSD3Transformer2DModel`, in float32.
        stage: says whether all of its weights are trained or a LoRA is, and of what rank.
        decoder: what makes pictures of its latents, where they are looked at.
    """

    def __init__(self, transformer: Any, stage: StudentStage, decoder: Decoder | None = None):
        super().__init__()
        self.transformer, self.decoder = transformer.requires_grad_(stage.train_type == "full"), decoder
        if stage.train_type == "lora":
            transformer.add_adapter(lora_config(stage.rank, LORA_TARGETS), adapter_name=STUDENT)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """z^ = z_L - sigma * v(z_L), and its pictures or None; float32."""
        z = baked_step(self.transformer, latents)
        return z, None if self.decoder is None else self.decoder(z)

    def plain(self) -> Any:
        """The transformer on the CPU, its LoRA added to the weights; the student cannot be trained any more."""
        if getattr(self.transformer, "peft_config", None):
            self.transformer.fuse_lora()
            self.transformer.unload_lora()
        return self.transformer.cpu().eval()


def check_vae(config: CompressConfig, teacher: OneStepModel) -> None:
    """Raises a `ConfigError` for one half of a tiny VAE where the base's other half is no TAESD's."""
    alone = [name for name in ("encoder", "decoder") if getattr(config, name) is None]
    if len(alone) == 1 and not isinstance(teacher.vae, AutoencoderTiny):
        raise ConfigError(
            f"{alone[0]} is null, but the {alone[0]} of an {type(teacher.vae).__name__} cannot be half of a tiny VAE: "
            "train both halves, or neither."
        )


def tiny_vae(config: CompressConfig, teacher: OneStepModel) -> AutoencoderTinySeparable:
    """The tiny VAE, untrained; a half that is not trained is the base's own.

    It has the base's latents: their channels and size, scaling and shift.

    Raises:
        ConfigError: for a number of sizes (num_blocks) that makes latents of another size.
    """
    base = teacher.vae.config
    stages = latent_side(teacher.vae).bit_length()
    arguments: dict[str, Any] = {}
    for name, published in (("encoder", (1, *[3] * (stages - 1))), ("decoder", (*[3] * (stages - 1), 1))):
        half: Half | None = getattr(config, name)
        if half is None:
            kept = (f"{name}_block_out_channels", f"num_{name}_blocks")
            arguments |= {key: base[key] for key in kept} | {f"separable_{name}": base.get(f"separable_{name}", False)}
            continue
        blocks = half.num_blocks or list(published)
        if len(blocks) != stages:
            raise ConfigError(
                f"{name}.num_blocks must list {stages} numbers, one for each size between pictures and latents of this "
                f"model, not {len(blocks)}."
            )
        arguments |= {
            f"{name}_block_out_channels": [half.width] * stages,
            f"num_{name}_blocks": blocks,
            f"separable_{name}": half.separable,
        }
    found = AutoencoderTinySeparable(
        **arguments,
        latent_channels=base.latent_channels,
        scaling_factor=base.scaling_factor,
        shift_factor=base.get("shift_factor") or 0.0,
    )
    for name in ("encoder", "decoder"):
        if getattr(config, name) is None:
            getattr(found, name).load_state_dict(getattr(teacher.vae, name).state_dict())
    return found.eval()


def trains_vae(config: CompressConfig) -> bool:
    """Whether the compressed model has a VAE of its own."""
    return config.encoder is not None or config.decoder is not None


def decoder_parts(vae: AutoencoderKL | AutoencoderTiny) -> list[nn.Module]:
    """What of a VAE turns latents into pictures."""
    return [part for name in ("decoder", "post_quant_conv") if (part := getattr(vae, name, None)) is not None]
