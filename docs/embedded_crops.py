"""Draws embedded/crops.jpg: the centres of photographs that training held aside, damaged, enlarged in three ways.

python docs/embedded_crops.py PHOTOGRAPHS PREVIOUS embedded/crops.jpg

PREVIOUS is the folder of an earlier model, version 0.
"""

import sys
from pathlib import Path

from tsdsr import load_pipeline
from tsdsr.benchmarks.crops import crop_row
from tsdsr.imaging import draw_rows, write

# CC0, public domain, Unsplash, and (443 to 495) FarmBot's documentation, MIT.
NAMES = [0, 11, 21, 34, 44, 56, 139, 191, 401, 443, 453, 463, 474, 484, 495, 505, 516, 526]
MILD = [44, 191]  # once more, damaged mildly


def main(photographs: str, previous: str, target: str) -> None:
    models = {"version 0": load_pipeline(previous), "this model": load_pipeline("embedded")}
    cases = [*((name, False) for name in NAMES), *((name, True) for name in MILD)]
    cells = [crop_row(Path(photographs) / f"tr_{name:04d}_00.webp", name, models, mild) for name, mild in cases]
    rows = [[*left, *right] for left, right in zip(cells[::2], cells[1::2], strict=True)]
    write(draw_rows("Held aside from training, damaged as in training", rows), Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
