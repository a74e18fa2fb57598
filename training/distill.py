"""Distils a one-step student from a diffusers base (TSD-SR, arXiv 2411.18263).

    accelerate launch -m tsdsr.training.distill --config training/recipes/tsdsr_sd3_medium.yaml \
        --train_data_dir PHOTOGRAPHS --output_dir runs/tsdsr

Whatever a step draws depends on the seed and the step alone, so that a run that was stopped and resumed follows the one
that was not, and two processes follow one with twice the accumulation.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object, set_seed
from torch import Tensor
from tqdm.auto import tqdm

from .base import build_networks, load_base, prompts_of
from .checkpointing import Checkpoints, StopRequest, save_only_trained
from .config import ConfigError, DistillConfig, parse, reason
from .data import degrade_batch
from .draws import FAKE_SCORE as FAKE_SCORE_NOISE
from .draws import SCORES, draws
from .export import Hub, export, pipeline_of
from .families import Prompt, guided_velocity
from .inputs import batch_settings, open_photographs, read_batches
from .losses import Reconstruction, adversarial_terms, discriminator_terms, distillation, fake_score_term
from .networks import DISCRIMINATOR, FAKE_SCORE, STUDENT, TEACHER
from .objectives.noise import Velocity
from .optimisation import NotFiniteError, Optimisation, check_finite
from .pretrain import pretrain
from .reporting import Report, Stopwatch, TrainingError, command
from .validation import Validation, bicubic, make_metrics

logger = logging.getLogger("tsdsr.training")


@dataclass
class Made:
    """What the student made of a micro-batch, without gradient: the other roles learn from it."""

    index: int
    prompt: Prompt
    latents: Tensor
    output: Tensor | None  # pictures, where a loss looked at them
    hq: Tensor


def distill(config: DistillConfig) -> dict[str, Any]:
    """Run a distillation from its settings to the written student.

    Returns:
        The metrics of bicubic enlargement, of the student at the start and at the end, as metrics.json has them; empty
        without validation photographs, or if the run was asked to stop before its end.

    Raises:
        ConfigError: for settings, photographs, a base or a checkpoint that cannot be used.
        TrainingError: if a loss or gradient is no longer finite.
        OSError: if a checkpoint or result cannot be written.
    """
    output_dir = Path(config.output_dir)
    if not config.resume_from_checkpoint and any((output_dir / "checkpoints").rglob("progress.json")):
        raise ConfigError(
            f"{output_dir} holds checkpoints of another run: go on with it (--resume_from_checkpoint latest), or name "
            "another output_dir."
        )
    accelerator = make_accelerator(config)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    hub = Hub.prepare(config) if config.push_to_hub and accelerator.is_main_process else None

    # 1. Photographs, base, networks
    settings = batch_settings(config)
    photographs = open_photographs(config)
    metrics = make_metrics(config.validation_metrics, device)
    validation = Validation(photographs.validation, metrics)
    base_name = config.pretrained_model_name_or_path or pretrain(config, photographs)
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps  # pretrain had its own
    set_seed(config.seed)
    base = load_base(config, base_name, photographs.null_prompt)
    reconstruction = Reconstruction(config, base.vae.to(device), device)
    networks = build_networks(base, config, weight_dtype).to(device).eval()
    fixed, null, prompt_of = prompts_of(base, device, weight_dtype)
    optimisation = Optimisation(config, networks, accelerator)
    model, scheduler = optimisation.model, base.family.scheduler

    # 2. Where the run is
    save_only_trained(accelerator, networks.trained())
    checkpoints = Checkpoints(accelerator, output_dir / "checkpoints", config.checkpoints_total_limit)
    try:
        progress = (checkpoints.resume(config.resume_from_checkpoint) if config.resume_from_checkpoint else None) or {}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    step = progress.get("step", 0)
    report = Report(config, accelerator, output_dir, step, progress.get("running"))
    report.say(networks.memory())
    accumulation = config.gradient_accumulation_steps
    per_step = accumulation * world  # micro-batches, each with a number of its own
    positions = progress.get("positions")
    batches = read_batches(
        photographs.source,
        settings,
        start=step * per_step,
        stop=config.max_train_steps * per_step,
        rank=rank,
        world=world,
        num_workers=config.dataloader_num_workers,
        position=positions[rank] if positions else None,
    )

    def validate(label: str) -> tuple[dict[str, float], list[Tensor]]:
        """Metrics and results of the pipeline over the student's averaged weights; on the main process."""
        if not validation.pairs or not accelerator.is_main_process:
            return {}, []
        with optimisation.averaged(), networks.role(STUDENT) as (denoiser, vae), accelerator.autocast():
            means, results = validation.with_pipeline(pipeline_of(base, networks, denoiser, vae))
        report.validated(step, label, means, validation.sheet(results))
        return means, results

    def velocity(role: str, prompt: Prompt, guidance_scale: float) -> Velocity:
        """Of the network itself, past what DDP put around it: nothing flows back through it."""

        def call(z: Tensor, sigma: Tensor) -> Tensor:
            with networks.denoiser.role(role) as network, accelerator.autocast():
                return guided_velocity(networks.family, network, prompt, null, guidance_scale)(z, sigma)

        return call

    def exchange(micro: int) -> AbstractContextManager:
        """Processes exchange the gradients of a step once, with its last micro-batch."""
        return nullcontext() if micro + 1 == accumulation else accelerator.no_sync(model)

    def backward(terms: dict[str, Tensor], weights: dict[str, float]) -> None:
        for name, term in terms.items():
            check_finite(f"The loss {name}", term.detach())
        accelerator.backward(sum(weights[name] * term for name, term in terms.items()))
        report.add(terms)

    start = progress.get("start") or validate("start")[0]
    stop, stopping, position = StopRequest(accelerator), False, None
    watch = Stopwatch()
    bar = tqdm(total=config.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)

    # 3. The loop
    try:
        while step < config.max_train_steps and not stopping:
            phase, progress_in_phase = config.phase_at(step)
            weights = phase.weights(progress_in_phase)

            # Equations 3 to 8: the student
            made: list[Made] = []
            for micro in range(accumulation):
                batch = next(batches)
                index, position = batch["index"], batch["position"]
                report.skipped(batch["skipped"])
                hq = batch["hq"].to(device)
                lq = batch["lq"].to(device) if "lq" in batch else degrade_batch(hq, index, settings)
                pictures, hq, prompt = bicubic(lq, hq.shape[-2:]) * 2 - 1, hq * 2 - 1, prompt_of(batch)
                with networks.role(STUDENT), exchange(micro):
                    latents, output = model(STUDENT, pictures, prompt=fixed, decode=phase.uses(*phase.PICTURES))
                    with accelerator.autocast():
                        hq_latents = (
                            batch["hq_latents"].to(device) if "hq_latents" in batch else networks.hq_latents(hq)
                        )
                        terms = reconstruction(weights, latents, hq_latents, output, hq)
                        terms |= adversarial_terms(config, weights, networks.judge, output, hq)
                    if "tsd" in weights:
                        teacher, fake = (velocity(role, prompt, phase.guidance_scale) for role in (TEACHER, FAKE_SCORE))
                        generator = draws(config.seed, SCORES, index)
                        terms["tsd"] = distillation(phase, scheduler, latents, hq_latents, teacher, fake, generator)
                    backward(terms, weights)
                made.append(Made(index, prompt, latents.detach(), None if output is None else output.detach(), hq))
            optimisation.step(STUDENT)

            # Equation 9: the fake score follows it
            for update in range(config.fake_score_updates if "tsd" in weights else 0):
                for micro, one in enumerate(made):
                    with networks.role(FAKE_SCORE), exchange(micro):
                        generator = draws(config.seed, FAKE_SCORE_NOISE, one.index, update)
                        predict = partial(model, FAKE_SCORE, prompt=one.prompt)
                        terms = {"fake_score": fake_score_term(scheduler, one.latents, predict, generator)}
                        backward(terms, {"fake_score": 1.0})
                optimisation.step(FAKE_SCORE)

            # The discriminator learns to tell its pictures from the photographs
            if phase.uses(*phase.ADVERSARIAL):
                for micro, one in enumerate(made):
                    with exchange(micro):
                        terms = discriminator_terms(config, partial(model, DISCRIMINATOR), one.output, one.hq)
                        backward(terms, {"discriminator": 1.0, "r1": config.r1_weight})
                optimisation.step(DISCRIMINATOR)

            step += 1
            bar.update()
            watch.tick(world * sum(len(one.hq) for one in made))
            finished, stopping = step == config.max_train_steps, stop.requested()
            if step % config.logging_steps == 0 or finished:
                shown = report.log(step, phase.name, images_per_second=watch.rate(), **optimisation.rates())
                bar.set_postfix(shown)
            if config.validation_steps and step % config.validation_steps == 0 and not finished:
                validate(f"step {step}")
            if step % config.checkpointing_steps == 0 or finished or stopping:
                everywhere = gather_object([position]) if position is not None else None
                checkpoints.save(step, start=start, running=report.running(), positions=everywhere)
    except NotFiniteError as error:
        last = checkpoints.latest()
        raise TrainingError(
            f"{error} in step {step + 1}; {f'{last} is whole' if last else 'no checkpoint was written yet'}. Lower the "
            "learning rate or train in bf16 or fp32, and resume."
        ) from error
    finally:
        bar.close()
        stop.close()
    if step < config.max_train_steps:
        report.say(f"Stopped as asked to, after step {step}; --resume_from_checkpoint latest goes on.")
        report.close()
        return {}

    # 4. What comes out
    means, results = validate("student")
    found = {"bicubic": validation.run(bicubic)[0], "start": start, "student": means} if means else {}
    if accelerator.is_main_process:
        report.save_results(validation.pairs, results)
        with optimisation.averaged():
            export(networks, base, config, base_name, found, output_dir, photographs.facts)
    accelerator.wait_for_everyone()
    report.finish(found)
    if hub is not None:
        report.say(f"Uploaded to {hub.upload(output_dir)}")
    return found


def make_accelerator(config: DistillConfig) -> Accelerator:
    """As the settings and accelerate's own configuration say.

    Raises:
        ConfigError: for DeepSpeed and FSDP.
    """
    # Each backward pass reaches the weights of one role only, and buffers never change.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=config.report_to,
            project_dir=config.output_dir,
            kwargs_handlers=[ddp],
        )
    except ValueError as error:
        raise ConfigError(f"accelerate cannot be set up so ({reason(error)}).") from error
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ConfigError(
            f"Training with {accelerator.distributed_type.value} is not supported: student and fake score have an "
            "optimiser each over one frozen base. Configure accelerate for DDP (multi_gpu); gradient_checkpointing and "
            "bf16 save memory."
        )
    return accelerator


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 2 for what it was told wrongly, with 1 for what went wrong."""
    with command():
        distill(parse(arguments, __doc__ or ""))


if __name__ == "__main__":
    main()
