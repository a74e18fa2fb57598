"""Compresses a one-step model (TinySR, arXiv 2508.17434).

    accelerate launch -m tsdsr.training.compress --recipe tinysr_sd3 --model MODEL \
        --train_data_dir PHOTOGRAPHS --output_dir runs/tinysr

`tsdsr compress` is the same for one process.
"""

from collections.abc import Sequence

from diffusers.utils.logging import disable_progress_bar

from ..reporting import command
from .config import parse
from .run import compress


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with 2 for what it was told wrongly, with 1 for what went wrong."""
    disable_progress_bar()  # of loading, which every stage does
    with command():
        print(compress(parse(arguments, __doc__ or "")))


if __name__ == "__main__":
    main()
