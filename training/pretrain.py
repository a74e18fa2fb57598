"""Trains a small base from nothing but photographs: an autoencoder, then a teacher on its HQ latents, or one that
restores LQ pictures.

For recipes that have no published base to begin with; `pretrain` in a recipe holds the settings. `training.distill`
does it first where a recipe says so; alone, into `output_dir/base`:

    python -m tsdsr.training.pretrain --config RECIPE --train_data_dir PHOTOGRAPHS --output_dir runs/teacher
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from ..imaging import draw_rows, write
from ..models.fast_layers import use_fast_layers
from ..models.prompt_embeddings import PromptEmbeddings
from ..pipelines.folders import whole_folder
from ..pipelines.pipeline_tsdsr import TSDSRPipeline
from .base import Base, sides
from .config import ConfigError, DistillConfig, parse, reason
from .data import degrade_batch
from .discriminators import make_discriminator
from .draws import PRETRAINING, draws
from .families import Family, Known, RectifiedFlow, ResidualShifting
from .initialisation import start_as_convolution, start_as_interpolation
from .inputs import Photographs, open_photographs, read_batches
from .objectives import (
    ResidualShift,
    add_noise,
    clean_from_velocity,
    draw_levels,
    frequency_l1,
    gradient_l1,
    pixel_l1,
)
from .reporting import command
from .sampling import STEPS, STRENGTHS, Teacher, restoration_rows, sample_rows
from .stage import Adversary, Made, Stage, Task, run_stage, section
from .validation import bicubic

logger = logging.getLogger("tsdsr.training")


@dataclass
class AutoencoderStage(Stage):
    """The first stage: weights of terms beside the absolute error of pixels, and when a discriminator joins in.

    The discriminator is made as the run's settings for its own say (discriminator_width, adversarial_loss, ...).
    latent_noise is that of noise on the latents that are decoded, in parts of their root mean square: what the noise
    hides need not be told by a teacher either, and the decoder learns to make pictures of latents that are not exact.
    """

    frequency_l1: float = 0.0
    latent_noise: float = 0.0
    adversarial: float = 0.0
    adversarial_from: float = 0.5  # share of the steps that come before it


@dataclass
class TeacherStage(Stage):
    """The second stage, and what the teacher reads beside noisy latents: nothing (none), or the LQ picture's (lq).

    One that does not read it draws photographs, and restores them as SDEdit does; one that does is taught to restore.
    """

    condition: str = "none"


@dataclass
class PretrainConfig:
    """The section `pretrain` of a recipe.

    A transformer learns a rectified flow, a UNet residual shifting (ResShift), which says so in its scheduler
    (`kind: residual_shift`) and needs the LQ picture.
    """

    vae: dict[str, Any]  # arguments of AutoencoderTiny
    autoencoder: AutoencoderStage
    teacher: TeacherStage
    transformer: dict | None = None  # arguments of SD3Transformer2DModel
    unet: dict | None = None  # arguments of UNet2DConditionModel, instead
    prompt_tokens: int = 4
    gradient_l1: float = 0.5  # weight beside the absolute error of pixels, autoencoder
    checkpointing_steps: int = 200
    scheduler: dict | None = None  # its kind, flow or residual_shift, and arguments of that

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PretrainConfig":
        """Raises a `ConfigError` for settings that are missing, do not exist, or cannot be used."""
        kinds = {"autoencoder": AutoencoderStage, "teacher": TeacherStage}
        stages = {name: section(kind, values.get(name), f"pretrain.{name}.") for name, kind in kinds.items()}
        settings = section(cls, {**values, **stages}, "pretrain.")
        for name in ("prompt_tokens", "checkpointing_steps"):
            if getattr(settings, name) < 1:
                raise ConfigError(f"pretrain.{name} must be at least 1, not {getattr(settings, name)}.")
        for name, stage in stages.items():
            stage.check(f"pretrain.{name}.")
        for name in ("frequency_l1", "latent_noise", "adversarial", "adversarial_from"):
            value = getattr(settings.autoencoder, name)
            if value < 0 or (name == "adversarial_from" and value > 1):
                allowed = "from 0 to 1" if name == "adversarial_from" else "at least 0"
                raise ConfigError(f"pretrain.autoencoder.{name} must be {allowed}, not {value}.")
        if settings.teacher.condition not in ("none", "lq"):
            raise ConfigError(
                f"pretrain.teacher.condition must be one of none, lq, not {settings.teacher.condition!r}."
            )
        if bool(settings.transformer) == bool(settings.unet):
            raise ConfigError("pretrain trains one network: give it a section transformer or a section unet.")
        kind = (settings.scheduler or {}).get("kind", "flow")
        if kind not in ("flow", "residual_shift"):
            raise ConfigError(f"pretrain.scheduler.kind must be one of flow, residual_shift, not {kind!r}.")
        if (kind == "residual_shift") != bool(settings.unet):
            raise ConfigError(
                "pretrain.scheduler.kind residual_shift is for a unet, flow for a transformer: pipelines run no other "
                "students."
            )
        if settings.unet and settings.teacher.condition != "lq":
            raise ConfigError("Residual shifting goes to the LQ picture: set pretrain.teacher.condition lq.")
        return settings

    def build(self) -> tuple[AutoencoderTiny, Family, Any]:
        """Autoencoder, family and denoiser, untrained; raises what their classes do for arguments they cannot use."""
        vae = AutoencoderTiny(**self.vae)
        use_fast_layers(vae)
        arguments = {name: value for name, value in (self.scheduler or {}).items() if name != "kind"}
        if self.unet:
            return vae, ResidualShifting(ResidualShift(**arguments)), UNet2DConditionModel(**self.unet)
        scheduler = FlowMatchEulerDiscreteScheduler(**(arguments or {"shift": 3.0}))
        family = RectifiedFlow(scheduler, conditioned=self.teacher.condition == "lq")
        return vae, family, SD3Transformer2DModel(**(self.transformer or {}))


class RoundTrip(nn.Module):
    """Pictures (B, 3, H, W) in -1..1 through an autoencoder: DDP passes on calls of `forward` alone."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """The pictures as decoded, from latents with normal noise of `noise` times their root mean square."""
        latents = self.vae.encode(pictures).latents
        if noise:
            drawn = torch.randn(latents.shape, generator=generator).to(latents.device)
            latents = latents + noise * latents.detach().square().mean().sqrt() * drawn
        return self.vae.decode(latents).sample


def autoencoder_loss(output: Tensor, hq: Tensor, gradient_weight: float, frequency_weight: float = 0.0) -> Tensor:
    """Absolute error of pixels, of their differences and of their spectra; pictures (B, 3, H, W) in -1..1."""
    loss = pixel_l1(output, hq) + gradient_weight * gradient_l1(output, hq)
    return loss + frequency_weight * frequency_l1(output, hq) if frequency_weight else loss


def flow_matching_loss(network: nn.Module, known: Known, latents: Tensor, generator: torch.Generator) -> Tensor:
    """mean( (v - (noise - z))^2 ) at levels sigmoid(N(0, 1)) (Esser et al., 2024, sections 2 and 3.1)."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    sigma = torch.randn(len(latents), generator=generator).sigmoid().to(latents.device)
    velocity = RectifiedFlow(None).velocity(network, known)(add_noise(latents, noise, sigma), sigma)
    return (velocity - (noise - latents)).square().mean()


