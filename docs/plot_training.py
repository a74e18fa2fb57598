"""Draws the pictures of docs/training.md from the logs that runs of the trainer leave (needs matplotlib).

python docs/plot_training.py curves RUN OUT.png            losses of one run, and its validation
python docs/plot_training.py compare OUT.png NAME=RUN ...  validation and crops of several runs
"""

import itertools
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from tsdsr.imaging import read

matplotlib.use("Agg")
SKIPPED = {"step", "phase", "validation", "skipped", "images_per_second"}


def entries(run: Path) -> tuple[list[dict], list[dict]]:
    """Lines of losses and lines of validation."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "phase" in line], [line for line in lines if "validation" in line]


def curves(run: Path, target: Path) -> None:
    """One panel for each loss with the phases shaded, one for the validation with bicubic as a line."""
    losses, validation = entries(run)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    names = sorted({name for line in losses for name in line if name not in SKIPPED and not name.startswith("lr_")})
    figure, axes = plt.subplots(2, -(-(len(names) + 1) // 2), figsize=(13, 6), constrained_layout=True)
    panels = list(axes.flat)
    borders = [b["step"] for a, b in itertools.pairwise(losses) if a["phase"] != b["phase"]]
    for name, panel in zip(names, panels, strict=False):
        points = [(line["step"], line[name]) for line in losses if name in line]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_title(name)
        panel.set_yscale("log")
    panel = panels[len(names)]
    points = [(line["step"], line["psnr_y"]) for line in validation if line["step"]]
    panel.plot(*zip(*points, strict=True), marker="o", label="student")
    panel.axhline(metrics["bicubic"]["psnr_y"], linestyle="--", color="grey", label="bicubic")
    panel.set_title("PSNR-Y on held-out photographs, dB")
    panel.legend()
    for panel in panels[: len(names) + 1]:
        for border in borders:
            panel.axvline(border, color="grey", linewidth=0.8, linestyle=":")
        panel.set_xlabel("step")
    for panel in panels[len(names) + 1 :]:
        panel.axis("off")
    figure.savefig(target, dpi=80)


def detail(image: np.ndarray) -> float:
    """Mean absolute difference of neighbouring pixels of the grey picture, in 8-bit levels."""
    grey = image.mean(-1) * 255
    return float((np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2)


def compare(target: Path, runs: dict[str, Path], photographs: int = 3, side: int = 128) -> None:
    """Crops of the first photographs under each run's figures."""
    finals = {name: run / "validation" / "final" for name, run in runs.items()}
    first = next(iter(finals.values()))
    names = sorted(path.stem.removesuffix("_hq") for path in first.glob("*_hq.png"))
    columns = ["LQ", *runs, "HQ"]
    figure, axes = plt.subplots(
        photographs, len(columns), figsize=(2 * len(columns), 2.15 * photographs + 0.5), constrained_layout=True
    )
    chosen = names[:: max(1, len(names) // photographs)][:photographs]
    for row, name in enumerate(chosen):
        lq, hq = (read(first / f"{name}_{kind}.png").rgb for kind in ("lq", "hq"))
        scale = hq.shape[0] // lq.shape[0]
        images = [lq.repeat(scale, 0).repeat(scale, 1)]
        images += [read(folder / f"{name}.png").rgb for folder in finals.values()] + [hq]
        top, left = ((edge - side) // 2 for edge in hq.shape[:2])
        for column, image in enumerate(images):
            axes[row, column].imshow(image[top : top + side, left : left + side], interpolation="nearest")
            axes[row, column].axis("off")
    sharp = np.mean([detail(read(first / f"{name}_hq.png").rgb) for name in names])
    for column, label in enumerate(columns):
        text = label
        if label in runs:
            means = json.loads((runs[label] / "metrics.json").read_text(encoding="utf-8"))["student"]
            ours = np.mean([detail(read(finals[label] / f"{name}.png").rgb) for name in names])
            text += f"\n{means['psnr_y']:.2f} dB, {means['ssim_y']:.3f}\ndetail {ours / sharp:.2f}"
            print(
                f"{label}: psnr_y {means['psnr_y']:.3f}, ssim_y {means['ssim_y']:.4f}, detail {ours / sharp:.3f} of HQ"
            )
        axes[0, column].set_title(text, fontsize=8)
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    if kind == "curves":
        curves(Path(words[0]), Path(words[1]))
    else:
        compare(Path(words[0]), {name: Path(run) for name, run in (word.split("=", 1) for word in words[1:])})
