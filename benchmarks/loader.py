"""Images per second of the training loader alone, no model behind it.

python -m tsdsr.benchmarks.loader PHOTOGRAPHS --resolution 512 --train_batch_size 4 --num_workers 0 1 2
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from tsdsr.training.data import BatchSettings, Folder, training_batches


def measure(source: Folder, settings: BatchSettings, num_workers: int, seconds: float) -> dict[str, Any]:
    """The pace of batches after the first, which waits for workers to start.

    Args:
        source: the photographs.
        settings: what batches are like.
        num_workers: processes of the loader.
        seconds: how long to measure; at least as many batches are taken as wait ready in the workers.

    Returns:
        num_workers, images_per_second, images (how many were measured), first_batch_seconds.
    """
    begun = time.perf_counter()
    batches = training_batches(source, settings, stop=None, num_workers=num_workers)
    next(batches)
    first = time.perf_counter()
    # What was ready before the clock started must not count for much.
    least = 4 * max(1, num_workers)
    taken = 0
    while taken < least or time.perf_counter() - first < seconds:
        next(batches)
        taken += 1
    images = taken * settings.train_batch_size
    return {
        "num_workers": num_workers,
        "images_per_second": round(images / (time.perf_counter() - first), 2),
        "images": images,
        "first_batch_seconds": round(first - begun, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs")
    parser.add_argument("--resolution", type=int, default=512, help="side of the crops, pixels")
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 1, 2, 4], help="one run for each")
    parser.add_argument("--degrade_on", choices=["worker", "device"], default="worker")
    parser.add_argument("--seconds", type=float, default=20, help="length of each run")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    args = parser.parse_args(arguments)

    settings = BatchSettings(args.train_batch_size, args.resolution, degrade_on=args.degrade_on)
    source = Folder(args.folder)
    rows = [measure(source, settings, num_workers, args.seconds) for num_workers in args.num_workers]
    if args.json:
        facts = {"resolution": args.resolution, "train_batch_size": args.train_batch_size, "cpus": os.cpu_count()}
        print(json.dumps({**facts, "degrade_on": args.degrade_on, "photographs": len(source), "runs": rows}))
        return
    print(f"{len(source)} photographs, {args.resolution} px, degraded on the {args.degrade_on}, {os.cpu_count()} CPUs")
    for row in rows:
        print("{num_workers:3d} workers  {images_per_second:8.2f} images/s  ({images} images)".format(**row))


if __name__ == "__main__":
    main()
