"""docs/benchmarks.md and its pictures, from the files in benchmarks/results alone.

python -m benchmarks.report        (needs matplotlib)
"""

import os
import sys
from pathlib import Path
from typing import Any

from .speed import MODES, RESULTS, UPSCALE, read_results, slug

DOCS = Path(__file__).resolve().parent.parent / "docs"
STAGES = {"encode": "encode", "step": "transformer", "decode": "decode", "rest": "rest"}
# Two rows whose machine multiplied matrices at rates further apart than this were not measured alike.
UNSTEADY = 0.1
BASELINE = "published"
OWN = "merged"

Row = dict[str, Any]

INTRO = """# Speed and memory against the published procedure

This page is written by `python -m benchmarks.speed --page` from the files in `benchmarks/results`; edit neither by
hand.

`published` is the inference procedure of TSD-SR's release, written anew from its description
(`benchmarks/published.py`) and checked against its published results: LoRAs of rank 64 beside the weights, a sampled
posterior, transformer tiles of 64x64 latents one after another, a VAE that is not tiled, wavelet colours on the CPU.
The other modes are this project's. Photographs are enlarged four times. `full` are networks of SD3-medium's size with
random weights, `embedded` is the model that ships with the package. Times of `embedded` over `published` compare two
models, not two ways to run one.

```sh
python -m benchmarks.speed --model embedded                     # from the root of the repository
python -m benchmarks.speed --model full --sizes 128 --batches 1 # 4 GB of weights are made in ./memory_benchmark
python -m benchmarks.speed --model full --sizes 128 --batches 1 --dtype bf16
python -m benchmarks.speed --model full --sizes 128 --batches 1 --dtype bf16 --profile
python -m benchmarks.speed --page
```

How to read the tables:

* **Time** is what one call takes, divided by what `published` takes for the same pictures on the same machine, with
  the same threads, dtype and versions; where these differ there is no ratio. Each row was measured in a process of
  its own. On a GPU time is that of its events, on a CPU that of its cores without waiting, which other programs still
  change. `~` marks a ratio of two rows whose machine was not equally fast (matrix products at rates over 10 % apart).
* **Peak** is the memory of a call, weights included, in 10^9 bytes: what torch allocates on a GPU, what the process
  holds beyond its imports on a CPU.
* **TFLOP** are counted in the call itself, before anything is compiled: matrix products, convolutions and attention,
  two for each multiplication with its addition. Normalisations, activations, softmax and resizing are not counted.
  Products of int8 count like others.
* **Arithmetic** is the least time that these operations take at the rate of a large matrix product, and **weights**
  the least time that reading the weights takes, once for each call of a network, at the rate of a large copy; both in
  percent of the measured time, and both rates measured beside it, in the same dtype. The larger one, in bold, is what
  binds. Above 100 % the calls did with fewer operations than were counted, or in a faster arithmetic.
* **Encode, transformer, decode, rest** are shares of the time: resizing belongs to the first, and the rest is colour.

## Where the time goes, and what is in the way

Of `full`, 128x128 to 512x512, on the Intel CPU below; the figures are those of its tables.

* **The VAE's layout was the largest bar.** In bfloat16 `published` spends 54 % of its time copying: the fast
  convolutions of a CPU want channels last, and channels first are laid out anew around each of them. With channels last
  the VAE takes a third of that time (42 to 14 seconds of a core), and convolutions themselves are what is left. In
  float32 decoders enlarge and convolve at once, with 4/9 of the operations (6.16 to 5.34 TFLOP in all, LoRAs included).
* **Baking takes memory out, more than time.** It leaves out 697 million weights that a call would read once: 1.4 GB in
  bfloat16, 0.15 seconds at the rate of a copy, 1 % of a call. The peak goes from 4.9 to 3.6 GB.
* **The transformer** is bound by matrix products and attention, which is 17 % of `baked` in bfloat16: torch's kernel
  there computes at a quarter of the rate of matrix products. Merged LoRAs are a tenth of its time. Activations and
  normalisations are passes over memory, another tenth of a call; `compiled` joins them, but its convolutions are slower
  than oneDNN's here, so that it pays in float32 at most.
* **TinySR** computes a sixth of the operations (0.93 TFLOP), half of its time in matrix products.
* The GPU's targets (25 ms for a picture, TinySR 6 ms) could not be measured: there was none.
"""