def residual_shift_loss(
    network: nn.Module, known: Known, latents: Tensor, generator: torch.Generator, schedule: ResidualShift
) -> Tensor:
    """mean( (x - z)^2 ) of the network's clean latents x, each timestep as likely (ResShift, arXiv 2307.12348)."""
    sigma = draw_levels(schedule, len(latents), 1.0, generator).to(latents.device)
    noisy = add_noise(latents, torch.randn(latents.shape, generator=generator).to(latents.device), sigma)
    clean = clean_from_velocity(noisy, ResidualShifting(schedule).velocity(network, known)(noisy, sigma), sigma)
    return (clean - latents).square().mean()


def pretrain(config: DistillConfig, photographs: Photographs) -> str:
    """Train the base of a recipe into `output_dir/base`; one that is whole already is taken when a run is resumed.

    Returns:
        The folder.

    Raises:
        ConfigError: for settings that cannot be used.
        TrainingError: if a loss or gradient is no longer finite.
        Stopped: if the run was asked to stop (SIGTERM); a checkpoint was written.
        OSError: if a checkpoint or the result cannot be written.
    """
    settings = PretrainConfig.from_dict(config.pretrain or {})
    if config.vae_encoder == "lora":
        raise ConfigError("AutoencoderTiny, which pretrain trains, takes no LoRA: set vae_encoder to full or frozen.")
    folder = Path(config.output_dir) / "base"
    if config.resume_from_checkpoint and (folder / "model_index.json").is_file():
        return str(folder)
    set_seed(config.seed)
    try:
        vae, family, denoiser = settings.build()
    except (TypeError, ValueError, RuntimeError, ArithmeticError, IndexError) as error:
        raise ConfigError(
            f"vae, {'unet' if settings.unet else 'transformer'} or scheduler of the section pretrain cannot be built "
            f"({reason(error)})."
        ) from error
    made = vae.config.latent_channels
    for name, times in (("in_channels", 1 + family.conditioned), ("out_channels", 1)):
        found = denoiser.config[name]
        if found != times * made and not (found is None and not family.conditioned):
            raise ConfigError(
                f"pretrain.{family.component}.{name} must be {'twice ' if times > 1 else ''}vae.latent_channels, "
                f"{times * made}, not {found}."
            )
    latent, coarsest = sides(family, denoiser, vae)
    for name, one, multiple in (
        ("autoencoder", settings.autoencoder, latent),
        ("teacher", settings.teacher, coarsest),
    ):
        for side in one.batches(config).resolutions:
            if side % multiple:
                raise ConfigError(f"pretrain.{name}: sides of crops must be multiples of {multiple}, not {side}.")
    start_as_interpolation(vae)
    if settings.transformer:
        start_as_convolution(denoiser)
        nn.init.zeros_(denoiser.proj_out.weight)
    wide = denoiser.config.get("joint_attention_dim") or denoiser.config.cross_attention_dim
    prompt = PromptEmbeddings.from_tensors(
        torch.randn(1, settings.prompt_tokens, wide),
        torch.randn(1, denoiser.config.pooled_projection_dim) if settings.transformer else None,
    ).requires_grad_(False)

    def reconstruct(model: nn.Module, hq: Tensor, generator: torch.Generator) -> Made:
        output = model(hq, settings.autoencoder.latent_noise, generator)
        loss = autoencoder_loss(output, hq, settings.gradient_l1, settings.autoencoder.frequency_l1)
        return Made({"autoencoder": loss}, output, hq)

    adversary, stage = None, settings.autoencoder
    if stage.adversarial:
        config.check_judged(min(stage.batches(config).resolutions))
        adversary = Adversary(config, make_discriminator(config), stage.adversarial, stage.adversarial_from)
    autoencoder = RoundTrip(vae).to(memory_format=torch.channels_last)
    train_stage("autoencoder", stage, settings, config, photographs, autoencoder, reconstruct, adversary)
    vae.requires_grad_(False).eval()
    measure_latents(vae, config, photographs, settings.teacher.resolution)

    degraded = replace(settings.teacher.batches(config), mild_degradation=config.mild_degradation)

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        latents = vae.to(pictures.device).encode(pictures).latents.float()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    def match(model: nn.Module, hq: Tensor, generator: torch.Generator) -> Made:
        known: Known = (prompt.prompt_embeds.to(hq.device), prompt.pooled_prompt_embeds.to(hq.device))
        if family.conditioned:
            number = int(torch.randint(2**31, (), generator=generator))
            lq = degrade_batch(hq / 2 + 0.5, number, degraded)
            known = (known[0], known[1], encode(bicubic(lq, (hq.shape[-2], hq.shape[-1])) * 2 - 1))
        latents = encode(hq)
        if settings.unet:
            return Made({"teacher": residual_shift_loss(model, known, latents, generator, family.scheduler)})
        return Made({"teacher": flow_matching_loss(model, known, latents, generator)})

    train_stage("teacher", settings.teacher, settings, config, photographs, denoiser, match)
    if Accelerator().is_main_process:
        base = Base(family, denoiser.cpu(), vae.cpu(), prompt.cpu(), None)
        with whole_folder(folder) as partial:
            save_base(base, partial, config.use_shift_factor)
        if photographs.validation:
            show_teacher(base, config, photographs, settings.teacher.resolution)
    Accelerator().wait_for_everyone()
    return str(folder)


