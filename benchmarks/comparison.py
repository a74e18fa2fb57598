"""Runs of the trainer that differ in a few flags, measured alike: what `ablation`, `methods` and `compression` share.

Every run takes the same base, photographs and steps, and begins as the same student (a pipeline of an earlier run, or
the base itself). Runs that are finished are not run again, and one that was stopped goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tsdsr.benchmarks.crops import crop_row
from tsdsr.imaging import Picture, draw_rows, write
from tsdsr.pipelines.loading import load_pipeline
from tsdsr.training.data import split_photographs

START = "start"
CROPS, CROP_SIDE = 6, 192  # photographs shown, and pixels of their middle
TITLES = {"held_aside": "Photographs held aside", "realsr": "RealSR"}
TITLES |= {"pruned": "Photographs held aside, before what is left is restored"}
# Name in the table, and which way is better.
METRICS = {"psnr": ("PSNR-Y", 1), "ssim": ("SSIM-Y", 1), "haarpsi": ("HaarPSI", 1), "gmsd": ("GMSD", -1)}
METRICS |= {"niqe": ("NIQE", -1), "edge_energy": ("edge energy", 0), "grid_score": ("grid score", -1)}

Row = dict[str, Any]


def slug(variant: str) -> str:
    """A variant's name in that of a folder."""
    return "_".join("".join(letter if letter.isalnum() else " " for letter in variant.lower()).split())


