"""Many steps instead of one: what a base draws and what it makes of damaged photographs, to look at or distil from.

    python -m tsdsr.training.sampling BASE -o samples.png
    python -m tsdsr.training.sampling BASE -o restored.png --photographs FOLDER --strength 0.3 0.5 0.7

In the scale of `objectives.noise` the probability-flow ODE of both families is dz = v(z, sigma) dsigma. One step of
Euler's method along it is one of diffusers' `FlowMatchEulerDiscreteScheduler` or, of a DDPM, of its `DDIMScheduler`
(DDIM, arXiv 2010.02502, equation 12 without noise).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from tqdm.auto import tqdm

from ..evaluation.sets import eight_bit
from ..imaging import SUPPORTED_OUTPUT_SUFFIXES, LabelledPicture, draw_rows, find_images, write
from ..pipelines.loading import choose_device
from .base import Base, load_base, load_teacher, prompts_of, sides
from .config import ConfigError, DistillConfig, Phase
from .draws import SAMPLING, draws
from .families import guided_velocity
from .networks import TEACHER, Networks, SharedBase
from .objectives import add_noise, noise_levels
from .objectives.noise import Velocity
from .validation import Pair, bicubic, crop_centre, psnr_y, validation_pairs

SAMPLERS = ("euler", "heun")
STEPS, SAMPLER, STRENGTHS = 28, "heun", (0.3, 0.5, 0.7)
# Samples in one row of a sheet.
COLUMNS = 4


def trajectory(scheduler: Any, steps: int, strength: float = 1.0) -> Tensor:
    """Noise levels from `strength` down to 0, evenly spaced over the training schedule.

    The last but one is the schedule's lowest: the step to 0 ends at a mean, which blurs the less the shorter it is.

    Args:
        scheduler: of the base; its training schedule is indexed.
        steps: N; fewer are made where the schedule has fewer levels below `strength`.
        strength: sigma of the first level, 0..1, rounded to a level of the schedule. Not the share of the steps that
            diffusers' image-to-image pipelines mean by it, which is another level for every schedule.

    Returns:
        (N + 1,), falling; float32, the last 0. (1,) for strength 0.

    Raises:
        ValueError: if `steps` is under 1, or `strength` not within 0..1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be within 0..1, not {strength:g}.")
    levels = torch.cat([noise_levels(scheduler), torch.zeros(1)])
    last = len(levels) - 1
    start = int((levels - strength).abs().argmin())
    if start == last:
        return levels[last:]
    indices = torch.linspace(start, last - 1, steps, dtype=torch.float64).round().long()
    return levels[[*indices.unique_consecutive().tolist(), last]]


@torch.no_grad()
def integrate(velocity: Velocity, latents: Tensor, levels: Tensor, sampler: str = SAMPLER) -> Tensor:
    """Follow dz = v(z, sigma) dsigma along `levels`.

    Args:
        velocity: of the network, guidance inside.
        latents: z at the first level, (B, C, h, w).
        levels: (N + 1,), falling.
        sampler: "euler", one call of the network a step; or "heun", two and an error of second order (EDM,
            arXiv 2206.00364, algorithm 1). The step to 0 is Euler's in both: there is no score at 0.

    Returns:
        z at the last level, (B, C, h, w); float32.

    Raises:
        ValueError: for another sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}.")

    def slope(z: Tensor, sigma: float) -> Tensor:
        return velocity(z, torch.full((len(z),), sigma, device=z.device)).float()

    z = latents.float()
    for sigma, following in pairwise(levels.tolist()):
        step, first = following - sigma, slope(z, sigma)
        ahead = z + step * first
        if sampler == "heun" and following > 0:
            ahead = z + step * (first + slope(ahead, following)) / 2
        z = ahead
    return z


def sample(
    velocity: Velocity,
    scheduler: Any,
    noise: Tensor,
    steps: int = STEPS,
    sampler: str = SAMPLER,
    latents: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Clean latents z_0 from noise, or from latents that are noised to `strength` first (SDEdit, arXiv 2108.01073).

    Args:
        velocity: of the network, guidance inside.
        scheduler: of the base.
        noise: standard normal, (B, C, h, w). All of the draw: the same noise gives the same latents.
        steps: as `trajectory` has it.
        sampler: as `integrate` has it.
        latents: what to begin with, (B, C, h, w); None for noise alone.
        strength: how much of them is replaced, 0..1: sigma. 0 gives them back, 1 ignores them.

    Returns:
        (B, C, h, w); float32.

    Raises:
        ValueError: if an argument cannot be used.
    """
    if latents is None and strength != 1:
        raise ValueError(f"A strength of {strength:g} needs latents to begin with.")
    levels = trajectory(scheduler, steps, strength)
    first = levels[0]
    if latents is None or strength == 1:
        # As in a DDPM's own scale, whose most noisy latents are taken to be of variance 1, like clean ones.
        start = noise.float() * (first.square() + (1 - first).square()).sqrt().to(noise.device)
    else:
        start = add_noise(latents.float(), noise.float(), first.expand(len(noise)))
    return integrate(velocity, start, levels, sampler)