def ratio(row: Row, base: Row | None) -> float | None:
    """Time over that of a baseline, if both were measured on equal machines."""
    if base is None or "seconds" not in row or "seconds" not in base or row["machine"] != base["machine"]:
        return None
    return row["seconds"] / base["seconds"]


def find(rows: list[Row], mode: str, like: Row) -> Row | None:
    """The row of a mode for the same pictures."""
    wanted = (mode, like["size"], like["batch"])
    return next((row for row in rows if (row["mode"], row["size"], row["batch"]) == wanted), None)


def _times(row: Row, base: Row | None) -> str:
    value = ratio(row, base)
    if value is None or base is None:
        return ""
    steady = abs(row["gemm_flops"] / base["gemm_flops"] - 1) <= UNSTEADY
    return f"{'' if steady else '~'}{value:.3g}"


def _percent(value: float, binds: bool = False) -> str:
    text = f"{100 * value:.0f} %" if value >= 0.01 else f"{100 * value:.1g} %"
    return f"**{text}**" if binds else text


def table(rows: list[Row], published: list[Row]) -> str:
    """Rows of one size and batch in Markdown, and why others are not there.

    Args:
        rows: of one model.
        published: where the rows of the published procedure are.
    """
    measured = [row for row in rows if "seconds" in row]
    gpu = rows[0]["machine"]["type"] == "cuda"
    lines = []
    if measured:
        heads = ["mode", "time / published", "pictures / published", "time / merged"]
        heads += ["seconds", "pictures a second"] * gpu
        heads += ["peak GB", "TFLOP", "arithmetic", "weights", *STAGES.values()]
        lines += ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for row in measured:
        base = find(published, BASELINE, row)
        inverse = _times(row, base) and _times({**row, "seconds": base["seconds"]}, {**base, "seconds": row["seconds"]})
        cells = [f"`{row['mode']}`", _times(row, base), inverse, _times(row, find(rows, OWN, row))]
        cells += [f"{row['seconds']:.3f}", f"{row['batch'] / row['seconds']:.2f}"] * gpu
        arithmetic = row["flops"] / row["gemm_flops"] / row["seconds"]
        weights = row["weight_bytes"] / row["copy_bytes"] / row["seconds"]
        cells += [f"{row['peak_gb']:.2f}", f"{row['flops'] / 1e12:.3g}"]
        cells += [_percent(arithmetic, arithmetic >= weights), _percent(weights, weights > arithmetic)]
        whole = sum(row["stages"].values())
        cells += [_percent(row["stages"][stage] / whole) for stage in STAGES]
        lines.append("| " + " | ".join(cells) + " |")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "not_run" in row:
            reasons.setdefault(row["not_run"], []).append(f"`{row['mode']}`")
    notes = [f"* Not run: {', '.join(modes)}: {reason}." for reason, modes in reasons.items()]
    if measured and not any(ratio(row, find(published, BASELINE, row)) for row in measured):
        base = find(published, BASELINE, measured[0])
        if base is None or "seconds" not in base:
            notes.append("* No ratio to `published`: it was not measured for these pictures.")
        else:
            differs = [
                f"{name} {base['machine'].get(name)} there, {value} here"
                for name, value in measured[0]["machine"].items()
                if base["machine"].get(name) != value
            ]
            notes.append(f"* No ratio to `published`, which was measured elsewhere: {'; '.join(differs)}.")
    return "\n".join([*lines, *[""] * bool(lines and notes), *notes])