def words(flags: dict[str, Any]) -> list[str]:
    """Settings as the trainer's flags."""
    found: list[str] = []
    for name, value in flags.items():
        found += [f"--{'' if value else 'no_'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return found


def measuring(pipeline: Path, of: str, target: Path, options: argparse.Namespace) -> list[str]:
    """The command that measures one pipeline on RealSR, or on the photographs that training held aside."""
    command: list[Any] = ["--model", pipeline, "--json", target, "--overwrite", "--metrics", *METRICS]
    if of == "realsr":
        command += ["--set", "realsr", "--root", options.set_root]
    else:
        command += ["--hr", options.photographs, "--degrade", "realesrgan", "--held-aside", options.held_aside]
    if options.limit:
        command += ["--limit", options.limit]
    return [sys.executable, "-m", "tsdsr", "evaluate", *map(str, command)]


def means(file: Path) -> dict[str, float]:
    """The means that `tsdsr evaluate --json` wrote."""
    average = json.loads(file.read_text(encoding="utf-8"))["average"]
    return {name: average[name] for name in METRICS if average.get(name) is not None}


def losses(run: Path) -> list[Row]:
    """The lines of a run's log that hold losses."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "phase" in line]


def spread(values: list[float], digits: int) -> str:
    """Mean and, of more than one, standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


@dataclass(frozen=True)
class Comparison:
    """A comparison: its rows, and the command that runs them, prints tables and draws curves.

    Attributes:
        name: of the recipe, of the folder of runs and of the file of all figures.
        description: of the command.
        variants: flags of each row; the rest is the recipe's.
        panels: losses that curves are drawn of.
    """

    name: str
    description: str
    variants: dict[str, dict[str, Any]]
    panels: tuple[str, ...]

    PIPELINE: ClassVar[str] = "pipeline"  # what a run writes, in its folder

    @property
    def results(self) -> Path:
        return Path(__file__).resolve().parent / "results" / "comparisons" / f"{self.name}.json"

    def folder(self, variant: str, seed: int, options: argparse.Namespace) -> Path:
        """Of one run."""
        return options.output_dir / f"{slug(variant)}-{seed}"

    def training(self, variant: str, seed: int, options: argparse.Namespace) -> list[str]:
        """The command of one run."""
        flags: dict[str, Any] = {
            "config": self.name,
            "train_data_dir": options.photographs,
            "pretrained_model_name_or_path": options.base,
            **({"initial_student": options.student} if options.student else {}),
            "output_dir": self.folder(variant, seed, options),
            "seed": seed,
            **self.variants[variant],
            **({"max_train_steps": options.steps} if options.steps else {}),
        }
        if (Path(flags["output_dir"]) / "checkpoints").is_dir():
            flags["resume_from_checkpoint"] = "latest"
        return [sys.executable, "-m", "tsdsr.training.distill", *words(flags)]

    def run(self, options: argparse.Namespace) -> None:
        """All runs and their measures, one after another; what is there already is kept."""
        rows: list[Row] = []
        pairs = [(variant, seed) for seed in options.seeds for variant in options.only or self.variants]
        start = self.start(options)
        if start:
            pairs = [(START, 0), *pairs]
        for variant, seed in pairs:
            folder = self.folder(variant, seed, options)
            pipeline = folder / self.PIPELINE
            if variant == START:
                folder.mkdir(parents=True, exist_ok=True)
                pipeline = start
            elif not pipeline.is_dir():
                subprocess.run(self.training(variant, seed, options), check=True)
            row: Row = {"variant": variant, "seed": seed}
            for name, (model, of) in self.measured(folder, pipeline, options).items():
                target = folder / f"{name}.json"
                if not target.is_file():
                    subprocess.run(measuring(model, of, target, options), check=True)
                row[name] = means(target)
            row |= self.facts(variant, folder, pipeline, options)
            rows.append(row)
            print(json.dumps({name: value for name, value in row.items() if name != "losses"}), flush=True)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    def start(self, options: argparse.Namespace) -> Path | None:
        """The pipeline that every run begins as, where there is one."""
        return options.student

    def measured(self, folder: Path, pipeline: Path, options: argparse.Namespace) -> dict[str, tuple[Path, str]]:
        """What of a run is measured, and on what, by the name of the table (`TITLES`)."""
        return {of: (pipeline, of) for of in ("held_aside", *(["realsr"] if options.set_root else []))}

    def facts(self, variant: str, folder: Path, pipeline: Path, options: argparse.Namespace) -> Row:
        """What a row says beside the measures of its pictures."""
        return {} if variant == START else {"losses": losses(folder)}

    def tables(self, rows: list[Row]) -> list[str]:
        """All that is said in tables, each with its title."""
        return [f"{TITLES[of]}\n\n{self.table(rows, of)}\n" for of in TITLES if of in rows[0]]

    def table(self, rows: list[Row], of: str) -> str:
        """Means over the seeds, a row a variant; the best of the variants in bold."""
        names = [name for name in METRICS if all(name in row[of] for row in rows)]
        by = self.by_variant(rows)
        averages = {
            variant: {name: statistics.mean(row[of][name] for row in found) for name in names}
            for variant, found in by.items()
        }
        lines = ["| | " + " | ".join(METRICS[name][0] for name in names) + " |", "| --- |" + " --- |" * len(names)]
        for variant, found in by.items():
            cells = []
            for name in names:
                text = spread([row[of][name] for row in found], 2 if name in ("psnr", "niqe") else 4)
                sign = METRICS[name][1]
                rivals = [sign * averages[other][name] for other in averages if other != START]
                best = variant != START and sign and sign * averages[variant][name] == max(rivals)
                cells.append(f"**{text}**" if best else text)
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def by_variant(self, rows: list[Row]) -> dict[str, list[Row]]:
        """The rows of each variant that has any, the start first."""
        found = {variant: [row for row in rows if row["variant"] == variant] for variant in [START, *self.variants]}
        return {variant: of for variant, of in found.items() if of}

    def draw(self, rows: list[Row], target: Path) -> None:
        """A panel for each loss, a line for each variant that has it: the mean over its seeds."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, len(self.panels), figsize=(4 * len(self.panels), 3.4), constrained_layout=True)
        for name, panel in zip(self.panels, axes, strict=True):
            for index, variant in enumerate(self.variants):
                runs = [[line for line in row["losses"] if name in line] for row in rows if row["variant"] == variant]
                if not runs or not runs[0]:
                    continue
                steps = [line["step"] for line in runs[0]]
                averages = [statistics.mean(lines[place][name] for lines in runs) for place in range(len(steps))]
                panel.plot(steps, averages, label=variant, color=f"C{index}", linewidth=1)
            panel.set_title(name)
            panel.set_xlabel("step")
        axes[0].legend(fontsize=8)
        figure.savefig(target, dpi=90)
        plt.close(figure)

    def crops(self, options: argparse.Namespace) -> Picture:
        """Photographs held aside, a row each, as the models of the first seed that are there enlarge them."""
        start = self.start(options)
        folders = {
            variant: self.folder(variant, options.seeds[0], options) for variant in options.only or self.variants
        }
        places = {**({START: start} if start else {}), **{name: at / self.PIPELINE for name, at in folders.items()}}
        models = {name: load_pipeline(str(at)) for name, at in places.items() if at.is_dir()}
        held = split_photographs(options.photographs, options.held_aside)[1]
        chosen = range(0, len(held), max(1, len(held) // CROPS))[:CROPS]
        return draw_rows(
            f"Photographs held aside, seed {options.seeds[0]}",
            [crop_row(held[index], index, models, side=CROP_SIDE) for index in chosen],
        )

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command."""
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("photographs", type=Path, nargs="?", help="folder of sharp photographs")
        self.add_start(parser)
        parser.add_argument("--output_dir", type=Path, default=Path("runs") / self.name)
        parser.add_argument("--results", type=Path, default=self.results, help="file of all figures")
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--only", nargs="+", choices=list(self.variants), help="these rows alone")
        parser.add_argument("--steps", type=int, default=0, help="of each run, instead of the recipe's")
        parser.add_argument("--set_root", type=Path, help="where the benchmark sets lie; without it RealSR is left out")
        parser.add_argument("--held_aside", type=int, default=50, help="photographs that training held aside")
        parser.add_argument("--limit", type=int, default=0, help="only so many pictures of each set")
        parser.add_argument("--tables", action="store_true", help="only print what was found")
        parser.add_argument("--crops", type=Path, metavar="JPG", help="only draw pictures of the runs that are there")
        parser.add_argument("--curves", type=Path, metavar="PNG", help="only draw what was found")
        options = parser.parse_args(arguments)
        if options.tables or options.curves:
            rows = json.loads(options.results.read_text(encoding="utf-8"))
            if options.tables:
                print(*self.tables(rows), sep="\n")
            if options.curves:
                self.draw(rows, options.curves)
            return
        if not (options.photographs and options.base):
            parser.error("photographs and --base are needed")
        if options.crops:
            write(self.crops(options), options.crops, quality=80)
            return
        self.run(options)

    def add_start(self, parser: argparse.ArgumentParser) -> None:
        """The flags of what runs begin with."""
        parser.add_argument("--base", type=Path, help="folder of the teacher")
        parser.add_argument("--student", type=Path, help="pipeline that every run begins as; by default the base")