@torch.no_grad()
def restore_latents(
    velocity: Velocity,
    scheduler: Any,
    lq_latents: Tensor,
    generator: torch.Generator,
    steps: int = STEPS,
    sampler: str = SAMPLER,
    strength: float = 1.0,
) -> Tensor:
    """What a teacher makes of LQ latents in many steps: TAD-SR's target z* (arXiv 2408.07476).

    Args:
        velocity: of the teacher, guidance inside, and whatever else it reads.
        scheduler: of the base.
        lq_latents: (B, C, h, w).
        generator: CPU generator of the noise.
        steps, sampler: as `sample` has them.
        strength: sigma to begin at. 1 is noise alone, for teachers that read the LQ picture beside it; a teacher by
            residual shifting begins at its schedule's first level, near 1; any other restores from less (SDEdit).

    Returns:
        (B, C, h, w); float32.
    """
    noise = torch.randn(lq_latents.shape, generator=generator).to(lq_latents.device)
    return sample(velocity, scheduler, noise, steps, sampler, lq_latents, strength)


@dataclass
class Teacher:
    """What of a base many steps need.

    Attributes:
        given: the velocity callable of its network, guidance inside, for latents of LQ pictures or, where it reads
            none, for None.
        reads_lq: whether it reads them.
        scheduler: its training schedule.
        encode: pictures (B, 3, H, W) in -1..1 -> latents (B, C, h, w).
        decode: latents -> pictures, about -1..1.
        channels: C.
        latent_side: H / h, pixels.
        multiple: sides of pictures have to be multiples of this, pixels.
        longest: the longest side of a picture, pixels; None for any.
        device: where the networks are.
    """

    given: Callable[[Tensor | None], Velocity]
    scheduler: Any
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    channels: int
    latent_side: int
    multiple: int
    longest: int | None
    device: torch.device
    reads_lq: bool = False

    @classmethod
    def of(cls, base: Base, shift: float, device: torch.device, guidance_scale: float = 1.0) -> "Teacher":
        """A base and, where `load_teacher` gave it one, its teacher's LoRA; its networks are moved to the device.

        Args:
            base: its weights are frozen.
            shift: the VAE's shift factor, or 0 where latents are used without it.
            device: where it runs, in float32.
            guidance_scale: w of classifier-free guidance; 1 runs the prompt alone.
        """
        networks = Networks(base.family, SharedBase(base.denoiser, {}), SharedBase(base.vae, {}), shift)
        networks.to(device, torch.float32).eval()
        prompt, null, _ = prompts_of(base, device, torch.float32)

        def given(lq_latents: Tensor | None) -> Velocity:
            known = prompt if lq_latents is None or not base.family.conditioned else (*prompt, lq_latents)

            def velocity(z: Tensor, sigma: Tensor) -> Tensor:
                with networks.denoiser.role(TEACHER) as network:
                    return guided_velocity(base.family, network, known, null, guidance_scale)(z, sigma)

            return velocity

        latent_side, multiple = sides(base.family, base.denoiser, base.vae)
        patches = base.denoiser.config.get("pos_embed_max_size")
        return cls(
            given=given,
            scheduler=base.family.scheduler,
            encode=networks.hq_latents,
            decode=networks.decode,
            channels=base.vae.config.latent_channels,
            latent_side=latent_side,
            multiple=multiple,
            longest=patches * multiple if patches else None,
            device=device,
            reads_lq=base.family.conditioned,
        )


