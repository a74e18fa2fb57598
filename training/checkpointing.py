"""Checkpoints that are whole or not there: written beside, renamed when complete, the oldest removed afterwards."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = re.compile(r"checkpoint-(\d+)")
# Written last into a checkpoint: how far the run was.
_PROGRESS = "progress.json"
# What is trained of the networks.
_TRAINED = "trained.safetensors"


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


class Checkpoints:
    """The checkpoints of one run, `checkpoint-STEP` in a folder.

    Args:
        accelerator: everything that was prepared by it or registered with it is saved and restored, with the states of
            the random generators of every process.
        folder: where they lie; made when the first is saved.
        total_limit: how many are kept, None for all.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, total_limit: int | None = None):
        self.accelerator, self.folder, self.total_limit = accelerator, folder, total_limit

    def save(self, step: int, **progress: Any) -> Path:
        """Save after a step. All processes call it.

        Args:
            step: number of steps done.
            progress: further facts for whoever resumes, as JSON has them.

        Raises:
            OSError: if it cannot be written (a full disk, say); checkpoints that were there stay as they are.
        """
        final = self.folder / f"checkpoint-{step}"
        partial = self.folder / f".{final.name}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                text = json.dumps({"step": step, **progress})
                (partial / _PROGRESS).write_text(text, encoding="utf-8")
                if final.exists():
                    shutil.rmtree(final)
                os.replace(partial, final)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            last = self.latest()
            kept = f"the last good one is {last}" if last else "there is none yet"
            raise OSError(
                f"The checkpoint of step {step} could not be written to {self.folder} ({error}); {kept}."
            ) from error
        if self.accelerator.is_main_process and self.total_limit is not None:
            # Of a run that went on from an earlier checkpoint, later ones may be there still: this one is newer.
            behind = [path for path in self.all() if _step_of(path) <= step]
            for old in behind[: -self.total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return final

    def all(self) -> list[Path]:
        """Whole checkpoints, by step."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in folders if _step_of(path) >= 0 and (path / _PROGRESS).is_file()), key=_step_of)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return next(reversed(self.all()), None)

    def resume(self, which: str | Path = "latest") -> dict[str, Any] | None:
        """Restore the newest checkpoint, or the one named; after everything was prepared and registered.

        Returns:
            What was saved beside it, "step" included; None for "latest" where there is none.

        Raises:
            FileNotFoundError: if the one named is not there, or not whole.
        """
        path = self.latest() if which == "latest" else Path(which)
        if path is None:
            return None
        if not (path / _PROGRESS).is_file():
            raise FileNotFoundError(
                f"{path} is no whole checkpoint (it has no {_PROGRESS}); name another one, or use latest."
            )
        self.accelerator.load_state(str(path))
        return self.progress(path)

    def progress(self, path: Path) -> dict[str, Any]:
        """What was saved beside a whole checkpoint, "step" included; nothing is restored."""
        return json.loads((path / _PROGRESS).read_text(encoding="utf-8"))


def save_only_trained(accelerator: Accelerator, trained: dict[str, Tensor]) -> None:
    """Make the accelerator's checkpoints hold these tensors, by name, instead of all weights of the frozen base."""

    def save(models: list, weights: list, folder: str) -> None:
        weights.clear()  # so that the accelerator saves none
        if accelerator.is_main_process:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
            save_file(tensors, Path(folder) / _TRAINED)

    def load(models: list, folder: str) -> None:
        models.clear()
        tensors = load_file(Path(folder) / _TRAINED)
        if tensors.keys() != trained.keys() or any(tensors[name].shape != trained[name].shape for name in trained):
            raise ValueError(
                f"{folder} was written by a run that trained other weights; resume with the settings it began with."
            )
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(tensors[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class StopRequest:
    """Whether a SIGTERM came, to any of the processes: they stop after the same step.

    Until `close`, a SIGTERM does nothing else.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator, self._here = accelerator, False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def close(self) -> None:
        """A SIGTERM does what it did before."""
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self._here = True

    def requested(self) -> bool:
        """All processes call it, and get the same answer."""
        if self._accelerator.num_processes == 1:
            return self._here
        flag = torch.tensor(float(self._here), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum") > 0)
