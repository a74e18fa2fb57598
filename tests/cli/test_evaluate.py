"""`tsdsr evaluate`, from folders to figures."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from tsdsr.evaluation.metrics import METRICS
from tsdsr.evaluation.published import LEARNED
from tsdsr.evaluation.sets import read_tensor
from tsdsr.imaging import Picture, read, resize, write
from tsdsr.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def sets(picture, tmp_path_factory):
    """Two pairs in the layout of a benchmark set, and results of them."""
    root = tmp_path_factory.mktemp("sets")
    for number in range(2):
        hr = picture(192, 192, seed=number)
        hr = (hr + 0.05 * np.random.default_rng(number).standard_normal(hr.shape, np.float32)).clip(0, 1)
        lr = resize(hr, (48, 48))
        for role, rgb in (("RealSR/test_HR", hr), ("RealSR/test_LR", lr), ("sr", resize(lr, (192, 192)))):
            (root / role).mkdir(parents=True, exist_ok=True)
            write(Picture(rgb.astype(np.float32)), root / role / f"Canon_{number}.png")
    return root


def test_a_benchmark_set_beside_published_figures(tsdsr, sets, tmp_path):
    outputs = {kind: tmp_path / "new" / f"found.{kind}" for kind in ("json", "csv", "html")}
    options = [word for kind, path in outputs.items() for word in (f"--{kind}", path)]
    result = tsdsr("evaluate", "--set", "realsr", "--root", sets, "--sr", sets / "sr", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(outputs["json"].read_text())
    assert set(found["average"]) | {entry["name"] for entry in found["unavailable"]} == {*METRICS, *LEARNED}
    assert [image["name"] for image in found["images"]] == ["Canon_0", "Canon_1"]
    pictures = [[read_tensor(sets / role / f"Canon_{n}.png") for n in range(2)] for role in ("sr", "RealSR/test_HR")]
    psnr = [METRICS["psnr"].measure(sr, hr) for sr, hr in zip(*pictures, strict=True)]
    assert [image["psnr"] for image in found["images"]] == psnr
    assert found["average"]["psnr"] == pytest.approx(np.mean(psnr))
    assert found["settings"]["set"] == "RealSR" and len(found["settings"]["checksum_lr"]) == 64
    lines = list(csv.DictReader(outputs["csv"].open(newline="")))
    assert [line["name"] for line in lines] == ["Canon_0", "Canon_1", "average"]
    assert float(lines[1]["psnr"]) == psnr[1]
    page = outputs["html"].read_text(encoding="utf-8")
    assert "OSEDiff" in page and "Canon_1" in page
    said = ("OSEDiff", "TinySR", "LPIPS", "114.45", "ground truth", "are of 100 pictures, these of 2", "wrote")
    for words in (f"{found['average']['psnr']:.2f}", *said):
        assert words in result.stdout
    # Nothing is left out without a word.
    for entry in found["unavailable"]:
        assert f"{entry['name']} is unavailable: " in result.stdout and f"--fetch {entry['name']}" in result.stdout
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["found.csv", "found.html", "found.json"]


def test_a_model_and_the_same_from_its_results(tsdsr, model, sets, small_tiles, tmp_path):
    process, tiles = small_tiles[:2], small_tiles[2:]
    common = ["--hr", sets / "RealSR/test_HR", "--metrics", "psnr", "grid_score", "--json"]
    options = ["--lr", sets / "RealSR/test_LR", *process, *tiles, "--save", tmp_path / "kept", "--label", "tiny"]
    result = tsdsr("evaluate", "--model", model, *options, *common, tmp_path / "model.json")
    assert result.exit_code == 0, result.output
    ours = json.loads((tmp_path / "model.json").read_text())
    assert (
        "seconds a picture" in result.stdout and ours["average"]["seconds"] > 0 and ours["settings"]["label"] == "tiny"
    )
    kept = read_tensor(tmp_path / "kept" / "sr" / "Canon_0.png")
    arguments = {name[2:].replace("-", "_"): int(value) for name, value in zip(*[iter(small_tiles)] * 2, strict=True)}
    lq = read_tensor(sets / "RealSR/test_LR/Canon_0.png")
    expected = load_pipeline(model, device="cpu")(lq, upscale=4, output_type="pt", **arguments).images
    torch.testing.assert_close(kept, expected.clamp(0, 1), rtol=0, atol=0.51 / 255)
    again = tsdsr(
        "evaluate", "--sr", tmp_path / "kept/sr", "--beside", tmp_path / "model.json", *common, tmp_path / "sr.json"
    )
    assert again.exit_code == 0, again.output
    theirs = json.loads((tmp_path / "sr.json").read_text())
    assert theirs["average"] == {name: ours["average"][name] for name in ("psnr", "grid_score")}
    assert theirs["settings"]["checksum_hr"] == ours["settings"]["checksum_hr"]
    assert "tiny" in again.stdout


def test_degraded_photographs(tsdsr, sets, tmp_path):
    options = ["--degrade", "realesrgan", "--metrics", "psnr", "ssim", "--crop-size", "64"]
    files = [tmp_path / f"{name}.json" for name in ("first", "again", "other")]
    for seed, path in zip((3, 3, 4), files, strict=True):
        result = tsdsr(
            "evaluate", "-m", "bicubic", "--hr", sets / "RealSR/test_HR", *options, "--seed", seed, "--json", path
        )
        assert result.exit_code == 0, result.output
    first, again, other = (json.loads(path.read_text()) for path in files)
    for found in (first, again, other):
        for image in found["images"]:
            del image["seconds"]
        del found["average"]["seconds"]
    assert first["average"] == again["average"] and first["images"] == again["images"]
    assert first["settings"]["checksum_lr"] == again["settings"]["checksum_lr"] != other["settings"]["checksum_lr"]
    assert first["settings"]["checksum_hr"] == other["settings"]["checksum_hr"]
    assert first["settings"]["degrade"] == "realesrgan" and first["settings"]["seed"] == 3
    common = ["evaluate", "-m", "bicubic", "--hr", sets / "RealSR/test_HR", *options, "--scale", "2", "--save"]
    assert tsdsr(*common, tmp_path / "kept").exit_code == 0
    assert read(tmp_path / "kept" / "lr" / "Canon_0.png").rgb.shape == (32, 32, 3)


def test_held_aside_photographs(tsdsr, picture, tmp_path):
    for photograph in range(4):
        for crop in range(2):
            path = tmp_path / "hr" / f"p{photograph}_{crop}.png"
            path.parent.mkdir(exist_ok=True)
            write(Picture(picture(16, 16, seed=photograph)), path)
    common = ["-m", "nearest", "--hr", tmp_path / "hr", "--degrade", "bicubic", "--metrics", "psnr", "--json"]
    assert tsdsr("evaluate", *common, tmp_path / "a.json", "--held-aside", "2").exit_code == 0
    names = [image["name"] for image in json.loads((tmp_path / "a.json").read_text())["images"]]
    assert names == ["p0_0", "p2_0"]
    assert tsdsr("evaluate", *common, tmp_path / "b.json", "--limit", "3").exit_code == 0
    assert len(json.loads((tmp_path / "b.json").read_text())["images"]) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --sr"),
        (["--sr", "{sr}", "--model", "embedded"], "either --sr"),
        (["--model", "embedded"], "needs --lr"),
        (["--model", "embedded", "--hr", "{hr}"], "needs --lr"),
        (["--set", "realsr", "--sr", "{sr}"], "needs --root"),
        (["--set", "urban100", "--hr", "{hr}", "--sr", "{sr}"], "urban100"),
        (["--set", "urban100", "--root", "{hr}", "--sr", "{sr}"], "urban100"),
        (["--set", "realsr", "--root", "{sr}", "--sr", "{sr}"], "does not hold RealSR"),
        (["--set", "realsr", "--root", "{sr}", "--sr", "{sr}", "--hr", "{hr}"], "own --lr"),
        (["--root", "{sr}", "--sr", "{sr}"], "--set"),
        (["--degrade", "realesrgan", "--sr", "{sr}", "--hr", "{hr}"], "--degrade"),
        (["--sr", "{sr}", "--held-aside", "3"], "--held-aside"),
        (["--sr", "{sr}", "--hr", "{sr}/absent"], "is not a folder"),
        (["--sr", "{empty}", "--hr", "{hr}"], "no pictures"),
        (["--sr", "{sr}", "--hr", "{hr}", "--metrics", "psnr", "--beside", "{text}"], "not a result of"),
        (["--sr", "{sr}", "--hr", "{hr}", "--device", "abacus"], "abacus"),
        (["--sr", "{sr}", "--hr", "{hr}", "--metrics", "psnr", "--json", "{text}"], "--overwrite"),
        (["--model", "{empty}", "--lr", "{sr}", "--hr", "{hr}", "--metrics", "psnr"], "not a pipeline folder"),
        (["--sr", "{small}", "--hr", "{hr}", "--metrics", "psnr"], "48x48"),
        (["--sr", "{one}", "--hr", "{hr}", "--metrics", "psnr"], "Canon_1"),
        (["--sr", "{broken}", "--hr", "{hr}", "--metrics", "psnr"], "Canon_1.png"),
    ],
)
def test_bad_input(tsdsr, sets, tmp_path, assert_refused, files, arguments, words):
    folders = {name: tmp_path / name for name in ("empty", "one", "broken")}
    for folder in folders.values():
        folder.mkdir()
    shutil.copy(sets / "sr/Canon_0.png", folders["one"])
    shutil.copy(sets / "sr/Canon_0.png", folders["broken"])
    (folders["broken"] / "Canon_1.png").write_bytes((sets / "sr/Canon_1.png").read_bytes()[:500])
    (tmp_path / "text.json").write_text("{}")
    names = {"sr": sets / "sr", "hr": sets / "RealSR/test_HR", "small": sets / "RealSR/test_LR", **folders}
    names["text"] = tmp_path / "text.json"
    before = files(tmp_path)
    outputs = [] if "--json" in arguments else ["--json", tmp_path / "out.json", "--html", tmp_path / "out.html"]
    result = tsdsr("evaluate", *(word.format(**names) for word in arguments), *outputs)
    assert_refused(result, words)
    assert files(tmp_path) == before and (tmp_path / "text.json").read_text() == "{}"


def test_a_set_in_folders_of_ones_own(tsdsr, sets):
    """Its name brings the published rows."""
    common = ["evaluate", "--sr", sets / "sr", "--hr", sets / "RealSR/test_HR", "--metrics", "psnr"]
    result = tsdsr(*common, "--set", "drealsr")
    assert result.exit_code == 0 and "published figures for DRealSR" in result.stdout and "27.92" in result.stdout
    assert "OSEDiff" not in tsdsr(*common).stdout


def test_existing_files_are_kept_unless_asked(tsdsr, sets, tmp_path, assert_refused):
    common = ["evaluate", "--sr", sets / "sr", "--hr", sets / "RealSR/test_HR", "--metrics", "psnr", "--json"]
    path = tmp_path / "found.json"
    assert tsdsr(*common, path).exit_code == 0
    before = path.read_text()
    assert_refused(tsdsr(*common, path), path, "--overwrite")
    assert path.read_text() == before
    assert tsdsr(*common, path, "--overwrite", "--label", "new").exit_code == 0
    assert json.loads(path.read_text())["settings"]["label"] == "new"


def test_which_metrics_there_are(tsdsr):
    listed = tsdsr("evaluate", "--list").stdout
    assert all(name in listed for name in (*METRICS, *LEARNED))


def test_options_with_several_values(tsdsr, sets, tmp_path):
    """Words after the option, or the option several times; what follows is not taken for one of them."""
    found = []
    for metrics in (["--metrics", "psnr", "ssim"], ["--metrics", "psnr", "--metrics", "ssim"]):
        path = tmp_path / f"{len(found)}.json"
        result = tsdsr("evaluate", "--hr", sets / "RealSR/test_HR", *metrics, "--sr", sets / "sr", "--json", path)
        assert result.exit_code == 0, result.output
        found.append(list(json.loads(path.read_text())["average"]))
    assert found == [["psnr", "ssim"]] * 2
