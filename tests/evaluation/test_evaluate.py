"""From pictures to figures."""

import json

import numpy as np
import pytest
import torch

from tsdsr.evaluation.evaluate import DEFAULT_METRICS, choose_metrics, evaluate, pictures_of
from tsdsr.evaluation.metrics import METRICS
from tsdsr.evaluation.metrics.metric import Metric
from tsdsr.evaluation.published import published_results, table_columns
from tsdsr.evaluation.results import Evaluation, Unavailable
from tsdsr.evaluation.sets import Pairs, match, read_tensor
from tsdsr.evaluation.upscalers import INTERPOLATIONS, make_upscaler
from tsdsr.imaging import Picture, read, resize, write

CPU = torch.device("cpu")


@pytest.fixture
def sets(picture, tmp_path):
    """Three pairs 24x32 -> 96x128, and results of them: bicubic with noise."""
    noise = np.random.default_rng(0)
    for number in range(3):
        hr = picture(96, 128, seed=number)
        lr = resize(hr, (32, 24))
        sr = resize(lr, (128, 96)) + 0.02 * noise.standard_normal(hr.shape, np.float32)
        for role, rgb in (("hr", hr), ("lr", lr), ("sr", sr)):
            (tmp_path / role).mkdir(exist_ok=True)
            write(Picture(rgb.clip(0, 1).astype(np.float32)), tmp_path / role / f"p{number}.png")
    return tmp_path


def choose(*names, has_hr=True):
    return choose_metrics(names, CPU, has_hr)


def test_the_papers_columns_come_first_and_nothing_is_left_out():
    assert DEFAULT_METRICS[:9] == ("psnr", "ssim", "lpips", "dists", "fid", "niqe", "musiq", "maniqa-pipal", "clipiqa")
    assert set(DEFAULT_METRICS) >= set(METRICS) and len(set(DEFAULT_METRICS)) == len(DEFAULT_METRICS)


def test_a_folder_of_results(sets, tmp_path):
    pairs = Pairs(match(sr=sets / "sr", hr=sets / "hr"))
    found = evaluate(pairs, choose("psnr", "noise_floor"), tmp_path / "work", settings={"label": "noisy"})
    assert [image["name"] for image in found.images] == ["p0", "p1", "p2"] and found.label == "noisy"
    for image, case in zip(found.images, pairs.cases, strict=True):
        sr, hr = read_tensor(case.sr), read_tensor(case.hr)
        assert image["psnr"] == METRICS["psnr"].measure(sr, hr)
        assert image["noise_floor"] == METRICS["noise_floor"].measure(sr, None)
    assert found.average["psnr"] == pytest.approx(np.mean([image["psnr"] for image in found.images]))
    # What needs no ground truth is measured on that as well.
    truths = [METRICS["noise_floor"].measure(read_tensor(case.hr), None) for case in pairs.cases]
    assert [image["noise_floor"] for image in found.ground_truth["images"]] == truths
    assert found.ground_truth["average"] == {"noise_floor": pytest.approx(np.mean(truths))}
    assert found.average["noise_floor"] > 2 * found.ground_truth["average"]["noise_floor"]
    assert [column.name for column in found.columns] == ["psnr", "noise_floor"]
    assert found.settings["pictures"] == 3 and len(found.settings["checksum_hr"]) == 64
    assert found.settings["checksum_lr"] == "" and "torch" in found.settings["versions"]
    assert not (tmp_path / "work").exists()
    shown = pictures_of(pairs, tmp_path / "work", "p1")
    assert shown.lq is None and np.array_equal(shown.sr, read(sets / "sr" / "p1.png").rgb)


