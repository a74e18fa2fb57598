"""Damaged files: a picture or one kind of error, no word on stderr, no hang, no more memory than a picture may take."""

import subprocess
import sys

import pytest

from ..fuzz.mutations import mutated_files, whole_files

READ = """
import resource, sys, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from tsdsr.imaging import Picture, UnreadableImageError, open_frames

for path in map(Path, sys.stdin.read().split()):
    start, outcome = time.process_time(), "picture"
    try:
        with open_frames(path) as frames:
            for picture in frames:
                assert isinstance(picture, Picture)
                picture.rows(0, min(50, picture.height))
    except UnreadableImageError as error:
        outcome = "refused"
        assert str(path) in str(error) and "\\n" not in str(error), error
    assert time.process_time() - start < 10, path
    print(path.name, outcome)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_200_mutated_files(tmp_path):
    paths = mutated_files(tmp_path, 200, seed=1)
    result = subprocess.run(
        [sys.executable, "-c", READ], input="\n".join(map(str, paths)), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    outcomes = dict(line.split() for line in result.stdout.splitlines())
    assert len(outcomes) == 200
    assert all(outcome == "picture" for name, outcome in outcomes.items() if name.startswith("whole"))
    assert sum(outcome == "refused" for outcome in outcomes.values()) > 60


def test_the_same_seed_gives_the_same_files(tmp_path):
    contents = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        contents.append([path.read_bytes() for path in mutated_files(tmp_path / folder, 40, seed=3)])
    assert contents[0] == contents[1]
    assert len({path.split(".")[1] for path in whole_files()}) >= 8
