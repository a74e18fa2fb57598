"""PSNR-Y of a model beside bicubic enlargement, on pairs of pictures or on photographs that are degraded here.

python -m tsdsr.training.validate --model embedded --lq PAIRS/test_LR --hq PAIRS/test_HR
python -m tsdsr.training.validate --model embedded --hq PHOTOGRAPHS --held_aside 50
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..imaging import Picture, find_images, write
from ..pipelines.loading import load_pipeline
from .data import load_uint8, split_photographs
from .degradation import degrade
from .validation import bicubic, eight_bit, psnr_y


def read_batch(path: Path) -> Tensor:
    """A picture as (1, 3, H, W), float32, 0..1."""
    return load_uint8(path)[None].float() / 255


def pairs(lq_dir: Path, hq_dir: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pictures of one name in two folders.

    Raises:
        ValueError: if a picture has no partner.
    """
    partners = {path.stem: path for path in find_images(lq_dir)}
    for path in find_images(hq_dir):
        if path.stem not in partners:
            raise ValueError(f"{lq_dir} holds no picture named {path.stem}.")
        yield path.stem, read_batch(partners[path.stem]), read_batch(path)


def degraded(photographs: list[Path], seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Photographs and their degraded copies, a quarter of the size."""
    generator = torch.Generator().manual_seed(seed)
    for path in photographs:
        hq = read_batch(path)
        yield path.stem, degrade(hq, generator), hq


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, or a pipeline folder")
    parser.add_argument("--lq", type=Path, help="folder of small pictures; without it those of --hq are degraded")
    parser.add_argument("--hq", type=Path, required=True, help="folder of sharp pictures, four times as large")
    parser.add_argument("--held_aside", type=int, default=0, help="only the photographs that training held aside")
    parser.add_argument("--seed", type=int, default=0, help="of the degradation")
    parser.add_argument("--json", type=Path, help="file for the figures of every picture")
    parser.add_argument("--save", type=Path, help="folder for the results, as PNG")
    args = parser.parse_args(arguments)

    pipeline = load_pipeline(args.model, device="auto")
    pipeline.set_progress_bar_config(disable=True)
    if args.lq:
        samples = pairs(args.lq, args.hq)
    else:
        photographs = split_photographs(args.hq, args.held_aside)[1] if args.held_aside else find_images(args.hq)
        samples = degraded(photographs, args.seed)
    rows = []
    for name, lq, hq in samples:
        result = pipeline(lq, output_type="pt").images.cpu()
        figures = {
            "psnr_y": psnr_y(eight_bit(result), hq),
            "psnr_y_bicubic": psnr_y(eight_bit(bicubic(lq, hq.shape[-2:])), hq),
        }
        rows.append((name, figures))
        print("{}  {psnr_y:.2f} dB  (bicubic {psnr_y_bicubic:.2f} dB)".format(name, **figures), flush=True)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            write(Picture(result[0].permute(1, 2, 0).numpy()), args.save / f"{name}.png")
    average = {key: sum(figures[key] for _, figures in rows) / len(rows) for key in ("psnr_y", "psnr_y_bicubic")}
    print("average of {n}: {psnr_y:.2f} dB  (bicubic {psnr_y_bicubic:.2f} dB)".format(n=len(rows), **average))
    if args.json:
        images = [{"name": name, **figures} for name, figures in rows]
        args.json.write_text(json.dumps({"average": average, "images": images}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
