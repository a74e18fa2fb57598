"""The validation script on a real tiny pipeline."""

import json

import pytest

from tsdsr.imaging import Picture, read, write
from tsdsr.training import validate


@pytest.fixture
def model(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_pairs_and_degraded_photographs(model, picture, tmp_path, capsys):
    for name, size in (("lq", 8), ("hq", 32)):
        (tmp_path / name).mkdir()
        for index in range(3):
            write(Picture(picture(size, size, seed=index)), tmp_path / name / f"p{index}_00.png")
    report = tmp_path / "report.json"
    validate.main(
        ["--model", model, "--lq", str(tmp_path / "lq"), "--hq", str(tmp_path / "hq"), "--json", str(report)]
        + ["--save", str(tmp_path / "results")]
    )
    figures = json.loads(report.read_text())
    assert len(figures["images"]) == 3 and figures["average"]["psnr_y_bicubic"] > 25
    assert read(tmp_path / "results" / "p1_00.png").rgb.shape == (32, 32, 3)
    assert "average of 3" in capsys.readouterr().out

    validate.main(["--model", model, "--hq", str(tmp_path / "hq"), "--held_aside", "2"])
    assert "average of 2" in capsys.readouterr().out

    (tmp_path / "lq" / "p1_00.png").unlink()
    with pytest.raises(ValueError, match="no picture named p1_00"):
        validate.main(["--model", model, "--lq", str(tmp_path / "lq"), "--hq", str(tmp_path / "hq")])
