"""Looks for files that the readers of `tsdsr.imaging` meet with anything but a picture or an `UnreadableImageError`.

    python tests/fuzz/fuzz_read.py --seconds 60 [--corpus DIR] [--seed N]

With atheris installed it is guided by coverage; without, files are damaged at random. What fails is written to the
corpus folder as `crash-...`, and the exit code is 1.
"""

import argparse
import hashlib
import io
import resource
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from mutations import mutated, whole_files

from tsdsr.imaging import UnreadableImageError, open_frames

SLOW = 10  # seconds of the processor for one small file


def read_all(data: bytes) -> None:
    """Opens and decodes; raises what must not be raised."""
    start = time.process_time()
    try:
        with open_frames(io.BytesIO(data)) as frames:
            for picture in frames:
                picture.rows(0, min(picture.height, 64))
    except UnreadableImageError:
        pass
    if time.process_time() - start > SLOW:
        raise TimeoutError(f"more than {SLOW} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--corpus", type=Path, default=None, help="folder of pictures to begin with")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # A header that lies must not cost more memory than the largest picture that is read without --allow-large.
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    seeds = list(whole_files().values())
    if arguments.corpus is not None:
        arguments.corpus.mkdir(parents=True, exist_ok=True)
        seeds += [path.read_bytes() for path in sorted(arguments.corpus.iterdir()) if path.is_file()]
    try:
        import atheris
    except ImportError:
        return _at_random(seeds, arguments)
    folder = arguments.corpus or Path("fuzz-corpus")
    folder.mkdir(exist_ok=True)
    for data in seeds:
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], str(folder), f"-max_total_time={int(arguments.seconds)}"], read_all)
    atheris.Fuzz()
    return 0


def _at_random(seeds: list[bytes], arguments: argparse.Namespace) -> int:
    rng = np.random.default_rng(arguments.seed)
    end = time.monotonic() + arguments.seconds
    tried = failed = 0
    while time.monotonic() < end:
        data = seeds[rng.integers(0, len(seeds))]
        for _ in range(rng.integers(1, 4)):
            data = mutated(data, rng, seeds) or b"\0"
        tried += 1
        try:
            read_all(data)
        except Exception:
            failed += 1
            traceback.print_exc()
            if arguments.corpus is not None:
                (arguments.corpus / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
    print(f"{tried} files, {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
