"""What a run says while it goes: log.jsonl, the trackers, validation sheets."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from .config import ConfigError, DistillConfig
from .validation import Pair, save_sheet

logger = logging.getLogger("tsdsr.training")


class TrainingError(RuntimeError):
    """One sentence on why a run cannot go on; its last checkpoint is whole."""


class Stopped(RuntimeError):
    """One sentence on where a run was when it was asked to stop; its checkpoint was written."""


@contextmanager
def command() -> Iterator[None]:
    """What a command runs in: the trainer's words on the terminal, one sentence for errors.

    Exits with 2 for what it was told wrongly, with 1 for what went wrong, with 0 where it was asked to stop.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    diffusers_logging.set_verbosity_error()
    try:
        yield
    except (ConfigError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except (TrainingError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        logger.info("%s", stopped)
    finally:
        logger.removeHandler(handler)


class Stopwatch:
    """Pictures a second since the last question."""

    def __init__(self) -> None:
        self._pictures, self._since = 0, time.monotonic()

    def tick(self, pictures: int) -> None:
        """A step was done, with so many pictures."""
        self._pictures += pictures

    def rate(self) -> float:
        """Pictures a second, of all processes."""
        now = time.monotonic()
        rate = self._pictures / max(now - self._since, 1e-9)
        self._pictures, self._since = 0, now
        return rate


class Report:
    """The log of one run. A resumed run goes on with the log of the one before, from its checkpoint on.

    Args:
        config: of the run; written to the trackers.
        accelerator: its trackers are begun here.
        output_dir: log.jsonl and validation/ lie there.
        step: the step the run begins after.
        running: sums since the last line of the log, from a checkpoint.
    """

    def __init__(
        self,
        config: DistillConfig,
        accelerator: Accelerator,
        output_dir: Path,
        step: int,
        running: dict[str, list[float]] | None,
    ):
        self._accelerator, self._output_dir = accelerator, output_dir
        # Sum and count of every loss since the last line.
        self._running: dict[str, list[float]] = running or {}
        self._skipped: dict[str, str] = {}
        self._path = output_dir / "log.jsonl"
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._forget_after(step)
        if config.report_to:
            values = {k: v for k, v in config.to_dict().items() if isinstance(v, str | int | float | bool)}
            try:
                accelerator.init_trackers(config.tracker_project_name, config=values)
            except (ImportError, ValueError) as error:
                raise ConfigError(f"report_to {config.report_to} cannot be used ({error}).") from error
            if config.report_to != "all" and not accelerator.log_with:  # accelerate leaves it out without a word
                raise ConfigError(f"report_to {config.report_to} needs that package: pip install {config.report_to}.")

    def _forget_after(self, step: int) -> None:
        """Lines of steps that will be done again go; so does a line that a kill cut off."""
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if step and entry.get("step", 0) <= step:
                kept.append(line + "\n")
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self._path)

    def _write(self, **values: Any) -> None:
        if self._accelerator.is_main_process:
            with self._path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(values) + "\n")

    def say(self, text: str) -> None:
        """A sentence for people, once."""
        if self._accelerator.is_main_process:
            logger.info(text)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Losses of one micro-batch."""
        for name, term in terms.items():
            total = self._running.setdefault(name, [0.0, 0])
            total[0] += float(term.detach())
            total[1] += 1

    def running(self) -> dict[str, list[float]]:
        """Sums since the last line, for a checkpoint."""
        return self._running

    def skipped(self, pictures: list[tuple[str, str]]) -> None:
        """Pictures that could not be read: each is named once."""
        for name, reason in pictures:
            if name not in self._skipped:
                self._skipped[name] = reason
                logger.warning("Skipped %s: %s", name, reason)

    def log(self, step: int, phase: str, **more: float) -> dict[str, str]:
        """A line: means of all processes since the last one. Returns them for the progress bar."""
        means = {}
        for name in sorted(self._running):
            total, count = self._running[name]
            mean = torch.tensor(total / count, dtype=torch.float64, device="cpu")
            if self._accelerator.num_processes > 1:
                mean = self._accelerator.reduce(mean.float().to(self._accelerator.device), "mean")
            means[name] = float(mean)
        self._running = {}
        self._write(step=step, phase=phase, **means, **more, skipped=len(self._skipped))
        self._accelerator.log({**means, **more}, step=step)
        shown = {**means, "images/s": more.get("images_per_second", 0.0)}
        return {name: f"{value:.3g}" for name, value in shown.items()}

    def validated(self, step: int, label: str, metrics: dict[str, float], sheet: Tensor | None) -> None:
        """Metrics on the validation photographs, and the sheet of LQ, student, HQ."""
        self._write(step=step, validation=label, **metrics)
        logger.info("%s: %s", label, ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        self._accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=step)
        if sheet is None:
            return
        save_sheet(sheet, self._output_dir / "validation" / f"step-{step:06d}.png")
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("LQ, student, HQ", sheet.numpy(), step)
            elif tracker.name == "wandb":
                import wandb

                picture = (sheet.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
                tracker.log({"LQ, student, HQ": wandb.Image(picture)}, step=step)

    def save_results(self, pairs: list[Pair], results: list[Tensor]) -> None:
        """Every validation photograph at the end: NAME_lq.png, NAME.png, NAME_hq.png."""
        folder = self._output_dir / "validation" / "final"
        for (name, lq, hq), result in zip(pairs, results, strict=True):
            for suffix, image in (("_lq", lq), ("", result), ("_hq", hq)):
                save_sheet(image[0], folder / f"{name}{suffix}.png")

    def close(self) -> None:
        """End the trackers; say how many pictures could not be read."""
        if self._skipped:
            names = ", ".join(list(self._skipped)[:10]) + (", ..." if len(self._skipped) > 10 else "")
            logger.warning("%d pictures could not be read and were skipped: %s", len(self._skipped), names)
        self._accelerator.end_training()

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json and close."""
        if self._accelerator.is_main_process and metrics:
            path = self._output_dir / "metrics.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
        self.close()