@torch.no_grad()
def draw(
    teacher: Teacher, size: tuple[int, int], generator: torch.Generator, steps: int = STEPS, sampler: str = SAMPLER
) -> Tensor:
    """One picture (1, 3, H, W) in 0..1 from noise; `size` is (H, W), multiples of `teacher.multiple`."""
    height, width = (side // teacher.latent_side for side in size)
    noise = torch.randn(1, teacher.channels, height, width, generator=generator).to(teacher.device)
    latents = sample(teacher.given(None), teacher.scheduler, noise, steps, sampler)
    return (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def restore(
    teacher: Teacher,
    pictures: Tensor,
    strength: float,
    generator: torch.Generator,
    steps: int = STEPS,
    sampler: str = SAMPLER,
) -> Tensor:
    """What a teacher makes of damaged pictures: encoded, noised to `strength`, integrated down, decoded (SDEdit).

    Args:
        teacher: of which only the prior is used; nothing has taught it how pictures are damaged.
        pictures: (B, 3, H, W) in 0..1, enlarged to the size of the result; multiples of `teacher.multiple`.
        strength: sigma, 0..1. 0 is the autoencoder alone, 1 a sample that knows nothing of the pictures.
        generator: CPU generator of the noise.
        steps, sampler: as `sample` has them.

    Returns:
        (B, 3, H, W) in 0..1; float32, on the teacher's device.
    """
    latents = teacher.encode(pictures.to(teacher.device) * 2 - 1)
    velocity = teacher.given(latents)
    latents = restore_latents(velocity, teacher.scheduler, latents, generator, steps, sampler, strength)
    return (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)


def sample_rows(
    teacher: Teacher, count: int, size: int, seed: int, steps: int = STEPS, sampler: str = SAMPLER
) -> list[list[LabelledPicture]]:
    """Rows of `draw_rows`: samples of `size` x `size` pixels. The n-th one depends on seed and n alone."""
    cells = []
    for index in tqdm(range(count), desc="samples", disable=None):
        picture = draw(teacher, (size, size), draws(seed, SAMPLING, index), steps, sampler)
        cells.append(LabelledPicture(f"sample {index + 1}", "", _array(picture)))
    return [cells[begin : begin + COLUMNS] for begin in range(0, count, COLUMNS)]


def restoration_rows(
    teacher: Teacher,
    pairs: Sequence[Pair],
    strengths: Sequence[float],
    seed: int,
    size: int | None = None,
    steps: int = STEPS,
    sampler: str = SAMPLER,
) -> list[list[LabelledPicture]]:
    """Rows of `draw_rows`, one a photograph: HQ, LQ (bicubic), its restoration at each strength, from the same noise.

    Args:
        pairs: of `validation_pairs`. Their centres are used: multiples of what the teacher takes, at most `size`.
        strengths: sigmas, 0..1.
        seed: of the noise.
        size: pixels a side.

    Raises:
        ConfigError: if a photograph is smaller than the teacher takes.
    """
    rows = []
    for index, (name, lq, hq) in enumerate(tqdm(pairs, desc="restorations", disable=None)):
        limit = min(side for side in (size, teacher.longest, max(hq.shape[-2:])) if side)
        enlarged = bicubic(lq, (hq.shape[-2], hq.shape[-1]))
        hq, enlarged = (crop_centre(whole[0], limit, teacher.multiple)[None] for whole in (hq, enlarged))
        if not hq.numel():
            raise ConfigError(f"{name} is smaller than {teacher.multiple} pixels a side, which the base needs.")
        shown = {"LQ, bicubic": enlarged}
        for strength in strengths:
            generator = draws(seed, SAMPLING, index)
            shown[f"strength {strength:g}"] = restore(teacher, enlarged, strength, generator, steps, sampler)
        row = [LabelledPicture("HQ", name, _array(hq))]
        for label, picture in shown.items():
            written = eight_bit(picture.cpu())
            row.append(LabelledPicture(label, f"PSNR-Y {psnr_y(written, hq):.2f} dB", _array(written)))
        rows.append(row)
    return rows


def _array(picture: Tensor) -> np.ndarray:
    return picture[0].permute(1, 2, 0).cpu().numpy()


def make_sheet(options: argparse.Namespace) -> str:
    """The command: draws or restores, writes the sheet. Returns a sentence on what was done.

    Raises:
        ConfigError: for what cannot be used.
        OSError: if the sheet cannot be written.
    """
    output = Path(options.output)
    _check(options, output)
    config = DistillConfig(
        pretrained_model_name_or_path=options.base,
        train_data_dir=options.photographs or ".",  # nothing is trained on
        vae_encoder="frozen",
        output="merged",  # neither is a student written
        resolution=options.resolution,
        scale=options.scale,
        seed=options.seed,
        prompt=options.prompt,
        prompt_embeds=options.prompt_embeds,
        null_prompt_embeds=options.null_prompt_embeds,
        max_train_steps=1,
        phases=[Phase(guidance_scale=options.guidance_scale)],
    )
    try:
        device = choose_device(options.device)
        paths = find_images(Path(options.photographs)) if options.photographs else []
        shown = min(options.count, len(paths))
        paths = [paths[index * len(paths) // shown] for index in range(shown)]  # spread over the folder
        pairs = validation_pairs(paths, None, options.resolution, options.scale, options.seed)
    except (ValueError, NotADirectoryError) as error:
        raise ConfigError(str(error)) from error
    if options.photographs and not pairs:
        raise ConfigError(f"{options.photographs} holds no pictures.")
    base = load_base(config, options.base)
    if options.teacher_lora:
        load_teacher(base, options.teacher_lora)
    # A pipeline's folder says whether its latents are shifted; other bases do as their own pipelines do.
    shifted = DiffusionPipeline.load_config(options.base).get("use_shift_factor", True)
    shift = (getattr(base.vae.config, "shift_factor", None) or 0.0) if shifted else 0.0
    teacher = Teacher.of(base, shift, device, options.guidance_scale)
    if teacher.longest and options.resolution > teacher.longest:
        raise ConfigError(f"resolution must be at most {teacher.longest} for {options.base}, not {options.resolution}.")

    if teacher.reads_lq and not pairs:
        raise ConfigError(f"{options.base} restores LQ pictures and draws none of its own: name some (--photographs).")
    how = {"seed": options.seed, "steps": options.steps, "sampler": options.sampler}
    if pairs:
        rows = restoration_rows(teacher, pairs, options.strength, **how)
    else:
        rows = sample_rows(teacher, options.count, options.resolution, **how)
    said = f"{options.steps} steps of {options.sampler}, guidance {options.guidance_scale:g}, seed {options.seed}"
    title = f"{'/'.join(Path(options.base).parts[-2:])}: {said}"
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(draw_rows(title, rows), output)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return f"wrote {output}: {f'{len(pairs)} photographs' if pairs else f'{options.count} samples'}, {said}"


def _check(options: argparse.Namespace, output: Path) -> None:
    if output.suffix.lower() not in SUPPORTED_OUTPUT_SUFFIXES:
        raise ConfigError(
            f"{output} cannot be written: name a file whose suffix is one of {', '.join(SUPPORTED_OUTPUT_SUFFIXES)}."
        )
    if output.exists() and not options.overwrite:
        raise ConfigError(f"{output} exists: choose another name, or replace it (--overwrite).")
    for name in ("count", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(options, name)}.")
    for strength in options.strength:
        if not 0 <= strength <= 1:
            raise ConfigError(f"strength must be within 0..1, not {strength:g}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tsdsr.training.sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("base", help="diffusers folder or Hub id of a base (SD3, SD2), or a pipeline folder")
    add("-o", "--output", required=True, help="the sheet")
    add("--photographs", metavar="FOLDER", help="sharp photographs that are damaged, then restored; else: samples")
    add("--count", type=int, default=8, help="of photographs or samples (default: %(default)s)")
    add("--resolution", "--size", type=int, default=256, help="side of the pictures, pixels (default: %(default)s)")
    add("--scale", type=int, default=4, help="how much smaller the damaged pictures are (default: %(default)s)")
    add("--steps", type=int, default=STEPS, help="steps of the sampler (default: %(default)s)")
    add("--sampler", choices=SAMPLERS, default=SAMPLER, help="heun calls the network twice a step (default: heun)")
    add(
        "--strength",
        type=float,
        nargs="+",
        default=list(STRENGTHS),
        help="noise levels sigma to restore from: 0 keeps the photograph, 1 ignores it (default: 0.3 0.5 0.7)",
    )
    add("--seed", type=int, default=0, help="of noise and damage (default: %(default)s)")
    add("--guidance_scale", type=float, default=1.0, help="classifier-free guidance (default: 1, the prompt alone)")
    add("--prompt", help="text of the prompt; needs the base's text encoders")
    add("--prompt_embeds", metavar="FOLDER", help="with prompt_embeds and pool_embeds, .pt or .safetensors")
    add("--null_prompt_embeds", metavar="FOLDER", help="the same for the empty prompt of guidance")
    add("--teacher_lora", metavar="FILE", help="LoRA that makes the base a better teacher, a safetensors file")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the sheet if it exists")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 2 for what it was told wrongly, with 1 for what went wrong."""
    options = _parser().parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        print(make_sheet(options))
    except (ConfigError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