def save_base(base: Base, folder: Path, use_shift_factor: bool) -> None:
    """Write what `load_base` reads: a pipeline, or the mere parts of a base that reads LQ pictures, which none runs."""
    component = base.family.component
    parts = {"vae": base.vae, component: base.denoiser, "scheduler": base.family.scheduler}
    if not base.family.conditioned:
        TSDSRPipeline(**parts, prompt_embeddings=base.prompt, use_shift_factor=use_shift_factor).save_pretrained(folder)
        return
    index: dict[str, Any] = {"_class_name": DiffusionPipeline.__name__, "use_shift_factor": use_shift_factor}
    for name, part in {**parts, "prompt_embeddings": base.prompt}.items():
        part.save_pretrained(folder / name)
        ours = isinstance(part, PromptEmbeddings | ResidualShift)
        index[name] = ["tsdsr" if ours else "diffusers", type(part).__name__]
    (folder / DiffusionPipeline.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def show_teacher(base: Base, config: DistillConfig, photographs: Photographs, resolution: int) -> None:
    """Write `output_dir/teacher.png`: four samples, if it draws any, and restorations of the centres of four validation
    photographs.
    """
    teacher = Teacher.of(base, base.vae.config.shift_factor, Accelerator().device)
    strengths = (base.family.strength,) if teacher.reads_lq else STRENGTHS
    how: dict[str, Any] = {"seed": config.seed, "steps": STEPS // 2}
    large = [pair for pair in photographs.validation if min(pair[2].shape[-2:]) >= teacher.multiple]
    rows = [] if teacher.reads_lq else sample_rows(teacher, 4, resolution, **how)
    rows += restoration_rows(teacher, large[:4], strengths, size=resolution, **how)
    write(draw_rows("The teacher: samples, restorations", rows), Path(config.output_dir) / "teacher.png")


@torch.no_grad()
def measure_latents(vae: AutoencoderTiny, config: DistillConfig, photographs: Photographs, resolution: int) -> None:
    """Set the autoencoder's scaling (and, where it is used, shift) factor, so that latents have variance 1."""
    device = next(vae.parameters()).device
    batch = next(
        read_batches(photographs.source, Stage(1, train_batch_size=16, resolution=resolution).batches(config), stop=1)
    )
    latents = vae.encode(batch["hq"].to(device) * 2 - 1).latents
    shift = float(latents.mean()) if config.use_shift_factor else 0.0
    vae.register_to_config(shift_factor=shift, scaling_factor=1 / float((latents - shift).square().mean().sqrt()))


def train_stage(
    name: str,
    stage: Stage,
    settings: PretrainConfig,
    config: DistillConfig,
    photographs: Photographs,
    model: nn.Module,
    terms_of: Callable[[nn.Module, Tensor, torch.Generator], Made],
    adversary: Adversary | None = None,
) -> None:
    """Minimise the terms of `terms_of(model, hq, generator)`; afterwards the model holds the averaged weights."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)

    @contextmanager
    def on_batch(wrapped: nn.Module, batch: dict[str, Any], progress: float) -> Iterator[Made]:
        hq = batch["hq"].to(accelerator.device) * 2 - 1
        yield terms_of(wrapped, hq, draws(config.seed, PRETRAINING, batch["index"]))

    run_stage(
        Task(name, model, on_batch, {name: 1.0}, adversary),
        stage,
        stage.batches(config),
        config,
        accelerator,
        photographs.source,
        Path(config.output_dir) / "checkpoints" / name,
        checkpointing_steps=settings.checkpointing_steps,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 2 for what it was told wrongly, with 1 for what went wrong."""
    with command():
        config = parse(arguments, __doc__ or "")
        if not config.pretrain:
            raise ConfigError("Name a recipe with a section pretrain (--config).")
        print(pretrain(config, open_photographs(config)))


if __name__ == "__main__":
    main()
