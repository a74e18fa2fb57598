"""A folder of damaged pictures on the command line: what is whole is upscaled, the rest is said, nothing breaks off."""

import resource
import subprocess
import sys

import pytest

from tsdsr.imaging import UnreadableImageError, open_frames

from ..fuzz.mutations import mutated_files


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_200_mutated_files(tmp_path):
    (tmp_path / "in").mkdir()
    paths = mutated_files(tmp_path / "in", 200, seed=2)
    small = ["--upscale", "1", "--process-size", "0", "--tile-size", "64", "--tile-overlap", "16"]
    result = subprocess.run(
        [sys.executable, "-m", "tsdsr", "upscale", tmp_path / "in", "-o", f"{tmp_path / 'out'}/", *small],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30)),
    )
    assert result.returncode == 1, result.stderr  # some were skipped
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    results = {path.name for path in (tmp_path / "out").iterdir()}
    for path in paths:
        made = [name for name in results if name.startswith(path.stem + ".")]
        try:
            with open_frames(path) as frames:
                kind = len(list(frames)) > 1 and frames.kind
        except UnreadableImageError:
            assert not made
            assert f"skipped {path}" in result.stderr
        else:
            assert bool(made) == (kind != "pages"), path  # which PNG cannot hold
    assert not [name for name in results if name.endswith(".part")]
