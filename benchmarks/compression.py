"""Ways to choose the blocks that stay, against one another: the same model, photographs, steps and seeds.

python -m benchmarks.compression PHOTOGRAPHS --base MODEL --output_dir runs/compression
python -m benchmarks.compression PHOTOGRAPHS ... --set_root SETS      # measures the models on RealSR as well
python -m benchmarks.compression --tables                             # of what was found
python -m benchmarks.compression --curves CURVES.png                  # quality against time (needs matplotlib)
python -m benchmarks.compression PHOTOGRAPHS ... --crops CROPS.jpg    # pictures of the runs that are there

Every run takes half of MODEL's blocks away and restores what is left, with the recipe `compression.yaml` and the flags
of its row. Times are those of whole calls, 128x128 to 512x512, over MODEL's in the same process, call by call in turn.
Runs that are finished are not run again, and one that was stopped goes on.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tsdsr.benchmarks.comparison import METRICS, START, Comparison, Row, spread, words
from tsdsr.benchmarks.memory import photograph
from tsdsr.pipelines.loading import load_pipeline
from tsdsr.training.compress.counts import counts

ROUNDS = 9
LAST = 10  # lines of the log whose mean says how well what is left was restored
UPSCALE = 4


def relative_time(pipeline: Path, whole: Path, rounds: int = ROUNDS) -> float:
    """The median of a call's time over the time of the whole model's call beside it."""
    picture, found = photograph(128), []
    models = [load_pipeline(str(one), device="cpu", dtype="fp32") for one in (pipeline, whole)]
    for one in models:
        one.set_progress_bar_config(disable=True)
        one(picture, upscale=UPSCALE)
    for _ in range(rounds):
        spent = []
        for one in models:
            begun = time.perf_counter()
            one(picture, upscale=UPSCALE)
            spent.append(time.perf_counter() - begun)
        found.append(spent[0] / spent[1])
    return statistics.median(found)


@dataclass(frozen=True)
class Compressions(Comparison):
    """Runs of `tsdsr compress`; the start is the model that is compressed."""

    PIPELINE = "model"

    def training(self, variant: str, seed: int, options: argparse.Namespace) -> list[str]:
        folder = self.folder(variant, seed, options)
        flags: Row = {
            "recipe": self.name,
            "model": options.base,
            "train_data_dir": options.photographs,
            "output_dir": folder,
            "seed": seed,
            **self.variants[variant],
        }
        if options.steps:
            flags |= {"search.steps": options.steps, "restore.steps": options.steps}
        if folder.is_dir():
            flags["resume_from_checkpoint"] = "latest"
        return [sys.executable, "-m", "tsdsr.training.compress", *words(flags)]

    def start(self, options: argparse.Namespace) -> Path | None:
        return options.base

    def measured(self, folder: Path, pipeline: Path, options: argparse.Namespace) -> dict[str, tuple[Path, str]]:
        """The model that was made, and what was left of the whole before anything was restored."""
        pruned = folder / "4_pruned"
        found = super().measured(folder, pipeline, options)
        return {**found, "pruned": (pruned if pruned.is_dir() else pipeline, "held_aside")}

    def facts(self, variant: str, folder: Path, pipeline: Path, options: argparse.Namespace) -> Row:
        """Parameters, multiply-accumulates, time over the whole's, which blocks stayed, how far off they are."""
        model = load_pipeline(str(pipeline), device="cpu")
        prompt = model.prompt_embeddings.prompt_embeds.shape[1] if variant == START else 0
        found: Row = counts(model.vae, model.transformer, prompt)
        found["time"] = 1.0 if variant == START else relative_time(pipeline, options.base)
        if variant != START:
            found["kept"] = json.loads((folder / "3_search" / "search.json").read_text(encoding="utf-8"))["kept"]
            lines = (folder / "5_restored" / "log.jsonl").read_text(encoding="utf-8").splitlines()
            found["latent_l1"] = statistics.mean(json.loads(line)["latent_l1"] for line in lines[-LAST:])
        return found

    def tables(self, rows: list[Row]) -> list[str]:
        lines = [
            "| | parameters | transformer's | multiply-accumulates | transformer's | time | latents' L1 to whole |",
            "| --- |" + " --- |" * 6,
        ]
        for variant, of in self.by_variant(rows).items():
            first = of[0]
            cells = [f"{first['parameters'][part] / 1e6:.4g} M" for part in ("total", "transformer")]
            cells += [f"{first['macs'][part] / 1e9:.4g} G" for part in ("total", "transformer")]
            cells.append(spread([row["time"] for row in of], 2))
            cells.append(spread([row["latent_l1"] for row in of], 5) if "latent_l1" in first else "")
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        return [*super().tables(rows), "Sizes\n\n" + "\n".join(lines) + "\n"]

    def draw(self, rows: list[Row], target: Path) -> None:
        """Each measure of pictures against time: a point a run, a colour a variant."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, len(self.panels), figsize=(4 * len(self.panels), 3.4), constrained_layout=True)
        for name, panel in zip(self.panels, axes, strict=True):
            for index, (variant, of) in enumerate(self.by_variant(rows).items()):
                values = [row["held_aside"][name] for row in of]
                panel.scatter([row["time"] for row in of], values, label=variant, color=f"C{index}", s=16)
            panel.set_title(METRICS[name][0])
            panel.set_xlabel("time over the whole model's")
        axes[0].legend(fontsize=8)
        figure.savefig(target, dpi=90)
        plt.close(figure)

    def add_start(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--base", "--model", dest="base", type=Path, help="folder of the model")


COMPRESSION = Compressions(
    "compression",
    __doc__ or "",
    {
        "uniform": {"search.method": "uniform"},
        "first and last": {"search.method": "ends"},
        "block influence (ShortGPT)": {"search.method": "block_influence"},
        "TinyFusion": {"search.method": "tinyfusion"},
        "TinySR": {"search.method": "tinysr"},
    },
    ("psnr", "haarpsi", "niqe"),
)

if __name__ == "__main__":
    COMPRESSION.main()