def test_results_of_a_model(sets, tmp_path, make_pipeline):
    make_pipeline().save_pretrained(tmp_path / "model")
    calling = {"process_size": 0, "color_fix": "none"}
    upscaler = make_upscaler(str(tmp_path / "model"), calling=calling, loading={"device": "cpu"})
    pairs = Pairs(match(lr=sets / "lr", hr=sets / "hr"))
    found = evaluate(pairs, choose("psnr"), tmp_path / "work", upscaler)
    pipeline = make_pipeline()
    case = pairs.cases[1]
    expected = pipeline(read_tensor(case.lr), height=96, width=128, output_type="pt", **calling).images
    saved = read_tensor(tmp_path / "work" / "sr" / "p1.png")
    torch.testing.assert_close(saved, expected.clamp(0, 1), rtol=0, atol=0.51 / 255)
    # What is measured is what the file holds.
    assert found.images[1]["psnr"] == METRICS["psnr"].measure(saved, read_tensor(case.hr))
    assert found.average["seconds"] > 0 and all(image["seconds"] > 0 for image in found.images)
    assert len(found.settings["checksum_lr"]) == 64
    assert np.array_equal(pictures_of(pairs, tmp_path / "work", "p1").sr, saved[0].permute(1, 2, 0).numpy())


def test_a_border_that_does_not_count(sets, tmp_path, one_sentence):
    pairs = Pairs(match(sr=sets / "sr", hr=sets / "hr"))
    found = evaluate(pairs, choose("psnr", "noise_floor"), tmp_path / "work", crop_border=5)
    sr, hr = (read_tensor(sets / role / "p0.png")[..., 5:91, 5:123] for role in ("sr", "hr"))
    assert found.images[0]["psnr"] == METRICS["psnr"].measure(sr, hr) and found.settings["crop_border"] == 5
    assert found.ground_truth["images"][0]["noise_floor"] == METRICS["noise_floor"].measure(hr, None)
    with pytest.raises(ValueError) as refused:
        evaluate(pairs, choose("psnr"), tmp_path / "work", crop_border=48)
    one_sentence(refused.value, "p0", "128x96", "48")


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_interpolations_are_pillows(name, sets):
    lq = read_tensor(sets / "lr" / "p0.png")
    enlarged = make_upscaler(name)(lq, (96, 128))
    assert np.array_equal(enlarged[0].permute(1, 2, 0), resize(lq[0].permute(1, 2, 0).numpy(), (128, 96), name))


def test_without_ground_truth(sets, tmp_path):
    """Only what needs none, and a factor says how large results are."""
    choice = choose("psnr", "noise_floor", has_hr=False)
    assert [metric.name for metric in choice.metrics] == ["noise_floor"]
    assert (
        choice.unavailable == [Unavailable("psnr", choice.unavailable[0].reason)]
        and "--hr" in choice.unavailable[0].reason
    )
    found = evaluate(Pairs(match(lr=sets / "lr")), choice, tmp_path / "work", make_upscaler("nearest"), upscale=2.5)
    assert read(tmp_path / "work" / "sr" / "p0.png").rgb.shape == (60, 80, 3)
    evaluate(Pairs(match(lr=sets / "lr")), choice, tmp_path / "four", make_upscaler("nearest"))
    assert read(tmp_path / "four" / "sr" / "p0.png").rgb.shape == (96, 128, 3)  # the pipeline's own factor
    assert found.ground_truth == {} and found.average["noise_floor"] is not None


def test_degraded_pictures_are_kept_and_shown(sets, tmp_path):
    def halve(hq, generator, scale):
        return hq[..., ::scale, ::scale] + 0.1 * torch.rand((), generator=generator)

    pairs = Pairs(match(hr=sets / "hr"), degrade=halve, scale=2)
    evaluate(pairs, choose("psnr"), tmp_path / "work", make_upscaler("bicubic"))
    kept = read(tmp_path / "work" / "lr" / "p2.png").rgb
    assert kept.shape == (48, 64, 3) and np.array_equal(pictures_of(pairs, tmp_path / "work", "p2").lq, kept)


