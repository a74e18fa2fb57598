"""Peak memory and seconds of `tsdsr upscale`, picture in to file out, over sizes of the result.

python -m benchmarks.sizes
python -m benchmarks.sizes --sides 1024 2048 --format tif

A photograph, repeated in mirror images to the size it takes, is enlarged four times to a square PNG by the command in a
process of its own. Peak memory is what the system says of that process (`ru_maxrss`), with all that Python and torch
take by themselves, as for a result of 64x64. Seconds are of the processor's cores (user and system). The seam score
says how much the lines where tiles begin and end stand out of those beside them (1: not at all), up to 4096 pixels.
Rows are added to --results as they come; those that are there already stay unless --again.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsdsr.evaluation.metrics.artefacts import seam_score
from tsdsr.imaging import Picture, read, write
from tsdsr.pipelines.pipeline_tsdsr import TSDSRPipeline
from tsdsr.pipelines.tiling import TilePlan

SAMPLE = Path(__file__).parent.parent / "pipelines" / "sample.jpg"


def mirrored(sample: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture (h, w, 3) repeated in mirror images to (height, width, 3)."""
    pads = [(0, max(0, side - length)) for side, length in zip((height, width), sample.shape[:2], strict=True)]
    return np.pad(sample[:height, :width], [*pads, (0, 0)], mode="symmetric")


def seams(result: Path, side: int) -> float | None:
    """The seam score of a result at the borders of the pipeline's own tiles; None for one tile or too many pixels."""
    defaults = inspect.signature(TSDSRPipeline.__call__).parameters
    tile = defaults["tile_size"].default
    if not tile < side <= 4096:
        return None
    plan = TilePlan.even((side, side), tile, defaults["tile_overlap"].default, grain=8)
    borders = sorted({line for top in plan.tops for line in (top, top + tile) if 0 < line < side})
    picture = torch.from_numpy(read(result, allow_large=True).rgb).movedim(-1, 0)[None]
    return round(seam_score(picture, rows=borders, columns=borders), 3)


def measure(side: int, height: int, suffix: str, more: list[str]) -> dict[str, Any]:
    """One run of the command for a result of `side` times `height` pixels."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "in.png"), Path(folder, f"out.{suffix}")
        write(Picture(mirrored(read(SAMPLE).rgb, max(4, height // 4), max(4, side // 4))), source)
        command = [sys.executable, "-m", "tsdsr", "upscale", str(source), "-o", str(result), "-s", "4", *more]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed")
        return {
            "side": side,
            "height": height,
            "format": suffix,
            "options": more,
            "peak_mb": round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "file_mb": round(result.stat().st_size / 1e6, 1),
            "seam_score": seams(result, side) if height == side else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--height", type=int, help="of the result, where it is not square: strips are as wide")
    parser.add_argument("--format", default="png", help="of the result")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    args, more = parser.parse_known_args()
    rows = json.loads(args.results.read_text()) if args.results.exists() else []
    for side in args.sides:
        wanted = side, args.height or side, args.format, more
        known = [row for row in rows if (row["side"], row["height"], row["format"], row["options"]) == wanted]
        if known and not args.again:
            continue
        row = measure(*wanted)
        rows = sorted(
            [*(row for row in rows if row not in known), row],
            key=lambda row: (row["options"], row["side"], row["height"]),
        )
        args.results.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
