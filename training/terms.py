"""The terms of a step, each a function of a micro-batch: what the student is trained with, and who follows it.

A phase's weights say which of them count (`config.Phase`); a name here is that of a weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import DistillConfig, Phase
from .degradation import evidence
from .draws import FAKE_SCORE as FAKE_SCORE_NOISE
from .draws import JUDGED, RESTORING, SCORES, SHIFTS, draws
from .families import Known, Prompt, guided_velocity
from .losses import (
    Reconstruction,
    adversarial_terms,
    discriminator_terms,
    distillation,
    fake_score_term,
    high_frequency_distillation,
    noised,
)
from .networks import DISCRIMINATOR, FAKE_SCORE, LATENT_DISCRIMINATOR, TEACHER, Networks
from .objectives import latent_mse
from .objectives.noise import Velocity
from .sampling import restore_latents


@dataclass
class MicroBatch:
    """Pictures in -1..1, latents as the base's own encoder makes them, and what the student made.

    Attributes:
        index: its number; what is drawn for it depends on that.
        prompt: what teacher, fake score and discriminators are told.
        pictures: the enlarged LQ ones, (B, 3, H, W).
        hq: the photographs, (B, 3, H, W).
        hq_latents: z, (B, C, h, w).
        latents: z^, the student's.
        output: the student's pictures, where a term looks at them.
        restored: what the teacher makes of the LQ pictures, once a term has asked for it.
    """

    index: int
    prompt: Known
    pictures: Tensor
    hq: Tensor
    hq_latents: Tensor
    latents: Tensor
    output: Tensor | None
    restored: Tensor | None = None

    def detached(self) -> "MicroBatch":
        """Without what the student's gradient needs: the other roles learn from it."""
        output = None if self.output is None else self.output.detach()
        return replace(self, latents=self.latents.detach(), output=output)


@dataclass(frozen=True)
class Follower:
    """Who learns from what the student made, after the student moved.

    Attributes:
        role: whose weights are trained.
        updates: for one of the student's.
        weights: of its terms.
        terms: of a micro-batch and the number of the update.
    """

    role: str
    updates: int
    weights: dict[str, float]
    terms: Callable[[MicroBatch, int], dict[str, Tensor]]


