"""Trains the small model that ships in `embedded/`: autoencoder first, then the one-step student.

    accelerate launch -m tsdsr.training.embedded --config training/recipes/embedded_v0.yaml \
        --train_data_dir PHOTOGRAPHS --output_dir runs/embedded_v0

The stages of the recipe run one after the other, each from the weights of the one before; an interrupted run goes on
with `--resume_from_checkpoint latest`.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..models.prompt_embeddings import PromptEmbeddings
from ..pipelines.pipeline_tsdsr import TSDSRPipeline
from .checkpointing import Checkpoints
from .data import DegradedBatches, load_uint8, split_photographs
from .degradation import degrade
from .discriminators import PatchDiscriminator
from .initialisation import start_as_interpolation
from .objectives import frequency_l1, gradient_l1, hinge_discriminator_loss, hinge_student_loss
from .validation import psnr_y


@dataclass
class Stage:
    """One stretch of training. Weights multiply the terms of the same name; 0 leaves a term out."""

    name: str
    kind: str  # "autoencoder": HQ -> HQ;  "student": LQ -> HQ in one step
    steps: int
    learning_rate: float
    # crop side in pixels -> [probability, batch size]; 512 is the tile the pipeline runs at
    sizes: dict[int, tuple[float, int]] = field(default_factory=lambda: {128: (1.0, 8)})
    mild_degradation: float = 0.0  # probability that a batch is damaged mildly
    warmup_steps: int = 100
    final_learning_rate: float = 0.02  # fraction of learning_rate at the end of the cosine
    pixel_l1: float = 1.0
    gradient_l1: float = 0.0
    frequency_l1: float = 0.0
    latent_mse: float = 0.0
    adversarial: float = 0.0
    discriminator_learning_rate: float = 2e-4
    ema_decay: float = 0.998


@dataclass
class Config:
    """What the recipe file holds; `train_data_dir` and `output_dir` come from the command line."""

    vae: dict
    transformer: dict
    prompt_tokens: int
    stages: list[Stage]
    seed: int = 0
    # share of the last stage's weights in the result, the rest are those of the stage before (network interpolation,
    # ESRGAN, Wang et al. 2018, section 3.4)
    last_stage_share: float = 1.0
    validation_photographs: int = 50
    validation_size: int = 256  # centre of the held-aside photographs that is looked at during training, pixels
    checkpointing_steps: int = 300
    logging_steps: int = 25

    @classmethod
    def from_yaml(cls, path: Path) -> "Config":
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = []
        for stage in values.pop("stages"):
            stage["sizes"] = {int(size): (float(p), int(batch)) for size, (p, batch) in stage["sizes"].items()}
            stages.append(Stage(**stage))
        return cls(stages=stages, **values)


class EmbeddedModel(nn.Module):
    """The three trained parts in one module, so that one optimiser, EMA and checkpoint serve all."""

    def __init__(self, config: Config):
        super().__init__()
        self.vae = AutoencoderTiny(**config.vae)
        self.transformer = SD3Transformer2DModel(**config.transformer)
        self.prompt = PromptEmbeddings(
            config.prompt_tokens, config.transformer["joint_attention_dim"], config.transformer["pooled_projection_dim"]
        )
        start_as_interpolation(self.vae)
        nn.init.normal_(self.prompt.prompt_embeds)
        nn.init.normal_(self.prompt.pooled_prompt_embeds)
        # A transformer that starts by predicting v = 0 leaves the autoencoder's result as it is (DiT's adaLN-zero).
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        for name, module in self.transformer.named_modules():
            if name.endswith(".linear") and ".norm1" in name:
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, one_step: bool) -> tuple[Tensor, Tensor]:
        """Latents and pictures for pictures (B, 3, H, W) in -1..1; with `one_step`, z - v instead of z."""
        latents = self.vae.encode(images).latents
        if one_step:
            prompt_embeds, pooled = self.prompt(images.shape[0])
            latents = (
                latents
                - self.transformer(
                    hidden_states=latents,
                    timestep=torch.full((images.shape[0],), 1000.0, device=images.device),
                    encoder_hidden_states=prompt_embeds,
                    pooled_projections=pooled,
                ).sample
            )
        return latents, self.vae.decode(latents).sample


def cosine_schedule(stage: Stage) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to `final_learning_rate`."""

    def factor(step: int) -> float:
        if step < stage.warmup_steps:
            return (step + 1) / stage.warmup_steps
        progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
        low = stage.final_learning_rate
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def upsample(lq: Tensor, scale: int = 4) -> Tensor:
    """Bicubic enlargement to -1..1, as the pipeline does it."""
    return (F.interpolate(lq, scale_factor=scale, mode="bicubic") * 2 - 1).clamp(-1, 1)