def test_a_picture_that_a_metric_is_not_defined_for(sets, tmp_path):
    choice = choose("psnr", "niqe")  # its blocks have 96 pixels, and the small pictures fewer
    found = evaluate(Pairs(match(sr=sets / "lr", hr=sets / "lr")), choice, tmp_path / "work")
    assert (
        found.average["niqe"] is None and found.images[0]["niqe"] is None and found.average["psnr"] == pytest.approx(80)
    )
    assert "96" in found.settings["undefined"]["niqe"]
    assert "NaN" not in found.to_json() and ",\n" in found.to_csv()


def test_a_metric_of_the_whole_set_reads_both_folders(sets, tmp_path):
    def measure(sr, hr):
        assert sorted(path.name for path in sr.iterdir()) == sorted(path.name for path in hr.iterdir())
        return float(np.mean([read(path).rgb.mean() - read(hr / path.name).rgb.mean() for path in sr.iterdir()]))

    choice = choose("psnr")
    choice.metrics.append(Metric("shift", "Shift", "set", "lower", "test", measure=measure))
    pairs = Pairs(match(sr=sets / "sr", hr=sets / "hr"))
    (tmp_path / "work" / "sr").mkdir(parents=True)
    (tmp_path / "work" / "sr" / "of_an_earlier_run.png").write_bytes((sets / "sr" / "p0.png").read_bytes())
    found = evaluate(pairs, choice, tmp_path / "work")
    expected = np.mean([float((read_tensor(c.sr) - read_tensor(c.hr)).mean()) for c in pairs.cases])
    assert found.average["shift"] == pytest.approx(expected, abs=1e-5) and "shift" not in found.images[0]


def test_a_metric_of_the_whole_set_that_fails_spoils_no_other(sets, tmp_path):
    def measure(sr, hr):
        raise ValueError("fid failed.")

    choice = choose("psnr")
    choice.metrics.append(Metric("fid", "FID", "set", "lower", "test", measure=measure))
    found = evaluate(Pairs(match(sr=sets / "sr", hr=sets / "hr")), choice, tmp_path / "work")
    assert found.average["fid"] is None and found.average["psnr"] > 0
    assert found.settings["undefined"] == {"fid": "fid failed."} and "fid" not in found.images[0]


def test_there_and_back_through_json(sets, tmp_path):
    found = evaluate(Pairs(match(sr=sets / "sr", hr=sets / "hr")), choose("psnr", "gmsd"), tmp_path / "work")
    found.unavailable.append(Unavailable("lpips", "no weights", "tsdsr evaluate --fetch lpips"))
    assert Evaluation.from_json(found.to_json()) == found
    plain = json.loads(found.to_json())
    assert set(plain["average"]) == {"psnr", "gmsd"} and set(plain["images"][0]) == {"name", "psnr", "gmsd"}
    lines = found.to_csv().splitlines()
    assert lines[0] == "name,psnr,gmsd" and len(lines) == 5 and lines[-1].startswith("average,")
    assert float(lines[1].split(",")[1]) == found.images[0]["psnr"]
    with pytest.raises(ValueError, match="not a result of"):
        Evaluation.from_json('{"average": {}}')


def test_published_rows():
    rows = published_results("RealSR")
    (osediff,) = (row for row in rows if row.method == "OSEDiff")
    assert osediff.average["psnr"] == 25.15 and osediff.average["maniqa-pipal"] == 0.6326 and osediff.seconds == 0.165
    assert len({(row.method, row.steps) for row in rows}) == len(rows) and rows[-1].method == "StableSR"
    assert {row.dataset for row in rows} == {"RealSR"} and published_results("Set5") == []
    assert all(published_results(name) for name in ("DRealSR", "DIV2K-Val"))


def test_the_table_has_the_papers_columns_first_and_those_that_are_missing():
    columns = [METRICS[name].column for name in ("gmsd", "niqe", "psnr")]
    run = Evaluation({}, [], {}, columns, [Unavailable(name, "") for name in ("fid", "lpips", "topiq_nr")])
    names = [column.name for column in table_columns([run], published_results("RealSR"))]
    assert names == ["psnr", "lpips", "fid", "niqe", "gmsd"]
    assert [column.name for column in table_columns([run], [])] == ["psnr", "niqe", "gmsd"]