class Terms:
    """The terms of a run, over its networks.

    Args:
        config: of the run.
        networks: in their roles. What nothing flows back through to weights is called past DDP.
        model: the same as prepared, for what has a backward pass.
        accelerator: says what precision networks compute in.
        reconstruction: the terms that compare with photographs.
        null_prompt: of classifier-free guidance, if there is one.
    """

    def __init__(
        self,
        config: DistillConfig,
        networks: Networks,
        model: Any,
        accelerator: Accelerator,
        reconstruction: Reconstruction,
        null_prompt: Prompt | None,
    ):
        self._config, self._networks, self._model, self._accelerator = config, networks, model, accelerator
        self._reconstruction, self._null_prompt = reconstruction, null_prompt
        self._scheduler = networks.family.scheduler

    def student(self, phase: Phase, weights: dict[str, float], one: MicroBatch) -> dict[str, Tensor]:
        """What the student is trained with: the terms that `weights` names, unweighted."""
        with self._accelerator.autocast():
            terms = self._reconstruction(weights, one.latents, one.hq_latents, one.output, one.hq)
            judge = partial(self._networks.judge, DISCRIMINATOR)
            terms |= adversarial_terms(
                self._config, weights, judge, *self._shown(one), self._counts(one), self._config.adversarial_balance
            )
        of_latents = {
            "teacher_mse": self._teacher_mse,
            "tsd": self._tsd,
            "hsd": self._hsd,
            "latent_adversarial": self._latent_adversarial,
        }
        return terms | {name: term(phase, one) for name, term in of_latents.items() if name in weights}

    def followers(self, phase: Phase) -> list[Follower]:
        """Who learns in a phase beside the student, in the order in which they do."""
        updates, r1 = self._config.fake_score_updates, self._config.r1_weight
        found = (
            Follower(FAKE_SCORE, updates, {"fake_score": 1.0}, self._fake_score),
            Follower(DISCRIMINATOR, 1, {"discriminator": 1.0, "r1": r1}, self._discriminator),
            Follower(
                LATENT_DISCRIMINATOR, 1, {"latent_discriminator": 1.0}, partial(self._latent_discriminator, phase)
            ),
        )
        return [one for one in found if phase.uses(*phase.FOLLOWERS[one.role])]

    def _tsd(self, phase: Phase, one: MicroBatch) -> Tensor:
        """Equation 8's second term of TSD-SR, and VSD, which is a value of it."""
        teacher, fake = (self._velocity(role, one.prompt, phase.guidance_scale) for role in (TEACHER, FAKE_SCORE))
        generator = draws(self._config.seed, SCORES, one.index)
        return distillation(phase, self._scheduler, one.latents, one.hq_latents, teacher, fake, generator)

    def _teacher_mse(self, phase: Phase, one: MicroBatch) -> Tensor:
        """mean( (z^ - z*)^2 ), the first term of TAD-SR's equation 12."""
        return latent_mse(one.latents, self._restored(phase, one))

    def _hsd(self, phase: Phase, one: MicroBatch) -> Tensor:
        """Its second term."""
        target = None
        if phase.hsd_target != "none":
            target = self._restored(phase, one) if phase.hsd_target == "teacher" else one.hq_latents
        teacher = self._velocity(TEACHER, one.prompt, phase.guidance_scale)
        generator = draws(self._config.seed, SCORES, one.index)
        return high_frequency_distillation(
            self._scheduler, one.latents, target, teacher, generator, phase.hsd_share, phase.hsd_noise
        )

    def _latent_adversarial(self, phase: Phase, one: MicroBatch) -> Tensor:
        """Its third term."""
        judge = self._noised(phase, one, partial(self._networks.judge, LATENT_DISCRIMINATOR))
        with self._accelerator.autocast():
            terms = adversarial_terms(
                self._config, {"adversarial": 1.0}, judge, one.latents, self._real_latents(phase, one)
            )
        return terms["adversarial"]

    def _fake_score(self, one: MicroBatch, update: int) -> dict[str, Tensor]:
        """Equation 9 of TSD-SR."""
        generator = draws(self._config.seed, FAKE_SCORE_NOISE, one.index, update)
        predict = partial(self._model, FAKE_SCORE, prompt=one.prompt)
        return {"fake_score": fake_score_term(self._scheduler, one.latents, predict, generator)}

    def _discriminator(self, one: MicroBatch, _: int) -> dict[str, Tensor]:
        """It learns to tell the student's pictures from the photographs."""
        output, hq = self._shown(one)
        assert output is not None
        judge = partial(self._model, DISCRIMINATOR)
        return discriminator_terms(self._config, judge, output, hq, counts=self._counts(one))

    def _shown(self, one: MicroBatch) -> tuple[Tensor | None, Tensor]:
        """What the discriminator of pictures is shown of the student's pictures and of the photographs.

        The enlarged LQ picture behind each, (B, 6, H, W), where it sees that: the judge of pix2pix (arXiv 1611.07004),
        of whether a picture is what this one was made of. And a part at a random place, the same for all, as in
        differentiable augmentation (arXiv 2006.10738): a discriminator's strides are those of a student's patches, and
        what it asks for could come to lie on their grid.
        """
        if one.output is None:
            return None, one.hq
        found = torch.cat([one.output, one.hq])
        if self._config.discriminator_sees_lq:
            found = torch.cat([found, one.pictures.repeat(2, 1, 1, 1)], dim=1)
        if shift := self._config.discriminator_shift:
            top, left = torch.randint(shift + 1, (2,), generator=draws(self._config.seed, SHIFTS, one.index)).tolist()
            found = found[..., top : found.shape[-2] - shift + top, left : found.shape[-1] - shift + left]
        output, hq = found.chunk(2)
        return output, hq

    def _counts(self, one: MicroBatch) -> Tensor | None:
        """How much each picture counts between student and discriminator."""
        bounds = self._config.adversarial_evidence
        return evidence(one.pictures, one.hq, self._config.scale, *bounds) if bounds else None

    def _latent_discriminator(self, phase: Phase, one: MicroBatch, _: int) -> dict[str, Tensor]:
        """It learns to tell the student's latents from real ones, under the noise that it judged the student under."""

        def logits(latents: Tensor, sigma: Tensor, prompt: Known) -> Tensor:
            return self._model(LATENT_DISCRIMINATOR, latents, sigma, prompt=prompt)

        judge = self._noised(phase, one, logits)
        terms = discriminator_terms(self._config, judge, one.latents, self._real_latents(phase, one), r1=False)
        return {LATENT_DISCRIMINATOR: terms["discriminator"]}

    def _noised(self, phase: Phase, one: MicroBatch, judge: Callable[..., Any]) -> Callable[[Tensor], Any]:
        """A judge of latents out of one of noisy latents, their levels and prompt; the same noise at every call."""
        generator = draws(self._config.seed, JUDGED, one.index)
        return noised(
            lambda latents, sigma: judge(latents, sigma, one.prompt),
            self._scheduler,
            one.latents.shape,
            generator,
            one.latents.device,
            phase.judged_share,
            phase.judged_noise,
        )

    def _real_latents(self, phase: Phase, one: MicroBatch) -> Tensor:
        return self._restored(phase, one) if phase.judged_real == "teacher" else one.hq_latents

    def _restored(self, phase: Phase, one: MicroBatch) -> Tensor:
        """z*: what the teacher makes of the LQ pictures in many steps; made once for a micro-batch."""
        if one.restored is None:
            config = self._config
            with self._accelerator.autocast():
                lq_latents = self._networks.hq_latents(one.pictures)
            one.restored = restore_latents(
                self._velocity(TEACHER, one.prompt, config.restoring_guidance(phase)),
                self._scheduler,
                lq_latents,
                draws(config.seed, RESTORING, one.index),
                config.teacher_steps,
                config.teacher_sampler,
                self._networks.family.strength if config.teacher_strength is None else config.teacher_strength,
            )
        return one.restored

    def _velocity(self, role: str, prompt: Known, guidance_scale: float) -> Velocity:
        """Of the network itself, past what DDP put around it: nothing flows back through it."""

        def call(z: Tensor, sigma: Tensor) -> Tensor:
            with self._networks.denoiser.role(role) as network, self._accelerator.autocast():
                return guided_velocity(self._networks.family, network, prompt, self._null_prompt, guidance_scale)(
                    z, sigma
                )

        return call