@torch.no_grad()
def validate(model: EmbeddedModel, one_step: bool, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """PSNR-Y in dB of the model and of bicubic on the held-aside photographs."""
    model.eval()
    ours, bicubic = [], []
    for lq, hq in pairs:
        source = upsample(lq) if one_step else hq * 2 - 1
        ours.append(psnr_y(model(source, one_step)[1] / 2 + 0.5, hq))
        bicubic.append(psnr_y(upsample(lq) / 2 + 0.5, hq))
    model.train()
    return {"psnr_y": sum(ours) / len(ours), "psnr_y_bicubic": sum(bicubic) / len(bicubic)}


@torch.no_grad()
def blend(model: nn.Module, others: dict[str, Tensor], share: float) -> None:
    """In place: `share` of the model's weights and 1 - `share` of the others."""
    for name, value in model.state_dict().items():
        value.lerp_(others[name], 1 - share)


def save_pipeline(model: EmbeddedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write the model as a pipeline folder for `TSDSRPipeline.from_pretrained`."""
    parts = copy.deepcopy(model).to("cpu", dtype)
    TSDSRPipeline(
        vae=parts.vae,
        transformer=parts.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        prompt_embeddings=parts.prompt,
    ).save_pretrained(folder)
    # AutoencoderTiny saves a value that its own loader then calls unexpected.
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("block_out_channels", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_stage(
    stage: Stage,
    config: Config,
    model: EmbeddedModel,
    images: list[Tensor],
    pairs: list[tuple[Tensor, Tensor]],
    output_dir: Path,
    resume: bool,
) -> None:
    """Run one stage; afterwards `model` holds the averaged (EMA) weights, also saved as `STAGE.safetensors`."""
    # Each stage draws from its own seed: what it does not depend on whether the run was interrupted before it.
    set_seed(config.seed + 1 + config.stages.index(stage))
    accelerator = Accelerator()
    one_step = stage.kind == "student"
    trained = model if one_step else model.vae
    batches = DegradedBatches(images, stage.sizes, stage.steps, config.seed + len(stage.name), stage.mild_degradation)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(stage))
    teacher = copy.deepcopy(model.vae).requires_grad_(False) if stage.latent_mse else None
    network, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    ema = EMAModel(model.parameters(), decay=stage.ema_decay)
    accelerator.register_for_checkpointing(ema)
    discriminator: Any = None
    discriminator_optimizer: Any = None
    if stage.adversarial:
        discriminator = PatchDiscriminator()
        discriminator_optimizer = torch.optim.AdamW(
            discriminator.parameters(), lr=stage.discriminator_learning_rate, betas=(0.5, 0.99)
        )
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)

    checkpoints = Checkpoints(accelerator, output_dir / "checkpoints" / stage.name, total_limit=1)
    progress = checkpoints.resume() if resume else None
    first = progress["step"] if progress else 0
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(batches, range(first, stage.steps)), batch_size=None, num_workers=1, prefetch_factor=4
    )
    log = (output_dir / "log.jsonl").open("a", encoding="utf-8")

    def report(**values: object) -> None:
        line = json.dumps({"stage": stage.name, **values})
        log.write(line + "\n")
        log.flush()
        accelerator.print(line, flush=True)

    def averaged_validation() -> dict[str, float]:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        values = validate(model, one_step, pairs)
        ema.restore(model.parameters())
        return values

    running: dict[str, float] = {}
    start = time.time()
    for step, batch in enumerate(loader, start=first + 1):
        lq, hq = batch["lq"].to(accelerator.device), batch["hq"].to(accelerator.device) * 2 - 1
        source = upsample(lq) if one_step else hq
        latents, output = network(source, one_step)
        terms: dict[str, Tensor] = {}
        if stage.pixel_l1:
            terms["pixel_l1"] = (output - hq).abs().mean()
        if stage.gradient_l1:
            terms["gradient_l1"] = gradient_l1(output, hq)
        if stage.frequency_l1:
            terms["frequency_l1"] = frequency_l1(output, hq)
        if teacher is not None:
            with torch.no_grad():
                target_latents = teacher.encode(hq).latents
            terms["latent_mse"] = F.mse_loss(latents, target_latents)
        if discriminator is not None:
            discriminator.requires_grad_(False)
            terms["adversarial"] = hinge_student_loss(discriminator(output))
            discriminator.requires_grad_(True)
        loss = sum(getattr(stage, name) * term for name, term in terms.items())
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        if discriminator is not None:
            terms["discriminator"] = hinge_discriminator_loss(discriminator(hq), discriminator(output.detach()))
            discriminator_optimizer.zero_grad()
            accelerator.backward(terms["discriminator"])
            discriminator_optimizer.step()

        for name, term in terms.items():
            running[name] = running.get(name, 0.0) + float(term.detach())
        if step % config.logging_steps == 0:
            means = {name: round(value / config.logging_steps, 5) for name, value in running.items()}
            report(step=step, seconds=round(time.time() - start), **means)
            running = {}
        if step % config.checkpointing_steps == 0 or step == stage.steps:
            checkpoints.save(step)
            report(step=step, **{key: round(value, 3) for key, value in averaged_validation().items()})
    ema.copy_to(model.parameters())
    torch.save(model.state_dict(), output_dir / f"{stage.name}.pt")
    report(done=True, steps=stage.steps, seconds=round(time.time() - start), settings=asdict(stage))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="recipe, a YAML file")
    parser.add_argument("--train_data_dir", type=Path, required=True, help="folder of sharp photographs")
    parser.add_argument("--output_dir", type=Path, required=True, help="checkpoints, log, and the finished pipeline")
    parser.add_argument("--resume_from_checkpoint", choices=["latest"], help="go on with an interrupted run")
    args = parser.parse_args(arguments)

    config = Config.from_yaml(args.config)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    train, held = split_photographs(args.train_data_dir, config.validation_photographs)
    images = [load_uint8(path) for path in train]
    generator = torch.Generator().manual_seed(config.seed)
    pairs = []
    for path in held:
        hq = load_uint8(path)
        top, left = ((side - config.validation_size) // 2 for side in hq.shape[1:])
        hq = hq[None, :, top : top + config.validation_size, left : left + config.validation_size].float() / 255
        pairs.append((degrade(hq, generator), hq))

    model = EmbeddedModel(config)
    for stage in config.stages:
        finished = args.output_dir / f"{stage.name}.pt"
        if args.resume_from_checkpoint and finished.is_file():
            model.load_state_dict(torch.load(finished, weights_only=True))
            continue
        train_stage(stage, config, model, images, pairs, args.output_dir, bool(args.resume_from_checkpoint))
    if config.last_stage_share < 1:
        before = torch.load(args.output_dir / f"{config.stages[-2].name}.pt", weights_only=True)
        blend(model, before, config.last_stage_share)
    save_pipeline(model, args.output_dir / "pipeline", torch.float16)


if __name__ == "__main__":
    main()
