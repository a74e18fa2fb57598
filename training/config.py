"""Everything a distillation run can be told: flags with diffusers' names, or the keys of a recipe (YAML)."""

import argparse
import copy
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .methods import METHODS, SET
from .objectives.tad import JUDGED_SHARE, LOWEST_SHARE, NOISES
from .objectives.tsd import STEP_WEIGHTS

RECIPES = Path(__file__).parent / "recipes"
# Settings that must be at least 1, and those that must not be negative.
COUNTS = (
    "rank",
    "fake_score_rank",
    "vae_rank",
    "resolution",
    "scale",
    "grid_period",
    "train_batch_size",
    "gradient_accumulation_steps",
    "fake_score_updates",
    "discriminator_width",
    "discriminator_layers",
    "discriminator_scales",
    "latent_discriminator_depths",
    "latent_discriminator_votes",
    "teacher_steps",
    "lr_num_cycles",
    "checkpointing_steps",
    "logging_steps",
)
NOT_NEGATIVE = (
    "grain",
    "degrid",
    "discriminator_shift",
    "latent_discriminator_width",
    "mild_degradation",
    "keep_photographs_gb",
    "dataloader_num_workers",
    "validation_photographs",
    "max_validation_images",
    "seed",
    "max_train_steps",
    "learning_rate",
    "fake_score_learning_rate",
    "discriminator_learning_rate",
    "r1_weight",
    "lr_warmup_steps",
    "adam_epsilon",
    "adam_weight_decay",
    "validation_steps",
)
# Why settings that are "full" leave no LoRA.
NO_LORA = {"train_type": "has no LoRA to write", "vae_decoder": "trains weights that a LoRA cannot hold"}


class ConfigError(ValueError):
    """One sentence on what in a recipe or on the command line cannot be used."""


def reason(error: BaseException) -> str:
    """The first line of an error's message, for a sentence that names it; its kind if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def setting(default: Any, text: str, **more: Any) -> Any:
    """A field with its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **more})
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Phase:
    """One stretch of training and its losses.

    A weight is one number, or two: then it goes in a straight line from the first to the second over the phase. 0
    leaves the term out. What a method sets (`METHODS`) is put in by `parse`.
    """

    name: str = setting("train", "name of the phase in logs")
    steps: int = setting(0, "optimiser steps of the phase; 0: what is left of max_train_steps")
    objective: str = setting("tsd", "method whose settings are the defaults of the phase: tsd, vsd or tad")
    latent_mse: list[float] = setting([1.0], "weight of the squared error of latents (equation 7)")
    teacher_mse: list[float] = setting([0.0], "the same against what the teacher makes of the LQ picture (TAD-SR)")
    pixel_l1: list[float] = setting([0.0], "weight of the absolute error of pixels")
    gradient_l1: list[float] = setting([0.0], "weight of the absolute error of finite differences")
    frequency_l1: list[float] = setting([0.0], "weight of the absolute error of Fourier transforms")
    grid_l1: list[float] = setting([0.0], "weight of what all patches of the network have in common, beside colour")
    encoder_features: list[float] = setting([0.0], "weight of the distance in a frozen VAE encoder's features")
    lpips: list[float] = setting([0.0], "weight of LPIPS (equation 7); needs pyiqa and its weights")
    adversarial: list[float] = setting([0.0], "weight of what a discriminator says of the student's pictures")
    feature_matching: list[float] = setting([0.0], "weight of the absolute error of the discriminator's features")
    tsd: list[float] = setting([1.0], "weight of target score distillation (equation 8)")
    vsd_weight: float = setting(0.7, "lambda of equation 5: 1 is VSD alone, 0 TSM alone")
    dasm_steps: int = setting(4, "points on the trajectory (equation 6); 1 is without DASM")
    dasm_spacing: int = setting(50, "schedule indices between two points")
    dasm_jitter: bool = setting(True, "vary the length of the trajectory")
    step_weights: list[float] = setting(list(STEP_WEIGHTS), "weight of each point")
    guidance_scale: float = setting(7.5, "classifier-free guidance of teacher and fake score")
    hsd: list[float] = setting([0.0], "weight of high-frequency score distillation (TAD-SR)")
    hsd_target: str = setting("teacher", "what it leads to: teacher, hq, or none (SDS)")
    hsd_share: float = setting(LOWEST_SHARE, "the least noisy part of the schedule it looks at; 1 is all of it")
    hsd_noise: str = setting("gaussian", "gaussian, or uniform as the released code draws it")
    latent_adversarial: list[float] = setting([0.0], "weight of what a discriminator says of the student's latents")
    judged_real: str = setting("hq", "what is real to it: latents of the photograph (hq), or what the teacher makes")
    judged_share: float = setting(JUDGED_SHARE, "the least noisy part of the schedule it judges at")
    judged_noise: str = setting("gaussian", "gaussian, or uniform as the released code draws it")

    ADVERSARIAL = ("adversarial", "feature_matching")  # terms of a discriminator of pictures
    PICTURES = ("pixel_l1", "gradient_l1", "frequency_l1", "grid_l1", "encoder_features", "lpips", *ADVERSARIAL)
    WEIGHTS = ("latent_mse", "teacher_mse", *PICTURES, "tsd", "hsd", "latent_adversarial")
    # Who learns beside the student, and from which terms on: without them there is no such network.
    FOLLOWERS = {
        "fake_score": ("tsd",),
        "discriminator": ADVERSARIAL,
        "latent_discriminator": ("latent_adversarial",),
    }

    def weights(self, progress: float) -> dict[str, float]:
        """The terms that count and their weights, `progress` 0..1 through the phase."""
        found = {}
        for name in self.WEIGHTS:
            values = getattr(self, name)
            value = values[0] + (values[-1] - values[0]) * progress
            if any(values):
                found[name] = value
        return found

    def uses(self, *terms: str) -> bool:
        """Whether one of these terms counts anywhere in the phase."""
        return any(any(getattr(self, term)) for term in terms)

    def restores(self) -> bool:
        """Whether the teacher has to restore the LQ pictures, in many steps."""
        return (
            self.uses("teacher_mse")
            or (self.uses("hsd") and self.hsd_target == "teacher")
            or (self.uses("latent_adversarial") and self.judged_real == "teacher")
        )


