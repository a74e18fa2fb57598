"""One stretch of training with one loss, for runs that are made of several: `pretrain` and `compress`.

A `Task` says what is trained and towards what, a `Stage` how long and how fast; `run_stage` is the loop.
"""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpointing import Checkpoints, StopRequest, save_only_trained
from .config import ConfigError, DistillConfig, typed_as
from .data import BatchSettings
from .discriminators import Discriminator
from .inputs import read_batches
from .losses import adversarial_terms, discriminator_terms
from .networks import DISCRIMINATOR
from .optimisation import Average, NotFiniteError, check_finite
from .reporting import Report, Stopped, Stopwatch, TrainingError

# Of all stages, as TinySR's are published.
WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1.0


@dataclass
class Stage:
    """How long and how fast a stage is trained, and on crops of what size."""

    steps: int
    learning_rate: float = 1e-3
    train_batch_size: int = 8
    resolution: int = 128  # side of the crops, pixels
    other_resolutions: dict | None = None  # as the run's settings have them
    warmup_steps: int = 20
    ema_decay: float = 0.99
    gradient_accumulation_steps: int = 1
    lr_scheduler: str = "cosine"
    adam_beta2: float = 0.99

    COUNTS: ClassVar[tuple[str, ...]] = ("steps", "train_batch_size", "resolution", "gradient_accumulation_steps")

    def check(self, place: str) -> None:
        """Raises a `ConfigError` for numbers that cannot be used; `place` is what their names begin with."""
        for name in self.COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{place}{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("learning_rate", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{place}{name} must be at least 0, not {getattr(self, name)}.")
        for name in ("ema_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{place}{name} must be from 0 to below 1, not {getattr(self, name)}.")

    def batches(self, config: DistillConfig, place: str = "pretrain", degraded: bool = False) -> BatchSettings:
        """Settings of its batches; without `degraded` only the HQ pictures are used.

        Raises:
            ConfigError: for crops that cannot be cut so; it names the section, `place`.
        """
        how: dict[str, Any] = {"degrade_on": "device"}  # not at all
        if degraded:
            how = {name: getattr(config, name) for name in ("degrade_on", "mild_degradation", "random_flip")}
        try:
            return BatchSettings(
                train_batch_size=self.train_batch_size,
                resolution=self.resolution,
                scale=config.scale,
                seed=config.seed,
                other_resolutions=self.other_resolutions or {},
                **how,
            )
        except ValueError as error:
            raise ConfigError(f"The section {place} cannot be used ({error}).") from error


def section(kind: type, values: Any, place: str) -> Any:
    """A dataclass from a section of a recipe; `place` is what its names begin with, such as `pretrain.teacher.`.

    Raises:
        ConfigError: for settings that are missing, do not exist, or are of another type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{place.rstrip('.')} must hold settings and their values, not {values!r}.")
    known = {item.name: item.default is MISSING and item.default_factory is MISSING for item in fields(kind)}
    for problem, names in (
        ("does not exist", [str(name) for name in values if name not in known]),
        ("is missing", [name for name, needed in known.items() if needed and name not in values]),
    ):
        if names:
            raise ConfigError(f"The setting {place}{names[0]} {problem}.")
    return typed_as(kind, values, place)


@dataclass
class Made:
    """What a task made of a micro-batch.

    Attributes:
        terms: losses by name, unweighted.
        output, hq: pictures (B, 3, H, W) in -1..1 for a discriminator, and the photographs it compares them with.
    """

    terms: dict[str, Tensor]
    output: Tensor | None = None
    hq: Tensor | None = None


@dataclass
class Task:
    """What a stage trains, and towards what.

    Attributes:
        name: in logs and progress bars.
        model: its weights that want a gradient are trained. Checkpoints hold all of them, or, where some are frozen,
            those that are trained.
        terms_of: `terms_of(model, batch, progress)` with what DDP put around the model, a micro-batch of
            `data.training_batches`, and how far the stage is, 0..1. A context, so that what its forward pass had set
            still holds in the backward pass.
        weights: of the terms.
        adversary: judges the pictures that were made.
        facts: further numbers for the log, given how far the stage is.
    """

    name: str
    model: nn.Module
    terms_of: Callable[[Any, dict[str, Any], float], AbstractContextManager[Made]]
    weights: Mapping[str, float]
    adversary: "Adversary | None" = None
    facts: Callable[[float], dict[str, float]] = field(default=lambda progress: {})


def run_stage(
    task: Task,
    stage: Stage,
    batches: BatchSettings,
    config: DistillConfig,
    accelerator: Accelerator,
    source: Any,
    folder: Path,
    *,
    checkpointing_steps: int,
    log: bool = False,
    about: dict[str, Any] | None = None,
) -> None:
    """Train a stage to its end; afterwards the unwrapped model holds the averaged weights.

    Args:
        task: what is trained.
        stage: how.
        batches: settings of its micro-batches.
        config: of the run: seed, resume_from_checkpoint, dataloader_num_workers, logging_steps, trackers.
        accelerator: prepares all that is trained; one of its own for each stage.
        source: photographs, for `data.training_batches`.
        folder: of the stage's checkpoints, of which the last is kept, and of its log.
        checkpointing_steps: a checkpoint every so many steps.
        log: whether losses are written, as `reporting` does it.
        about: settings that a checkpoint has to be resumed with.

    Raises:
        ConfigError: for settings, photographs or a checkpoint that cannot be used.
        TrainingError: if a loss or gradient is no longer finite.
        Stopped: if the run was asked to stop; a checkpoint was written.
        OSError: if a checkpoint cannot be written.
    """
    # 1. What moves the weights
    weights = [weight for weight in task.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=stage.learning_rate, betas=(0.9, stage.adam_beta2), weight_decay=WEIGHT_DECAY
    )
    try:
        schedule = get_scheduler(
            stage.lr_scheduler, optimizer, num_warmup_steps=stage.warmup_steps, num_training_steps=stage.steps
        )
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"lr_scheduler {stage.lr_scheduler} cannot be used ({error}).") from error
    accelerator.gradient_accumulation_steps = accumulation = stage.gradient_accumulation_steps
    model, optimizer = accelerator.prepare(task.model, optimizer)
    average = Average(weights, decay=stage.ema_decay)
    accelerator.register_for_checkpointing(schedule, average)
    adversary = task.adversary
    if adversary is not None:
        adversary.prepare(accelerator)
    if any(not weight.requires_grad for weight in task.model.parameters()):
        trained = {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}
        save_only_trained(accelerator, trained | (adversary.state() if adversary is not None else {}))

    # 2. Where the stage is
    checkpoints = Checkpoints(accelerator, folder, total_limit=1)
    found = {}
    if config.resume_from_checkpoint:
        check_settings(checkpoints, about)
        found = checkpoints.resume() or {}
    step = found.get("step", 0)
    report = Report(config, accelerator, folder, step, found.get("running")) if log else None
    rank, world = accelerator.process_index, accelerator.num_processes
    per_step = accumulation * world
    positions, position = found.get("positions"), None
    read = read_batches(
        source,
        batches,
        start=step * per_step,
        stop=stage.steps * per_step,
        rank=rank,
        world=world,
        num_workers=config.dataloader_num_workers,
        position=positions[rank] if positions else None,
    )

    def exchange(micro: int, what: Any) -> AbstractContextManager:
        """Processes exchange the gradients of a step once, with its last micro-batch."""
        return nullcontext() if micro + 1 == accumulation else accelerator.no_sync(what)

    # 3. The loop
    stop, stopping, watch = StopRequest(accelerator), False, Stopwatch()
    bar = tqdm(total=stage.steps, initial=step, desc=task.name, disable=not accelerator.is_local_main_process)
    try:
        while step < stage.steps and not stopping:
            progress = step / max(1, stage.steps - 1)
            against = adversary if adversary is not None and step >= adversary.begin(stage.steps) else None
            judged, losses = [], []
            for micro in range(accumulation):
                batch = next(read)
                position = batch["position"]
                with exchange(micro, model), ExitStack() as role:
                    with accelerator.autocast():
                        made = role.enter_context(task.terms_of(model, batch, progress))
                        terms = {name: task.weights[name] * term for name, term in made.terms.items()}
                        if against is not None:
                            terms["adversarial"] = against.loss(made.output, made.hq)
                        loss = sum(terms.values())
                    for name, term in terms.items():
                        check_finite(f"The loss {name}", term.detach())
                    accelerator.backward(loss)
                losses.append(float(loss.detach()))
                if against is not None and made.output is not None:
                    judged.append((made.output.detach(), made.hq))
                if report is not None:
                    report.skipped(batch["skipped"])
                    report.add(made.terms | ({} if against is None else against.unweighted(terms)))
                watch.tick(world * len(batch["hq"]))
            norm = accelerator.clip_grad_norm_(weights, MAX_GRAD_NORM)
            if norm is not None and accelerator.scaler is None:
                check_finite("The gradient", norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.step(weights)
            if against is not None:
                for micro, (output, hq) in enumerate(judged):
                    with exchange(micro, against.model):
                        terms = against.learn(output, hq)
                    if report is not None:
                        report.add(terms)
                against.step()

            step += 1
            bar.update()
            bar.set_postfix(loss=f"{sum(losses) / accumulation:.4f}")
            finished = step == stage.steps
            if report is not None and (step % config.logging_steps == 0 or finished):
                rates = {"images_per_second": watch.rate(), "learning_rate": schedule.get_last_lr()[0]}
                report.log(step, task.name, **rates, **task.facts(progress))
            stopping = stop.requested()
            if step % checkpointing_steps == 0 or finished or stopping:
                running = report.running() if report is not None else {}
                everywhere = gather_object([position]) if position is not None else None
                checkpoints.save(step, running=running, positions=everywhere, about=about)
    except NotFiniteError as error:
        last = checkpoints.latest()
        raise TrainingError(
            f"{error} in step {step + 1} of {task.name}; {f'{last} is whole' if last else 'no checkpoint was written'}."
            " Lower its learning rate or train in bf16 or fp32, and resume."
        ) from error
    finally:
        bar.close()
        stop.close()
    if report is not None:
        report.close()
    if stopping:  # also after the last step, because what comes next is another stage
        raise Stopped(
            f"Stopped as asked to, after step {step} of {task.name}; --resume_from_checkpoint latest goes on."
        )
    average.copy_to(weights)


def check_settings(checkpoints: Checkpoints, about: dict[str, Any] | None) -> None:
    """Raises a `ConfigError` if the newest checkpoint was written with other settings than `about`."""
    path = checkpoints.latest()
    if path is None or about is None:
        return
    before = checkpoints.progress(path).get("about") or {}
    if changed := changed_settings(before, about):
        raise ConfigError(
            f"{path} was written with other settings ({changed}); go on with the same, or delete {checkpoints.folder} "
            "to begin this stage anew."
        )


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words: `search.steps 4, not 8`; "" where nothing does. Values are compared as JSON has them."""
    now = json.loads(json.dumps(now))
    names = [*now, *(name for name in before if name not in now)]
    return "; ".join(
        f"{name} {before.get(name)}, not {now.get(name)}" for name in names if before.get(name) != now.get(name)
    )


class Adversary:
    """A discriminator, what moves it, and what it says of pictures (B, 3, H, W) in -1..1.

    Args:
        config: discriminator_learning_rate, discriminator_beta1, adversarial_loss, adversarial_balance and r1_weight
            are read from it.
        discriminator: in eval mode.
        weight: of the loss for those who are judged.
        begins: share of the stage's steps that come before it.

    Attributes:
        model: the discriminator, or what DDP put around it.
    """

    model: Any
    _optimizer: Any
    _accelerator: Accelerator

    def __init__(self, config: DistillConfig, discriminator: Discriminator, weight: float, begins: float = 0.0):
        self._config, self._discriminator, self._weight, self._begins = config, discriminator, weight, begins

    def begin(self, steps: int) -> int:
        """The first step in which it counts, from 0."""
        return math.ceil(self._begins * steps)

    def prepare(self, accelerator: Accelerator) -> None:
        """Make its optimiser; the accelerator's checkpoints hold both."""
        config, self._accelerator = self._config, accelerator
        optimizer = torch.optim.AdamW(
            self._discriminator.parameters(),
            lr=config.discriminator_learning_rate,
            betas=(config.discriminator_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
        )
        self.model, self._optimizer = accelerator.prepare(self._discriminator, optimizer)

    def state(self) -> dict[str, Tensor]:
        """What it learns and what its norms remember, by name."""
        found = {**dict(self._discriminator.named_parameters()), **dict(self._discriminator.named_buffers())}
        return {f"{DISCRIMINATOR}.{name}": tensor for name, tensor in found.items()}

    def loss(self, output: Tensor | None, hq: Tensor | None) -> Tensor:
        """Weighted, with gradient to `output` alone."""
        assert output is not None and hq is not None
        config, judge = self._config, self._discriminator.judge
        terms = adversarial_terms(config, {"adversarial": 1.0}, judge, output, hq, balance=config.adversarial_balance)
        return self._weight * terms["adversarial"]

    def unweighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `loss` gave, for the log, where other terms are without their weights."""
        return {"adversarial": terms["adversarial"].detach() / self._weight}

    def learn(self, output: Tensor, hq: Tensor) -> dict[str, Tensor]:
        """It learns from the same pictures; returns its losses, unweighted."""
        terms = discriminator_terms(self._config, self.model, output, hq)
        for name, term in terms.items():
            check_finite(f"The loss {name}", term.detach())
        weights = {"discriminator": 1.0, "r1": self._config.r1_weight}
        self._accelerator.backward(sum(weights[name] * term for name, term in terms.items()))
        return terms

    def step(self) -> None:
        """Its weights move."""
        self._accelerator.clip_grad_norm_(self._discriminator.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._discriminator.renew_norms()
