"""What a stage reads of a micro-batch, on its device: pictures, and what the teacher makes of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..data import BatchSettings, PreparedShards, degrade_batch
from ..data.prepare import vae_fingerprint
from ..one_step import OneStepModel
from ..validation import bicubic


class Targets:
    """Pictures and latents of a micro-batch. What `tsdsr prepare` stored is taken; the rest is computed.

    Args:
        teacher: the whole model.
        batches: settings of the micro-batches.
        device: where they go.
        restore: what makes z_tea of z_L; by default the teacher does.
    """

    def __init__(
        self,
        teacher: OneStepModel,
        batches: BatchSettings,
        device: torch.device,
        restore: Callable[[Tensor], Tensor] | None = None,
    ):
        self.teacher, self.batches, self.device = teacher, batches, device
        self.restore = restore or teacher.restored

    def hq(self, batch: dict[str, Any]) -> Tensor:
        """The photographs (B, 3, s, s), -1..1."""
        return batch["hq"].to(self.device) * 2 - 1

    def lq(self, batch: dict[str, Any]) -> Tensor:
        """The degraded pictures enlarged to the same size, -1..1."""
        hq = batch["hq"].to(self.device)
        lq = batch["lq"].to(self.device) if "lq" in batch else degrade_batch(hq, batch["index"], self.batches)
        return bicubic(lq, hq.shape[-2:]) * 2 - 1

    def hq_latents(self, batch: dict[str, Any]) -> Tensor:
        """What the base's own encoder makes of the photographs, scaled; float32."""
        stored = self._stored(batch, "hq_latents")
        return self.teacher.plain_latents(self.hq(batch)) if stored is None else stored

    def latents(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """z_L = E_tea(x_LR), and z_tea that the teacher makes of it; scaled, float32."""
        lq, restored = (self._stored(batch, name) for name in ("lq_latents", "teacher_latents"))
        if lq is None or restored is None:
            lq = self.teacher.lq_latents(self.lq(batch))
            restored = self.restore(lq)
        return lq, restored

    def _stored(self, batch: dict[str, Any], name: str) -> Tensor | None:
        return batch[name].to(self.device, torch.float32) if name in batch else None


def check_prepared(shards: PreparedShards, teacher: OneStepModel) -> bool:
    """Whether prepared shards hold the teacher's targets.

    Raises:
        ConfigError: if what they hold is another model's.
    """
    found = shards.settings
    if (
        found.get("vae_sha256") != vae_fingerprint(teacher.plain_vae)
        or (found.get("shift_factor") or 0.0) != teacher.shift
    ):
        raise ConfigError(
            f"The latents in {shards.folder} are of another VAE than that of {teacher.name}: prepare the photographs "
            "with this model."
        )
    if "teacher_sha256" not in found:
        return False
    if found["teacher_sha256"] != teacher.fingerprint():
        raise ConfigError(
            f"The targets in {shards.folder} are of another model than {teacher.name}: prepare the photographs with "
            "this one."
        )
    return True
