"""The base a student is distilled from: its networks, schedule and prompts, from a diffusers folder or the Hub."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..models.fast_layers import use_fast_layers
from ..models.prompt_embeddings import PromptEmbeddings
from ..pipelines.text import load_text_encoder
from .config import ConfigError, DistillConfig, Phase, reason
from .discriminators import make_discriminator
from .families import Ddpm, Family, Prompt, RectifiedFlow, ResidualShifting
from .networks import FAKE_SCORE, STUDENT, TEACHER, Networks, SharedBase
from .objectives import ResidualShift
from .time_aware import make_latent_discriminator

# The fixed caption of the published weights (train/train.py of the release).
PUBLISHED_PROMPT = (
    "Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera, hyper detailed photo - realistic "
    "maximum detail, 32k, Color Grading, ultra HD, extrememeticulous detailing, skin pore detailing, hyper sharpness, "
    "perfect without deformations."
)
# What is compiled, of SD3's transformers and of SD2's UNets; diffusers' compile_repeated_blocks knows the latter only.
REPEATED_BLOCKS = ("JointTransformerBlock", "BasicTransformerBlock")
# Names of the published files, without .pt or .safetensors.
EMBEDDING_FILES = ("prompt_embeds", "pool_embeds")
# Parts of a VAE that turn latents into pictures.
DECODER = ("decoder", "post_quant_conv")


@dataclass
class Base:
    """What a base folder holds, on the CPU.

    Attributes:
        family: rectified flow or DDPM.
        denoiser: the transformer or UNet.
        vae: its autoencoder.
        prompt: the fixed prompt that the student always reads.
        null_prompt: the empty prompt of classifier-free guidance, if there is one.
    """

    family: Family
    denoiser: Any
    vae: Any
    prompt: PromptEmbeddings
    null_prompt: Prompt | None


def load_base(config: DistillConfig, name: str, null_prompt: Prompt | None = None) -> Base:
    """The base that `name` holds.

    Args:
        config: revision, variant, timestep and prompts are read from it.
        name: diffusers folder (SD3's or SD2's, or a `TSDSRPipeline`'s) or Hub id.
        null_prompt: one that is known already, from prepared photographs.

    Raises:
        ConfigError: if it cannot be found, is of another kind, has no prompt and none is given, or if resolution,
            timestep or prompts do not fit it, or the initial student.
    """
    where = {"revision": config.revision}
    try:
        index = DiffusionPipeline.load_config(name, **where)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base {name} cannot be loaded ({reason(error)}).") from error

    def part(kind: Any, folder: str) -> Any:
        try:
            return kind.from_pretrained(name, subfolder=folder, variant=config.variant, **where)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"{folder} of {name} cannot be loaded ({reason(error)}).") from error

    def schedule_of(kind: Any) -> Any:
        try:
            return kind.from_pretrained(name, subfolder="scheduler", **where)
        except (OSError, ValueError) as error:
            raise ConfigError(f"scheduler of {name} cannot be loaded ({reason(error)}).") from error

    classes = {folder: entry[1] for folder, entry in index.items() if isinstance(entry, list | tuple)}
    timestep = _given(timestep=_timestep(config))
    family: Family
    if classes.get("transformer") == "SD3Transformer2DModel":
        denoiser = part(SD3Transformer2DModel, "transformer")
        schedule = schedule_of(FlowMatchEulerDiscreteScheduler)
        family = RectifiedFlow(schedule, **timestep)
    elif classes.get("unet") == "UNet2DConditionModel":
        denoiser = part(UNet2DConditionModel, "unet")
        residual = classes.get("scheduler") == ResidualShift.__name__
        kind = ResidualShifting if residual else Ddpm
        family = kind(schedule_of(ResidualShift if residual else DDPMScheduler), **timestep)
    else:
        raise ConfigError(
            f"{name} holds neither an SD3 transformer nor an SD2 UNet (its model_index.json names "
            f"{', '.join(sorted(str(kind) for kind in classes.values() if kind))}); name a base of one of the two."
        )
    vae = part(AutoencoderTiny if classes.get("vae") == "AutoencoderTiny" else AutoencoderKL, "vae")
    # As the pipeline of the validation does it: a run computes the same before its first and after.
    use_fast_layers(vae)
    if isinstance(vae, AutoencoderTiny):
        # What convolutions are fastest with; group norms, which other VAEs have, are not.
        vae.to(memory_format=torch.channels_last)
    made, read = vae.config.latent_channels, denoiser.config.in_channels
    family.conditioned = read == 2 * made  # noisy latents, and those of the LQ picture
    _check_fit(config, name, family, denoiser, vae)

    fixed = _embeddings(config.prompt_embeds) if config.prompt_embeds else None
    if config.null_prompt_embeds:
        null_prompt = _embeddings(config.null_prompt_embeds)
    if fixed is None and not config.prompt and classes.get("prompt_embeddings"):
        saved = part(PromptEmbeddings, "prompt_embeddings")
        fixed = (saved.prompt_embeds.detach(), saved.pooled_prompt_embeds.detach())
    if fixed is None or (null_prompt is None and config.guided()):
        try:
            encode = load_text_encoder(name, config.revision, config.variant)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The text encoders of {name} cannot be loaded ({reason(error)}).") from error
        if encode is not None:
            fixed = fixed or encode([config.prompt or PUBLISHED_PROMPT])
            null_prompt = null_prompt or encode([""])
    if fixed is None:
        raise ConfigError(
            f"{name} has no text encoders, so the fixed prompt cannot be made: name a folder with prompt_embeds and "
            "pool_embeds (prompt_embeds), or a base with text encoders."
        )
    if null_prompt is None and config.guided():
        raise ConfigError(
            f"Guidance needs the empty prompt, and {name} has no text encoders to make it: name its embeddings "
            "(null_prompt_embeds), or set guidance_scale 1."
        )
    for what, prompt in (("fixed", fixed), ("empty", null_prompt)):
        if prompt is not None:
            _check_prompt(what, prompt, name, denoiser)
    return Base(family, denoiser, vae, PromptEmbeddings.from_tensors(*fixed), null_prompt)


def _timestep(config: DistillConfig) -> float | None:
    """The student's timestep where one is known: as set, and that of the pipeline that it begins as."""
    if not config.initial_student:
        return config.timestep
    try:
        earlier = DiffusionPipeline.load_config(config.initial_student)
    except (OSError, ValueError):
        return config.timestep  # `load_student` says what is wrong with it
    known = earlier.get("timestep")
    if known is not None and config.timestep not in (None, known):
        raise ConfigError(
            f"timestep is {known:g} in the initial_student {config.initial_student}, not {config.timestep:g}: leave it "
            "out, or begin as the base."
        )
    shifted = earlier.get("use_shift_factor", config.use_shift_factor)
    if shifted != config.use_shift_factor:
        raise ConfigError(
            f"use_shift_factor is {shifted} in the initial_student {config.initial_student}, not "
            f"{config.use_shift_factor}: a student goes on as it began."
        )
    return config.timestep if known is None else known


def _check_fit(config: DistillConfig, name: str, family: Family, denoiser: Any, vae: Any) -> None:
    made, read = vae.config.latent_channels, denoiser.config.in_channels
    if read not in ((2 * made,) if isinstance(family, ResidualShifting) else (made, 2 * made)):
        raise ConfigError(
            f"The {family.component} of {name} reads {read} channels, which are neither those of the {made} of its "
            "VAE's latents nor those and the LQ picture's."
        )
    if family.conditioned and config.output != "merged":
        raise ConfigError(
            f"{name} reads LQ pictures, which no pipeline gives it, so that its student is written as a network of "
            "its own: set output merged."
        )
    length, unet = family.scheduler.config.num_train_timesteps, isinstance(family, Ddpm)
    if not (family.timestep in range(1, length) if unet else 0 < family.timestep <= length):
        allowed = f"a whole number from 1 to {length - 1}" if unet else f"above 0 and at most {length}"
        raise ConfigError(f"timestep must be {allowed} for {name}, not {family.timestep:g}.")
    if config.vae_encoder == "lora" and not hasattr(vae, "add_adapter"):
        raise ConfigError(f"{type(vae).__name__}, the VAE of {name}, takes no LoRA: set vae_encoder to full or frozen.")
    latent, multiple = sides(family, denoiser, vae)
    if config.uses(*Phase.FOLLOWERS["latent_discriminator"]):
        depths = config.latent_discriminator_depths
        stages = min(depths, len(denoiser.config.block_out_channels)) if unet else 0
        # Heads want four positions at least.
        least = 2 * (latent * 2 ** (stages - 1) if unet else multiple)
        smallest = min([config.resolution, *(config.other_resolutions or {})])
        if smallest < least:
            raise ConfigError(
                f"A discriminator of latents at {depths} depths of {name} (latent_discriminator_depths) needs crops "
                f"of at least {least} pixels, not {smallest}."
            )
    for what, found in (("resolution", [config.resolution]), ("other_resolutions", config.other_resolutions or {})):
        for side in found:
            if side % multiple:
                raise ConfigError(f"{what} must be a multiple of {multiple} for {name}, not {side}.")


def sides(family: Family, denoiser: Any, vae: Any) -> tuple[int, int]:
    """Pixels a side of one latent, and of what sides of pictures are multiples of: one patch of a transformer, or one
    pixel of a UNet's middle.
    """
    channels = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
    settings, latent = denoiser.config, 2 ** (len(channels) - 1)
    unet = isinstance(family, Ddpm)
    return latent, latent * (2 ** (len(settings.block_out_channels) - 1) if unet else settings.patch_size)


def _check_prompt(what: str, prompt: Prompt, name: str, denoiser: Any) -> None:
    embeds, pooled = prompt
    settings = denoiser.config
    wanted = settings.get("joint_attention_dim") or settings.get("cross_attention_dim")
    wide = settings.get("pooled_projection_dim")  # a UNet takes no pooled embeddings
    if embeds.ndim != 3 or len(embeds) != 1 or embeds.shape[-1] != wanted:
        raise ConfigError(
            f"The {what} prompt's embeddings must be (1, tokens, {wanted}) for {name}, not {tuple(embeds.shape)}."
        )
    if wide and (pooled is None or tuple(pooled.shape) != (1, wide)):
        raise ConfigError(
            f"The {what} prompt's pooled embeddings must be (1, {wide}) for {name}, not "
            f"{None if pooled is None else tuple(pooled.shape)}."
        )


def prompts_of(
    base: Base, device: torch.device, dtype: torch.dtype
) -> tuple[Prompt, Prompt | None, Callable[[dict[str, Any]], Prompt]]:
    """The fixed prompt, the empty one, and a function from a batch to the prompt of its captions, all on the device.

    Batches without embedded captions get the fixed prompt.
    """

    def moved(embeds: torch.Tensor, pooled: torch.Tensor | None) -> Prompt:
        return embeds.to(device, dtype), None if pooled is None or not pooled.numel() else pooled.to(device, dtype)

    fixed = moved(base.prompt.prompt_embeds.detach(), base.prompt.pooled_prompt_embeds.detach())
    null = None if base.null_prompt is None else moved(*base.null_prompt)

    def captions(batch: dict[str, Any]) -> Prompt:
        if "prompt_embeds" not in batch:
            return fixed
        return moved(batch["prompt_embeds"], batch.get("pooled_prompt_embeds"))

    return fixed, null, captions


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _embeddings(folder: str) -> Prompt:
    """The published pair of files; without pool_embeds for a UNet's prompt."""
    found: list[torch.Tensor | None] = []
    for stem in EMBEDDING_FILES:
        paths = [Path(folder) / f"{stem}{suffix}" for suffix in (".safetensors", ".pt")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            if stem == "prompt_embeds":
                raise ConfigError(f"{folder} holds no prompt_embeds.safetensors and no prompt_embeds.pt.")
            found.append(None)
            continue
        try:
            if path.suffix == ".pt":
                tensor = torch.load(path, map_location="cpu", weights_only=True)
            else:
                tensor = next(iter(load_file(path).values()), None)
        except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path} cannot be read ({reason(error)}).") from error
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{path} holds no tensor.")
        found.append(tensor)
    assert found[0] is not None
    return found[0], found[1]


def build_networks(base: Base, config: DistillConfig, weight_dtype: torch.dtype) -> Networks:
    """The base in its roles, frozen weights in `weight_dtype`, trained ones in float32.

    Raises:
        ConfigError: if the teacher's LoRA does not fit.
    """
    family, shift = base.family, 0.0
    if config.use_shift_factor:
        shift = getattr(base.vae.config, "shift_factor", None) or 0.0
    own_denoiser = own_vae = None
    decoder = DECODER if config.vae_decoder == "full" else ()

    def part_dtype(name: str) -> torch.dtype:
        return torch.float32 if name in decoder else weight_dtype

    # Copied before they are cast, so that what is trained begins at full precision.
    if config.train_type == "full":
        own_denoiser = copy.deepcopy(base.denoiser).float().requires_grad_(True)
    if config.vae_encoder == "full" or config.initial_student:
        own_vae = copy.deepcopy(base.vae).requires_grad_(False)
        for name in DECODER:
            if getattr(base.vae, name, None) is not None:
                setattr(own_vae, name, getattr(base.vae, name))
    if config.initial_student:
        load_student(config.initial_student, {family.component: own_denoiser, "vae": own_vae})
    if config.vae_encoder == "full":
        for _, module in encoder_layers(own_vae):
            module.float().requires_grad_(True)
    elif own_vae is not None:
        for name, part in own_vae.named_children():
            part.to(part_dtype(name))
    base.denoiser.to(weight_dtype)
    for name, part in base.vae.named_children():
        part.to(part_dtype(name))
    base.prompt.to(weight_dtype).requires_grad_(False)

    loras = {}
    if config.uses(*Phase.FOLLOWERS["fake_score"]):
        loras[FAKE_SCORE] = lora_config(config.fake_score_rank, family.fake_score_targets)
    if config.train_type == "lora":
        loras[STUDENT] = lora_config(config.rank, family.student_targets)
    if config.teacher_lora:
        load_teacher(base, config.teacher_lora)
    denoiser = SharedBase(base.denoiser, loras, own_denoiser)
    vae_loras = {}
    if config.vae_encoder == "lora":
        vae_loras[STUDENT] = lora_config(config.vae_rank, tuple(name for name, _ in encoder_layers(base.vae)))
    vae = SharedBase(base.vae, vae_loras, own_vae, decoder)
    discriminator = latent_discriminator = None
    if config.uses(*Phase.FOLLOWERS["discriminator"]):
        discriminator = make_discriminator(config, channels=6 if config.discriminator_sees_lq else 3)
    if config.uses(*Phase.FOLLOWERS["latent_discriminator"]):
        latent_discriminator = make_latent_discriminator(config, family, denoiser)
    networks = Networks(family, denoiser, vae, shift, discriminator, latent_discriminator)
    cast_training_params([networks], dtype=torch.float32)
    if config.gradient_checkpointing:
        for network in (networks.network, networks.student_network, networks.vae, networks.student_vae):
            if network is not None and network._supports_gradient_checkpointing:
                network.enable_gradient_checkpointing()
    if config.torch_compile:
        # A block is compiled anew for each role, with and without gradients, for training's shapes and the pipeline's.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for network in (networks.network, networks.student_network):
            for block in network.modules() if network is not None else ():
                if type(block).__name__ in REPEATED_BLOCKS:
                    block.compile()
    return networks


def load_student(name: str, parts: dict[str, Any]) -> None:
    """Give networks, by their folders' names, the weights of an earlier run's pipeline (or of one like it).

    Raises:
        ConfigError: if it cannot be loaded, or its networks are others.
    """
    for folder, network in parts.items():
        kind = type(network)
        try:
            found = kind.load_config(name, subfolder=folder).get("_class_name")
            weights = kind.from_pretrained(name, subfolder=folder).state_dict() if found == kind.__name__ else {}
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"initial_student: {folder} of {name} cannot be loaded ({reason(error)}).") from error
        shapes = [{key: weight.shape for key, weight in own.items()} for own in (weights, network.state_dict())]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"initial_student: {folder} of {name} is another network ({found}) than the base's ({kind.__name__}), "
                "or of other sizes; name a pipeline that was distilled from this base, not baked."
            )
        network.load_state_dict(weights)


def load_teacher(base: Base, path: str) -> None:
    """Give the base the teacher's LoRA (the published teacher.safetensors: keys `transformer.*`, alpha = rank).

    Raises:
        ConfigError: if the file is not there, or is for another network.
    """
    try:
        weights = load_file(path)
        base.denoiser.load_lora_adapter(weights, prefix=base.family.component, adapter_name=TEACHER)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"teacher_lora {path} cannot be used ({reason(error)}).") from error
    if TEACHER not in (getattr(base.denoiser, "peft_config", None) or {}):
        raise ConfigError(f"teacher_lora {path} cannot be used (it holds no keys {base.family.component}.*).")


def lora_config(rank: int, targets: tuple[str, ...]) -> LoraConfig:
    """A LoRA as the published ones are: alpha = rank, Gaussian A, B = 0."""
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))


def encoder_layers(vae: Any) -> list[tuple[str, nn.Module]]:
    """Convolutions and linear layers of a VAE's encoder, with quant_conv where it exists."""
    return [
        (name, module)
        for name, module in vae.named_modules()
        if (name.startswith("encoder.") or name == "quant_conv") and isinstance(module, nn.Conv2d | nn.Linear)
    ]