@dataclass
class DistillConfig:
    """A run: where things come from, what is trained and how, and what is written."""

    # The base
    pretrained_model_name_or_path: str | None = setting(None, "diffusers folder or Hub id of the base (SD3, SD2)")
    revision: str | None = setting(None, "branch, tag or commit of the base on the Hub")
    variant: str | None = setting(None, "variant of the base's weight files, such as fp16")
    pretrain: dict | None = setting(None, "train a base first: the settings of training/pretrain.py (recipes only)")
    teacher_lora: str | None = setting(None, "LoRA that makes the base a better teacher, a safetensors file")
    initial_student: str | None = setting(
        None, "pipeline of an earlier run that the student begins as (train_type full)"
    )
    timestep: float | None = setting(
        None, "the student's one timestep; by default its initial_student's, or 1000 (SD3), 999 (SD2)"
    )
    use_shift_factor: bool = setting(False, "latents are (z - shift_factor) * scaling_factor; TSD-SR leaves it out")
    grain: float = setting(0.0, "that the exported pipeline adds to its results, in levels of 255 (output merged)")
    degrid: float = setting(
        0.0, "most that it takes off a grid of the network's patches, in levels of 255 (output merged)"
    )
    teacher_steps: int = setting(15, "in which the teacher restores LQ pictures, where a term asks for that")
    teacher_sampler: str = setting("euler", "its sampler: euler (DDIM), or heun, which calls the network twice a step")
    teacher_strength: float | None = setting(
        None,
        "noise level sigma it begins at; by default the first for a teacher that reads the LQ picture, 0.5 for others",
    )
    teacher_guidance_scale: float | None = setting(None, "its guidance then; by default guidance_scale")

    # The prompt
    prompt_embeds: str | None = setting(None, "folder with prompt_embeds and pool_embeds, .pt or .safetensors")
    null_prompt_embeds: str | None = setting(None, "the same for the empty prompt of classifier-free guidance")
    prompt: str | None = setting(None, "text of the fixed prompt; needs the base's text encoders")

    # What is trained
    train_type: str = setting("lora", "the student's denoiser: lora, or full for all of its weights")
    vae_encoder: str = setting("lora", "the student's VAE encoder: lora, full or frozen")
    vae_decoder: str = setting("frozen", "the student's VAE decoder: full or frozen")
    rank: int = setting(64, "LoRA rank of the student")
    fake_score_rank: int = setting(64, "LoRA rank of the fake-score model")
    vae_rank: int = setting(64, "LoRA rank of the VAE encoder")
    discriminator_kind: str = setting(
        "patch", "of pictures: patch, multiscale, or dino, which looks through a frozen vision transformer"
    )
    discriminator_scales: int = setting(3, "sizes of a picture that multiscale looks at, each half the one before")
    discriminator_model: str = setting(
        "facebook/dino-vits16", "the vision transformer of dino (ViT, DINOv2): a folder or Hub id"
    )
    discriminator_width: int = setting(32, "channels of the discriminator's first layer")
    discriminator_layers: int = setting(3, "its strided layers: each halves the picture and doubles the channels")
    discriminator_sees_lq: bool = setting(False, "show it the enlarged LQ picture beside each: patch and multiscale")
    discriminator_shift: int = setting(0, "pixels by which what it judges is shifted at most, at random")
    latent_discriminator_depths: int = setting(4, "depths of the teacher that the discriminator of latents looks at")
    latent_discriminator_width: int = setting(0, "channels of its heads; 0: as many as the teacher has there")
    latent_discriminator_votes: int = setting(64, "its logits for each position")
    time_aware: bool = setting(True, "tell the discriminator of latents how noisy they are")

    # Photographs
    train_data_dir: str | None = setting(None, "folder of sharp photographs, or of shards made by `tsdsr prepare`")
    train_lq_dir: str | None = setting(None, "folder of their damaged partners; without it they are degraded here")
    dataset_name: str | None = setting(None, "dataset on the Hugging Face Hub, streamed")
    dataset_config_name: str | None = setting(None, "configuration of that dataset")
    data_files: list[str] = setting([], "parquet or webdataset .tar shards, streamed", nargs="+")
    image_column: str = setting("image", "column of the streamed dataset that holds pictures")
    caption_column: str | None = setting(None, "column that holds captions")
    resolution: int = setting(512, "side of the HQ crops, pixels")
    other_resolutions: dict | None = setting(None, "crops of other sides: {256: [share of batches, pictures in one]}")
    scale: int = setting(4, "how much smaller the LQ pictures are")
    random_flip: bool = setting(True, "mirror and turn the crops at random")
    mild_degradation: float = setting(0.0, "share of the batches that are damaged mildly")
    degrade_on: str = setting("worker", "where photographs are degraded: worker (CPU) or device")
    dataloader_num_workers: int = setting(0, "processes that prepare batches; 0: none but the trainer")
    keep_photographs_gb: float = setting(0.0, "keep decoded photographs in memory, so many GB for each reading process")
    validation_photographs: int = setting(0, "how many photographs of train_data_dir are held aside")
    validation_dir: str | None = setting(None, "folder of sharp photographs to validate on, instead")
    validation_lq_dir: str | None = setting(None, "folder of their damaged partners")
    validation_size: int = setting(512, "side of the centre of a validation photograph that is used, pixels")
    max_validation_images: int = setting(16, "how many of them are used during training")

    # Optimisation
    seed: int = setting(0, "of everything that is drawn")
    max_train_steps: int = setting(0, "optimiser steps of the student; 0: those of the phases")
    train_batch_size: int = setting(2, "pictures in a micro-batch, for each process")
    gradient_accumulation_steps: int = setting(1, "micro-batches for one optimiser step")
    gradient_checkpointing: bool = setting(False, "recompute activations backwards: slower, less memory")
    learning_rate: float = setting(5e-6, "of the student (published: 5e-6)")
    fake_score_learning_rate: float = setting(1e-6, "of the fake-score model (published: 1e-6)")
    fake_score_updates: int = setting(1, "updates of the fake-score model for one of the student")
    discriminator_learning_rate: float = setting(2e-4, "of the discriminators")
    discriminator_beta1: float = setting(0.5, "AdamW of the discriminators, in place of adam_beta1")
    adversarial_loss: str = setting("hinge", "of student and discriminators: hinge or relativistic")
    grid_period: int = setting(16, "pixels of a patch for grid_l1: the VAE's factor times the transformer's patch")
    adversarial_evidence: list[float] = setting(
        [], "two PSNRs of LQ pictures, dB, between which the weight of adversarial terms grows from 0", nargs="+"
    )
    adversarial_balance: bool = setting(
        False, "scale the gradients of adversarial and feature_matching to the size of pixel_l1's"
    )
    r1_weight: float = setting(0.0, "weight of the gradient penalty (R1) of the discriminator of pictures")
    lr_scheduler: str = setting("cosine_with_restarts", "one of diffusers' schedules")
    lr_warmup_steps: int = setting(0, "steps of linear warm-up")
    lr_num_cycles: int = setting(1, "cycles of cosine_with_restarts")
    adam_beta1: float = setting(0.9, "AdamW")
    adam_beta2: float = setting(0.999, "AdamW")
    adam_epsilon: float = setting(1e-8, "AdamW")
    adam_weight_decay: float = setting(1e-4, "AdamW")
    max_grad_norm: float = setting(1.0, "gradients of each network that is trained are clipped to this norm")
    ema_decay: float = setting(0.0, "average the student's weights with this decay; 0: do not")
    mixed_precision: str | None = setting(None, "no, fp16 or bf16; by default what accelerate is configured for")
    torch_compile: bool = setting(False, "compile the blocks of the denoiser")

    # Outputs
    output_dir: str = setting("runs/tsdsr", "checkpoints, log, validation pictures and results")
    output: str = setting("both", "what is written at the end: lora, merged or both")
    output_dtype: str | None = setting(
        None, "fp32, fp16 or bf16, of the merged pipeline; by default what is frozen has"
    )
    checkpointing_steps: int = setting(500, "a checkpoint every so many steps")
    checkpoints_total_limit: int | None = setting(None, "how many are kept; by default all")
    resume_from_checkpoint: str | None = setting(None, "latest, or a checkpoint folder")
    validation_steps: int = setting(500, "validate every so many steps; 0: only at the end")
    validation_metrics: list[str] = setting(["psnr_y", "ssim_y"], "and any metric of pyiqa", nargs="+")
    logging_steps: int = setting(10, "a line in the log every so many steps")
    report_to: str | None = setting(None, "tensorboard, wandb or all")
    tracker_project_name: str = setting("tsdsr", "project name for trackers")
    push_to_hub: bool = setting(False, "upload the result")
    hub_model_id: str | None = setting(None, "owner/name on the Hub; by default the name of output_dir")
    hub_token: str | None = setting(None, "token; by default the one you are logged in with")
    hub_private_repo: bool = setting(False, "make the repository private")

    phases: list[Phase] = field(default_factory=list, metadata={"help": "in recipes: a list of phases"})
    # The recipe's file name, for the model card.
    recipe: str | None = field(default=None, metadata={"help": argparse.SUPPRESS})

    def __post_init__(self) -> None:
        allowed: Collection[str | None]
        for name, allowed in (
            ("train_type", ("lora", "full")),
            ("vae_encoder", ("lora", "full", "frozen")),
            ("vae_decoder", ("full", "frozen")),
            ("adversarial_loss", ("hinge", "relativistic")),
            ("discriminator_kind", ("patch", "multiscale", "dino")),
            ("degrade_on", ("worker", "device")),
            ("teacher_sampler", ("euler", "heun")),
            ("output", ("lora", "merged", "both")),
            ("output_dtype", (None, "fp32", "fp16", "bf16")),
            ("mixed_precision", (None, "no", "fp16", "bf16")),
        ):
            _one_of(self, name, allowed)
        _at_least(1, self, COUNTS)
        _at_least(0, self, NOT_NEGATIVE)
        _at_least(16, self, ("validation_size",))  # the window of SSIM has 11 pixels
        if self.checkpoints_total_limit is not None:
            _at_least(1, self, ("checkpoints_total_limit",))
        for name in ("ema_decay", "adam_beta1", "adam_beta2", "discriminator_beta1"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be from 0 to below 1, not {getattr(self, name)}.")
        if self.max_grad_norm <= 0:
            raise ConfigError(f"max_grad_norm must be above 0, not {self.max_grad_norm}.")
        if self.teacher_strength is not None and not 0 < self.teacher_strength <= 1:
            raise ConfigError(f"teacher_strength must be above 0 and at most 1, not {self.teacher_strength}.")
        if self.discriminator_sees_lq and self.discriminator_kind == "dino":
            raise ConfigError("discriminator_sees_lq is for discriminator_kind patch and multiscale, not dino.")
        bounds = self.adversarial_evidence
        if bounds and (len(bounds) != 2 or bounds[0] >= bounds[1]):
            raise ConfigError(f"adversarial_evidence must be two numbers, the lower first, not {bounds}.")
        if self.mild_degradation > 1:
            raise ConfigError(f"mild_degradation must be from 0 to 1, not {self.mild_degradation}.")
        if self.resolution % self.scale:
            raise ConfigError(f"resolution ({self.resolution}) must be a multiple of scale ({self.scale}).")
        for name, why in NO_LORA.items():
            if self.output != "merged" and getattr(self, name) == "full":
                if self.output == "lora":
                    raise ConfigError(f"{name} full {why}: use output merged.")
                self.output = "merged"
        sources = [name for name in ("train_data_dir", "dataset_name", "data_files") if getattr(self, name)]
        if len(sources) != 1:
            raise ConfigError(
                "Name the photographs by exactly one of train_data_dir, dataset_name and data_files"
                + (f", not by {' and '.join(sources)}." if sources else ".")
            )
        if self.initial_student and self.train_type != "full":
            raise ConfigError("initial_student is a whole network, not a LoRA: set train_type full, or leave it out.")
        if self.initial_student and self.vae_encoder == "lora":
            raise ConfigError("initial_student has an encoder of its own: set vae_encoder to full or frozen.")
        if self.train_lq_dir and not self.train_data_dir:
            raise ConfigError("train_lq_dir holds partners of the photographs in train_data_dir: name that as well.")
        if self.validation_lq_dir and not self.validation_dir:
            raise ConfigError("validation_lq_dir holds partners of those in validation_dir: name that as well.")
        if self.prompt and self.prompt_embeds:
            raise ConfigError("Give the fixed prompt as text (prompt) or as embeddings (prompt_embeds), not as both.")
        if bool(self.pretrained_model_name_or_path) == bool(self.pretrain):
            raise ConfigError(
                "Name a base (pretrained_model_name_or_path) or have one trained (pretrain)"
                + (", not both." if self.pretrain else ".")
            )
        if self.pretrain and not self.null_prompt_embeds and self.guided():
            raise ConfigError(
                "A base that is trained here (pretrain) has no empty prompt for guidance: set guidance_scale 1."
            )
        for phase in self.phases:
            _at_least(0, phase, ("steps",))
            _at_least(1, phase, ("dasm_steps", "dasm_spacing"))
            for name, allowed in (
                ("objective", METHODS),
                ("hsd_target", ("teacher", "hq", "none")),
                ("hsd_noise", NOISES),
                ("judged_real", ("hq", "teacher")),
                ("judged_noise", NOISES),
            ):
                _one_of(phase, name, allowed)
            for name in ("hsd_share", "judged_share"):
                if not 0 < getattr(phase, name) <= 1:
                    raise ConfigError(f"{name} must be above 0 and at most 1, not {getattr(phase, name)}.")
        open_ended = [phase.name for phase in self.phases if not phase.steps]
        if not self.max_train_steps:
            if open_ended:
                raise ConfigError(f"Phase {open_ended[0]!r} has no steps, and max_train_steps is not given.")
            self.max_train_steps = sum(phase.steps for phase in self.phases)
        if any(not phase.steps for phase in self.phases[:-1]):
            raise ConfigError(f"Phase {open_ended[0]!r} has no steps, which only the last phase may leave out.")
        for phase in self.phases:
            for name in phase.WEIGHTS:
                values = getattr(phase, name)
                if len(values) not in (1, 2):
                    raise ConfigError(f"{name} takes one weight, or two to go from one to the other.")
                if min(values) < 0:
                    raise ConfigError(f"{name} must not have a negative weight ({min(values)}).")
            if phase.uses("tsd") and len(phase.step_weights) < phase.dasm_steps:
                raise ConfigError(
                    f"step_weights must hold {phase.dasm_steps} weights, one for each point (dasm_steps), "
                    f"not {len(phase.step_weights)}."
                )
            if not any(phase.uses(name) for name in phase.WEIGHTS):
                raise ConfigError(f"Phase {phase.name!r} has no loss: give one of its terms a weight.")
        if self.vae_decoder == "full" and not self.uses(*Phase.PICTURES):
            names = ", ".join(Phase.PICTURES)
            raise ConfigError(f"vae_decoder full needs a term that looks at pictures: give one of {names} a weight.")
        if self.uses(*Phase.ADVERSARIAL):
            self.check_judged(self.resolution)
        if self.uses("grid_l1") and self.resolution < self.grid_period:
            raise ConfigError(f"grid_l1 needs crops of at least {self.grid_period} pixels (grid_period).")

    def phase_at(self, step: int) -> tuple[Phase, float]:
        """The phase of step `step` (from 0) and how far through it that is, 0..1; the last phase never ends."""
        begin = 0
        for index, phase in enumerate(self.phases):
            last = index == len(self.phases) - 1
            length = phase.steps or max(1, self.max_train_steps - begin)
            if step < begin + length or last:
                return phase, min(1.0, (step - begin) / max(1, length - 1))
            begin += length
        raise AssertionError("a run has phases")

    def uses(self, *terms: str) -> bool:
        """Whether one of these terms counts in any phase."""
        return any(phase.uses(*terms) for phase in self.phases)

    def steps_using(self, *terms: str) -> int:
        """How many steps belong to phases in which one of these terms counts."""
        return sum(self.phase_at(step)[0].uses(*terms) for step in range(self.max_train_steps))

    def check_judged(self, resolution: int) -> None:
        """Raises a `ConfigError` for crops that are too small for the discriminator."""
        if self.discriminator_kind == "dino":  # its transformer knows how large a patch is
            return
        sizes = self.discriminator_scales if self.discriminator_kind == "multiscale" else 1
        least = 2 ** (self.discriminator_layers + sizes - 1) + self.discriminator_shift
        if resolution < least:
            raise ConfigError(
                f"A discriminator with {self.discriminator_layers} strided layers (discriminator_layers)"
                + (f" at {sizes} sizes (discriminator_scales)" if sizes > 1 else "")
                + (
                    f", shifted by {self.discriminator_shift} (discriminator_shift),"
                    if self.discriminator_shift
                    else ""
                )
                + f" needs crops of at least {least} pixels, not {resolution}."
            )

    def guided(self) -> bool:
        """Whether any phase needs the empty prompt: it guides teacher and fake score."""
        return any(
            (phase.uses("tsd", "hsd") and phase.guidance_scale != 1)
            or (phase.restores() and self.restoring_guidance(phase) != 1)
            for phase in self.phases
        )

    def restoring_guidance(self, phase: Phase) -> float:
        """Classifier-free guidance of a teacher that restores LQ pictures."""
        return phase.guidance_scale if self.teacher_guidance_scale is None else self.teacher_guidance_scale

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as a recipe would say it; without secrets."""
        values = {}
        for item in fields(self):
            default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[operator]
            value = getattr(self, item.name)
            if value != default and item.name not in ("hub_token", "recipe", "phases"):
                values[item.name] = value
        values["phases"] = [asdict(phase) for phase in self.phases]
        return values


def _one_of(settings: Any, name: str, allowed: Collection[str | None]) -> None:
    if getattr(settings, name) not in allowed:
        names = ", ".join(value for value in allowed if value)
        raise ConfigError(f"{name} must be one of {names}, not {getattr(settings, name)!r}.")


def _at_least(least: int, settings: Any, names: Sequence[str]) -> None:
    for name in names:
        if getattr(settings, name) < least:
            raise ConfigError(f"{name} must be at least {least}, not {getattr(settings, name)}.")


def parse(arguments: Sequence[str] | None = None, description: str = "") -> DistillConfig:
    """A run from flags and a recipe (`--config FILE`); what is typed wins over the recipe, in all of its phases.

    A recipe that ships with the package is found by its name alone, from everywhere: `--config tiny_cpu`.

    Raises:
        ConfigError: for settings that cannot be used. Unknown flags end the program as argparse does it.
    """
    typed, recipe = _typed(sys.argv[1:] if arguments is None else arguments, description)
    values = _read(Path(recipe)) if recipe else {}
    _check_names(values, _names(DistillConfig) | _names(Phase), f"The recipe {recipe}")
    listed = values.pop("phases", None) or [{}]
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise ConfigError(f"phases in {recipe} must be a list of phases, each with settings and their values.")
    in_all = {name: values.pop(name) for name in list(values) if name in _names(Phase)}
    of_phases = {name: value for name, value in typed.items() if name in _names(Phase)}
    of_run = {name: value for name, value in typed.items() if name not in of_phases}
    phases = []
    for entry in listed:
        _check_names(entry, _names(Phase), f"A phase in {recipe}")
        merged = _with_method({**in_all, **entry}, of_phases)
        for name in Phase.WEIGHTS:
            if name in merged and not isinstance(merged[name], list):
                merged[name] = [merged[name]]
        phases.append(typed_as(Phase, merged))
    if "pretrained_model_name_or_path" in of_run and isinstance(values.get("pretrain"), dict):
        del values["pretrain"]  # the base is there already
    file_name = Path(recipe).with_suffix(".yaml").name if recipe else None
    return typed_as(DistillConfig, {**values, **of_run, "phases": phases, "recipe": file_name})


def _with_method(said: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Settings of a phase as a recipe says them and as they are typed, with those of the method where neither does.

    A method that is typed over a recipe of another one is not mixed with it: what both methods set is the former's.
    """
    begun = said.get("objective", Phase.objective)
    objective = typed.get("objective", begun)
    if not isinstance(objective, str) or objective not in METHODS:
        return {**said, **typed}  # refused with all else
    if objective != begun:
        said = {name: value for name, value in said.items() if name not in SET}
    return {**copy.deepcopy(METHODS[objective].settings), **said, **typed}


def _names(kind: type) -> set[str]:
    return {item.name for item in fields(kind)}


def _check_names(values: dict[Any, Any], known: set[str], where: str) -> None:
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise ConfigError(f"{where} has settings that do not exist: {', '.join(unknown)}.")


def _read(recipe: Path) -> dict[str, Any]:
    shipped = RECIPES / recipe.with_suffix(".yaml").name
    if not recipe.exists() and shipped.is_file():
        recipe = shipped
    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The recipe {recipe} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: {getattr(error, 'problem', None)}" if mark else reason(error)
        raise ConfigError(f"The recipe {recipe} is not YAML ({where}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"The recipe {recipe} must hold settings and their values.")
    return values


def _typed(arguments: Sequence[str], description: str) -> tuple[dict[str, Any], str | None]:
    """The flags that were typed, by name, and the recipe."""
    kinds = [_flags_of(kind) for kind in (DistillConfig, Phase)]
    parser = HfArgumentParser(
        kinds,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --pretrain would be --pretrained_model_name_or_path
    )
    parser.add_argument("--config", help="a recipe: a YAML file with these settings, and phases")
    for item in (item for kind in kinds for item in fields(kind)):
        if item.default is False:  # the parser makes a switch to turn off only of what is on by default
            names = {f"--no_{item.name}", f"--no-{item.name.replace('_', '-')}"}
            parser.add_argument(*sorted(names), action="store_false", dest=item.name, help=argparse.SUPPRESS)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    typed = vars(parser.parse_args(list(arguments)))
    return typed, typed.pop("config", None)


def _flags_of(kind: type) -> type:
    """The dataclass without what only a recipe can say, and without its checks."""
    kept = []
    for item in fields(kind):
        if item.name not in ("phases", "pretrain", "recipe", "name", "steps", "other_resolutions"):
            default = item.default if item.default is not MISSING else item.default_factory
            more = {"default": default} if item.default is not MISSING else {"default_factory": item.default_factory}
            kept.append((item.name, item.type, field(**more, metadata=item.metadata)))
    return make_dataclass(kind.__name__, kept)


def typed_as(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """A dataclass from values of a recipe, checked against its types (YAML reads 1e-5 as a string).

    Raises:
        ConfigError: for a value of another type; `where` says in front of its name where it stands.
    """
    checked = {}
    for item in fields(kind):
        if item.name not in values:
            continue
        value = values[item.name]
        try:
            checked[item.name] = _as_type(value, item.type)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}{item.name} cannot be {value!r}; it is {_readable(item.type)}.") from error
    return kind(**checked)


def _as_type(value: Any, kind: Any) -> Any:
    if value is None and kind in (float | None, int | None, str | None, dict | None):
        return None
    if kind is bool:
        return _instance(value, bool)
    if kind in (int, int | None):
        number = _number(value)
        if not number.is_integer():
            raise ValueError
        return int(number)
    if kind in (float, float | None):
        return _number(value)
    if kind == list[float]:
        return [_number(one) for one in _instance(value, list)]
    if kind == list[str]:
        return [str(one) for one in ([value] if isinstance(value, str) else _instance(value, list))]
    if kind in (str, str | None):
        return _instance(value, str)
    if kind in (dict, dict | None):
        return _instance(value, dict)
    return value


def _instance(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _readable(kind: Any) -> str:
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list[float]: "a list of numbers",
        list[str]: "a list of texts",
        dict: "a section with settings of its own",
    }
    for plain in (int, float, str, dict):
        words[plain | None] = words[plain]
    return words[kind]
