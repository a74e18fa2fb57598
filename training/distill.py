"""Distils a one-step student from a diffusers base (TSD-SR, arXiv 2411.18263, and the other methods of `methods`).

    accelerate launch -m tsdsr.training.distill --config training/recipes/tsdsr_sd3_medium.yaml \
        --train_data_dir PHOTOGRAPHS --output_dir runs/tsdsr

Whatever a step draws depends on the seed and the step alone, so that a run that was stopped and resumed follows the one
that was not, and two processes follow one with twice the accumulation.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
from .export import Hub, export, pipeline_of
from .inputs import batch_settings, open_photographs, read_batches
from .losses import Reconstruction
from .networks import STUDENT
from .optimisation import NotFiniteError, Optimisation, check_finite
from .pretrain import pretrain
from .reporting import Report, Stopwatch, TrainingError, command
from .terms import MicroBatch, Terms
from .validation import Validation, bicubic, make_metrics

logger = logging.getLogger("tsdsr.training")


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
    model = optimisation.model
    terms = Terms(config, networks, model, accelerator, reconstruction, null)

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

    def exchange(micro: int) -> AbstractContextManager:
        """Processes exchange the gradients of a step once, with its last micro-batch."""
        return nullcontext() if micro + 1 == accumulation else accelerator.no_sync(model)

    def backward(losses: dict[str, Tensor], weights: dict[str, float]) -> None:
        for name, loss in losses.items():
            check_finite(f"The loss {name}", loss.detach())
        accelerator.backward(sum(weights[name] * loss for name, loss in losses.items()))
        report.add(losses)

    start = progress.get("start") or validate("start")[0]
    stop, stopping, position = StopRequest(accelerator), False, None
    watch = Stopwatch()
    bar = tqdm(total=config.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)

    # 3. The loop
    try:
        while step < config.max_train_steps and not stopping:
            phase, progress_in_phase = config.phase_at(step)
            weights = phase.weights(progress_in_phase)

            # The student
            made: list[MicroBatch] = []
            for micro in range(accumulation):
                batch = next(batches)
                index, position = batch["index"], batch["position"]
                report.skipped(batch["skipped"])
                hq = batch["hq"].to(device)
                lq = batch["lq"].to(device) if "lq" in batch else degrade_batch(hq, index, settings)
                pictures, hq = bicubic(lq, hq.shape[-2:]) * 2 - 1, hq * 2 - 1
                with accelerator.autocast():
                    hq_latents = batch["hq_latents"].to(device) if "hq_latents" in batch else networks.hq_latents(hq)
                    known = networks.told(prompt_of(batch), pictures)
                with networks.role(STUDENT), exchange(micro):
                    latents, output = model(STUDENT, pictures, prompt=fixed, decode=phase.uses(*phase.PICTURES))
                    one = MicroBatch(index, known, pictures, hq, hq_latents, latents, output)
                    backward(terms.student(phase, weights, one), weights)
                made.append(one.detached())
            optimisation.step(STUDENT)

            # Who learns from what it made: a fake score, discriminators
            for follower in terms.followers(phase):
                for update in range(follower.updates):
                    for micro, one in enumerate(made):
                        with networks.role(follower.role), exchange(micro):
                            backward(follower.terms(one, update), follower.weights)
                    optimisation.step(follower.role)

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
