"""Checkpoints that are whole or not there: written beside, renamed when complete, the oldest removed afterwards."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

_NAME = re.compile(r"checkpoint-(\d+)")
# Written last into a checkpoint: how far the run was.
_PROGRESS = "progress.json"


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
            for old in self.all()[: -self.total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return final

    def all(self) -> list[Path]:
        """Whole checkpoints, by step."""
        found = {
            int(match[1]): path
            for path in (self.folder.iterdir() if self.folder.is_dir() else ())
            if (match := _NAME.fullmatch(path.name)) and (path / _PROGRESS).is_file()
        }
        return [found[step] for step in sorted(found)]

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
        return json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
