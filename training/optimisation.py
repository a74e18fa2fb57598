"""What moves the weights: an optimiser and a schedule for each role that is trained, and the student's average."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from .config import ConfigError, DistillConfig, Phase
from .networks import DISCRIMINATOR, FAKE_SCORE, LATENT_DISCRIMINATOR, STUDENT, Networks

JUDGES = (DISCRIMINATOR, LATENT_DISCRIMINATOR)


class NotFiniteError(RuntimeError):
    """A loss or a gradient became NaN or infinite."""


def check_finite(name: str, value: Tensor | float) -> None:
    """Raises a `NotFiniteError` that names what is not finite."""
    if not math.isfinite(float(value)):
        raise NotFiniteError(f"{name} became {float(value)}")


class Average(EMAModel):
    """diffusers' average of weights, which stays on its device when it is loaded: accelerate reads to the CPU."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved by `state_dict`, on the device of the weights averaged until now."""
        device = self.shadow_params[0].device
        super().load_state_dict(state_dict)
        self.to(device=device)


class Optimisation:
    """AdamW, schedule, clipping and average (EMA) as a run's settings ask for them.

    Args:
        config: of the run.
        networks: what is trained.
        accelerator: prepares them; its checkpoints hold the state of all of this.

    Attributes:
        model: the prepared networks: what has a backward pass is called through it.
    """

    model: Any

    def __init__(self, config: DistillConfig, networks: Networks, accelerator: Accelerator):
        self._config, self._networks, self._accelerator = config, networks, accelerator
        rates = {
            STUDENT: config.learning_rate,
            FAKE_SCORE: config.fake_score_learning_rate,
            DISCRIMINATOR: config.discriminator_learning_rate,
            LATENT_DISCRIMINATOR: config.discriminator_learning_rate,
        }
        self._weights = {role: weights for role in rates if (weights := networks.parameters_of(role))}
        optimizers = {
            role: torch.optim.AdamW(
                weights,
                lr=rates[role],
                betas=(config.discriminator_beta1 if role in JUDGES else config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon,
                weight_decay=config.adam_weight_decay,
            )
            for role, weights in self._weights.items()
        }
        self._schedules = {role: self._schedule(role, optimizer) for role, optimizer in optimizers.items()}
        self.model, *prepared = accelerator.prepare(networks, *optimizers.values())
        self._optimizers = dict(zip(optimizers, prepared, strict=True))
        self._average = Average(self._weights[STUDENT], decay=config.ema_decay) if config.ema_decay else None
        accelerator.register_for_checkpointing(*self._schedules.values())
        if self._average is not None:
            accelerator.register_for_checkpointing(self._average)

    def _schedule(self, role: str, optimizer: torch.optim.Optimizer) -> Any:
        """In steps of the student; a discriminator's over those in which there is one."""
        config = self._config
        updates = config.fake_score_updates if role == FAKE_SCORE else 1
        steps = config.steps_using(*Phase.FOLLOWERS[role]) if role in JUDGES else config.max_train_steps
        try:
            return get_scheduler(
                config.lr_scheduler,
                optimizer,
                num_warmup_steps=config.lr_warmup_steps * updates,
                num_training_steps=steps * updates,
                num_cycles=config.lr_num_cycles,
            )
        except (AttributeError, ValueError) as error:  # piecewise_constant misses its rules as an attribute
            raise ConfigError(f"lr_scheduler {config.lr_scheduler} cannot be used ({error}).") from error

    def step(self, role: str) -> None:
        """Clip the gradients of a role, move its weights and their average, and begin new gradients.

        Raises:
            NotFiniteError: if the gradients are not finite; a loss scaler (fp16) leaves such steps out instead.
        """
        norm = self._accelerator.clip_grad_norm_(self._weights[role], self._config.max_grad_norm)
        if norm is not None and self._accelerator.scaler is None:
            check_finite(f"The gradient of the {role.replace('_', ' ')}", norm)
        self._optimizers[role].step()
        self._schedules[role].step()
        self._optimizers[role].zero_grad()
        self._networks.stepped(role)
        if role == STUDENT and self._average is not None:
            self._average.step(self._weights[STUDENT])

    def rates(self) -> dict[str, float]:
        """The learning rates, by their names in the log."""
        return {f"lr_{role}": schedule.get_last_lr()[0] for role, schedule in self._schedules.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student's weights are their averages until the end of the block, where averages are kept."""
        weights = self._weights[STUDENT]
        if self._average is None:
            yield
            return
        self._average.store(weights)
        self._average.copy_to(weights)
        try:
            yield
        finally:
            self._average.restore(weights)
