"""The terms of the distillation against one another: the same start, teacher, photographs, steps and seeds.

python -m benchmarks.ablation PHOTOGRAPHS --base BASE --student START --output_dir runs/ablation
python -m benchmarks.ablation PHOTOGRAPHS ... --set_root SETS      # measures the students on RealSR as well
python -m benchmarks.ablation --tables                             # of what was found
python -m benchmarks.ablation --curves CURVES.png                  # the losses of all runs (needs matplotlib)

Every run continues the student START (a pipeline that was trained with reconstruction alone) with the recipe
`ablation.yaml` and the flags of its row. Runs that are finished are not run again, and one that was stopped goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "ablation.json"
# Flags of each row; the rest is the recipe's. lambda = vsd_weight mixes VSD (1) and TSM (0) (equation 5).
VARIANTS: dict[str, dict[str, float]] = {
    "reconstruction": {"tsd": 0},
    "VSD": {"vsd_weight": 1, "dasm_steps": 1},
    "TSM": {"vsd_weight": 0, "dasm_steps": 1},
    "TSD without DASM": {"dasm_steps": 1},
    "TSD": {},
}
START = "start"
TITLES = {"held_aside": "Photographs held aside", "realsr": "RealSR"}
# Name in the table, and which way is better.
METRICS = {"psnr": ("PSNR-Y", 1), "ssim": ("SSIM-Y", 1), "haarpsi": ("HaarPSI", 1), "gmsd": ("GMSD", -1)}
METRICS |= {"niqe": ("NIQE", -1), "edge_energy": ("edge energy", 0), "grid_score": ("grid score", -1)}

Row = dict[str, Any]


def slug(variant: str) -> str:
    """A variant's name in that of a folder."""
    return variant.lower().replace(" ", "_")


def training(variant: str, seed: int, options: argparse.Namespace) -> list[str]:
    """The command of one run."""
    flags = {
        "config": "ablation",
        "train_data_dir": options.photographs,
        "pretrained_model_name_or_path": options.base,
        "initial_student": options.student,
        "output_dir": options.output_dir / f"{slug(variant)}-{seed}",
        "seed": seed,
        **VARIANTS[variant],
        **({"max_train_steps": options.steps} if options.steps else {}),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if (Path(flags["output_dir"]) / "checkpoints").is_dir():
        words += ["--resume_from_checkpoint", "latest"]
    return [sys.executable, "-m", "tsdsr.training.distill", *words]


def measuring(pipeline: Path, of: str, target: Path, options: argparse.Namespace) -> list[str]:
    """The command that measures one pipeline on RealSR, or on the photographs that training held aside."""
    words = ["--model", pipeline, "--json", target, "--overwrite", "--metrics", *METRICS]
    if of == "realsr":
        words += ["--set", "realsr", "--root", options.set_root]
    else:
        words += ["--hr", options.photographs, "--degrade", "realesrgan", "--held-aside", options.held_aside]
    if options.limit:
        words += ["--limit", options.limit]
    return [sys.executable, "-m", "tsdsr", "evaluate", *map(str, words)]


def means(file: Path) -> dict[str, float]:
    """The means that `tsdsr evaluate --json` wrote."""
    average = json.loads(file.read_text(encoding="utf-8"))["average"]
    return {name: average[name] for name in METRICS if average.get(name) is not None}


def losses(run: Path) -> list[Row]:
    """The lines of a run's log that hold losses."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "phase" in line]


def run(options: argparse.Namespace) -> None:
    """All runs and their measures, one after another; what is there already is kept."""
    rows: list[Row] = []
    pairs = [(START, 0), *((variant, seed) for seed in options.seeds for variant in options.only or VARIANTS)]
    for variant, seed in pairs:
        folder = options.output_dir / f"{slug(variant)}-{seed}"
        pipeline = folder / "pipeline"
        if variant == START:
            folder.mkdir(parents=True, exist_ok=True)
            pipeline = options.student
        elif not pipeline.is_dir():
            subprocess.run(training(variant, seed, options), check=True)
        row: Row = {"variant": variant, "seed": seed}
        for of in ("held_aside", *(["realsr"] if options.set_root else [])):
            target = folder / f"{of}.json"
            if not target.is_file():
                subprocess.run(measuring(pipeline, of, target, options), check=True)
            row[of] = means(target)
        if variant != START:
            row["losses"] = losses(folder)
        rows.append(row)
        print(json.dumps({name: value for name, value in row.items() if name != "losses"}), flush=True)
        options.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def spread(values: list[float], digits: int) -> str:
    """Mean and, of more than one, standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(rows: list[Row], of: str) -> str:
    """Means over the seeds, a row a variant; the best of the variants in bold."""
    names = [name for name in METRICS if all(name in row[of] for row in rows)]
    by = {variant: [row for row in rows if row["variant"] == variant] for variant in [START, *VARIANTS]}
    by = {variant: found for variant, found in by.items() if found}
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


def draw(rows: list[Row], target: Path) -> None:
    """A panel for each loss that more than one variant has, a line a variant: the mean over its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("pixel_l1", "gradient_l1", "tsd", "fake_score")
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), constrained_layout=True)
    for name, panel in zip(names, axes, strict=True):
        for variant in VARIANTS:
            runs = [[line for line in row["losses"] if name in line] for row in rows if row["variant"] == variant]
            if not runs or not runs[0]:
                continue
            steps = [line["step"] for line in runs[0]]
            means_ = [statistics.mean(lines[index][name] for lines in runs) for index in range(len(steps))]
            panel.plot(steps, means_, label=variant, linewidth=1)
        panel.set_title(name)
        panel.set_xlabel("step")
    axes[0].legend(fontsize=8)
    figure.savefig(target, dpi=90)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, nargs="?", help="folder of sharp photographs")
    parser.add_argument("--base", type=Path, help="folder of the teacher")
    parser.add_argument("--student", type=Path, help="pipeline that every run begins as")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of all figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these rows alone")
    parser.add_argument("--steps", type=int, default=0, help="of each run, instead of the recipe's")
    parser.add_argument("--set_root", type=Path, help="where the benchmark sets lie; without it RealSR is left out")
    parser.add_argument("--held_aside", type=int, default=50, help="photographs that training held aside")
    parser.add_argument("--limit", type=int, default=0, help="only so many pictures of each set")
    parser.add_argument("--tables", action="store_true", help="only print what was found")
    parser.add_argument("--curves", type=Path, metavar="PNG", help="only draw the losses")
    options = parser.parse_args(arguments)
    if options.tables or options.curves:
        rows = json.loads(options.results.read_text(encoding="utf-8"))
        if options.tables:
            for of in TITLES:
                if of in rows[0]:
                    print(f"{TITLES[of]}\n\n{table(rows, of)}\n")
        if options.curves:
            draw(rows, options.curves)
        return
    if not (options.photographs and options.base and options.student):
        parser.error("photographs, --base and --student are needed")
    run(options)


if __name__ == "__main__":
    main()
