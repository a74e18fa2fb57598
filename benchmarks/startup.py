"""CPU seconds and peak memory from the command line to the first picture.

python -m benchmarks.startup
python -m benchmarks.startup --model tinysr/ --runs 9

Each line is a process of its own that ends where its name says, so the difference between two is what lies between
them. The first ones are the floor: Python, torch, and what a pipeline of diffusers needs, without anything of this
package. The picture is one of 128x128 pixels, enlarged four times. Seconds are of the processor's cores (user and
system), with those of leaving Python; peak memory is what the system says of the process (`ru_maxrss`). The lines take
turns, so that a machine that is slow for a while is slow for all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Nothing is imported that is large: a child's peak memory is never less than what its parent holds.
SAMPLE = Path(__file__).parent.parent / "pipelines" / "sample.jpg"
LOAD = "from tsdsr import load_pipeline; pipeline = load_pipeline(sys.argv[1])"


def processes(model: str, result: Path) -> dict[str, list[str]]:
    """What Python is asked to do, by the name of its line."""
    code = {
        "python": "pass",
        "import torch": "import torch",
        "import diffusers": "import diffusers",
        "DiffusionPipeline": "from diffusers import DiffusionPipeline",
        "TSDSRPipeline": "from tsdsr import TSDSRPipeline",
        "load_pipeline": LOAD,
        "first picture": f"{LOAD}; from PIL import Image; pipeline(Image.open(sys.argv[2]))",
    }
    return {
        **{name: ["-c", f"import sys; {line}", model, str(SAMPLE)] for name, line in code.items()},
        "tsdsr --help": ["-m", "tsdsr", "--help"],
        "tsdsr upscale": ["-m", "tsdsr", "upscale", str(SAMPLE), "-o", str(result), "-m", model, "--overwrite"],
    }


def measure(arguments: list[str]) -> tuple[float, float]:
    """CPU seconds and peak MB of one Python process."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.stderr is not None
    words = process.stderr.read().decode(errors="replace")  # to its end, so that the process can come to its own
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"python {' '.join(arguments)} failed: {words.strip()}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="`embedded`, a pipeline folder, or a Hub id that is here")
    parser.add_argument("--runs", type=int, default=5, help="of which medians are taken")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = processes(args.model, Path(folder, "out.png"))
        for arguments in lines.values():  # files from the disk, and compiled
            measure(arguments)
        measured = [{name: measure(arguments) for name, arguments in lines.items()} for _ in range(args.runs)]
    rows: list[dict[str, Any]] = []
    for name in lines:
        seconds, megabytes = zip(*(run[name] for run in measured), strict=True)
        rows.append(
            {
                "until": name,
                "cpu_seconds": round(statistics.median(seconds), 2),
                "fastest": round(min(seconds), 2),
                "peak_mb": round(statistics.median(megabytes)),
            }
        )
    what = {"model": args.model, "runs": args.runs, "threads": os.environ.get("OMP_NUM_THREADS"), "rows": rows}
    args.results.write_text(json.dumps(what, indent=1) + "\n")
    print(f"{'until':18} {'CPU s':>7} {'fastest':>8} {'peak MB':>8}")
    for row in rows:
        print(f"{row['until']:18} {row['cpu_seconds']:7.2f} {row['fastest']:8.2f} {row['peak_mb']:8}")


if __name__ == "__main__":
    main()