def page(results: dict[str, list[Row]]) -> str:
    """The whole page.

    Args:
        results: rows by the name of their file without its suffix.
    """
    parts = [INTRO]
    parts += ["## Modes\n", *(f"* `{name}`: {mode.what}." for name, mode in MODES.items()), ""]
    named = [(*_name(name, rows), name, rows) for name, rows in results.items()]
    for model, ending, name, rows in sorted(named, key=lambda each: (each[0] != "full", each[2])):
        machine = rows[0]["machine"]
        own = any(row["mode"] == BASELINE and "seconds" in row for row in rows)
        published = rows if own else results.get(f"{slug(machine['device'])}_full{ending}", [])
        title = f"{model} in {machine['dtype']}" if ending else model
        parts.append(f"## {title} on {machine['device']}\n")
        for facts in _distinct([row["machine"] for row in rows if "seconds" in row]):
            said = [f"{key} {value}" for key, value in facts.items() if key not in ("device", "type")]
            parts.append(f"Measured with {', '.join(said)}.\n")
        if any("seconds" in row for row in rows):
            parts.append(f"![Shares of the time]({_picture(name)})\n")
        for size, batch in _distinct([(row["size"], row["batch"]) for row in rows]):
            chosen = [row for row in rows if (row["size"], row["batch"]) == (size, batch)]
            pictures = "picture" if batch == 1 else "pictures"
            parts.append(f"### {size}x{size} to {UPSCALE * size}x{UPSCALE * size}, {batch} {pictures} a call\n")
            parts.append(table(chosen, published) + "\n")
            if any("operators" in row for row in chosen):
                parts.append(operators_table(chosen) + "\n")
    return "\n".join(parts)


def _name(name: str, rows: list[Row]) -> tuple[str, str]:
    """The model of a file and the ending of its name, which says its dtype where that is not the device's usual one."""
    machine = rows[0]["machine"]
    ending = f"_{machine['dtype']}"
    model = name.removeprefix(f"{slug(machine['device'])}_")
    return (model.removesuffix(ending), ending) if model.endswith(ending) else (model, "")


def operators_table(rows: list[Row]) -> str:
    """Shares of the kinds of operators in Markdown, of the rows that were profiled, of which there is one."""
    profiled = [row for row in rows if "operators" in row]
    kinds = list(profiled[0]["operators"])
    lines = ["Time by kind of operator (`--profile`):", ""]
    lines += ["| mode | " + " | ".join(kinds) + " |", "| --- " + "| ---: " * len(kinds) + "|"]
    for row in profiled:
        shares = row["operators"]
        largest = max(shares, key=shares.__getitem__)
        lines.append(f"| `{row['mode']}` | " + " | ".join(_percent(shares[k], k == largest) for k in kinds) + " |")
    return "\n".join(lines)


def _distinct(values: list) -> list:
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _picture(name: str) -> str:
    return f"images/benchmarks_{name}.svg"


def plot(rows: list[Row], file: Path) -> None:
    """Bars of the time of each mode, cut into its stages; one panel for each size, of the smallest batch there is.

    A bar of length 1 is `published`, or `merged` where that was not measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "tsdsr"  # the same results give the same file
    measured = [row for row in rows if "seconds" in row]
    sizes = _distinct([row["size"] for row in measured])
    panels = []
    for size in sizes:
        batch = min(row["batch"] for row in measured if row["size"] == size)
        panels.append([row for row in measured if (row["size"], row["batch"]) == (size, batch)])
    heights = [len(panel) + 2 for panel in panels]
    figure, axes = plt.subplots(
        len(sizes), figsize=(9, 0.32 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        base = find(panel, BASELINE, panel[0]) or find(panel, OWN, panel[0]) or panel[0]
        shown = [row for row in panel if ratio(row, base)]
        left = [0.0] * len(shown)
        for stage, label in STAGES.items():
            widths = [row["stages"][stage] / sum(row["stages"].values()) * ratio(row, base) for row in shown]
            axis.barh([row["mode"] for row in shown], widths, left=left, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_title(f"{base['size']} to {UPSCALE * base['size']} pixels: time / {base['mode']}", fontsize=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STAGES))
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, format="svg", metadata={"Date": None})
    plt.close(figure)
    os.replace(partial, file)


def read_all(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The rows of all files in a folder, by the files' names without their suffix."""
    return {file.stem: read_results(file) for file in sorted(folder.glob("*.json"))}


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """docs/benchmarks.md and docs/images/benchmarks_*.svg."""
    found = read_all(results)
    if not found:
        sys.exit(f"There are no results in {results}; `python -m benchmarks.speed` makes some.")
    try:
        for name, rows in found.items():
            if any("seconds" in row for row in rows):
                plot(rows, docs / _picture(name))
    except ImportError:
        sys.exit("The pictures of the page need matplotlib; `pip install matplotlib` brings it.")
    partial = docs / ".benchmarks.md"
    partial.write_text(page(found), encoding="utf-8")
    os.replace(partial, docs / "benchmarks.md")


if __name__ == "__main__":
    write_page()
