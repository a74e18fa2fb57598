"""The rows of the comparison of ways to prune: what is run, and what is made of it."""

import argparse
import json
from pathlib import Path

import pytest

from tsdsr.benchmarks.compression import COMPRESSION, LAST, relative_time
from tsdsr.training.compress.config import parse


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(photographs=Path("x"), base=Path("whole"), output_dir=tmp_path, steps=0)


def test_a_row_differs_in_the_choice_alone(options, tmp_path):
    configs = {variant: parse(COMPRESSION.training(variant, 3, options)[3:]) for variant in COMPRESSION.variants}
    methods = {variant: config.search.method for variant, config in configs.items()}
    assert methods == {
        "uniform": "uniform",
        "first and last": "ends",
        "block influence (ShortGPT)": "block_influence",
        "TinyFusion": "tinyfusion",
        "TinySR": "tinysr",
    }
    for config in configs.values():
        config.search.method = "tinysr"
        assert config.model == "whole" and config.run.seed == 3 and config.run.validation_photographs == 50
        assert config.stages == ("search", "prune", "restore", "bake")
    assert len({config.run.output_dir for config in configs.values()}) == len(configs)
    assert len({str(config.search) + str(config.restore) for config in configs.values()}) == 1
    options.steps = 7
    config = parse(COMPRESSION.training("TinySR", 0, options)[3:])
    assert config.search.steps == config.restore.steps == 7
    (tmp_path / "tinysr-1").mkdir()
    assert COMPRESSION.training("TinySR", 1, options)[-2:] == ["--resume_from_checkpoint", "latest"]


def test_time_over_the_whole_model(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    assert 0.1 < relative_time(tmp_path / "model", tmp_path / "model", rounds=3) < 10


def test_what_a_row_says(make_pipeline, options, tmp_path, monkeypatch):
    monkeypatch.setattr("tsdsr.benchmarks.compression.relative_time", lambda pipeline, whole: 0.5)
    make_pipeline().save_pretrained(tmp_path / "whole")
    options.base = tmp_path / "whole"
    (tmp_path / "run" / "3_search").mkdir(parents=True)
    (tmp_path / "run" / "3_search" / "search.json").write_text(json.dumps({"kept": [0, 2]}))
    (tmp_path / "run" / "5_restored").mkdir()
    losses = [9.0, *[0.5] * (LAST - 1), 1.5]
    lines = [json.dumps({"step": step, "latent_l1": loss}) for step, loss in enumerate(losses)]
    (tmp_path / "run" / "5_restored" / "log.jsonl").write_text("\n".join(lines) + "\n")
    start = COMPRESSION.facts("start", tmp_path / "start-0", tmp_path / "whole", options)
    row = COMPRESSION.facts("TinySR", tmp_path / "run", tmp_path / "whole", options)
    assert start["time"] == 1 and "kept" not in start and row["kept"] == [0, 2] and row["time"] == 0.5
    assert row["latent_l1"] == 0.5 + 1 / LAST and "latent_l1" not in start
    assert start["parameters"] == row["parameters"] and start["parameters"]["transformer"] > 1000


def test_what_of_a_row_is_measured(options, tmp_path):
    options.set_root = None
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert COMPRESSION.measured(tmp_path, whole, options)["pruned"] == (whole, "held_aside")
    (run / "4_pruned").mkdir(parents=True)
    assert COMPRESSION.measured(run, run / "model", options) == {
        "held_aside": (run / "model", "held_aside"),
        "pruned": (run / "4_pruned", "held_aside"),
    }
    options.set_root = tmp_path
    assert COMPRESSION.measured(run, run / "model", options)["realsr"] == (run / "model", "realsr")


def rows():
    sizes = {"parameters": {"total": 4_000_000, "transformer": 3_000_000}}
    sizes |= {"macs": {"total": 20_500_000_000, "transformer": 8_000_000_000}}
    found = [{"variant": "start", "seed": 0, "time": 1.0}]
    found += [{"variant": "TinySR", "seed": seed, "time": 0.5 + seed / 10, "latent_l1": 0.25} for seed in (0, 1)]
    return [{**row, **sizes, "held_aside": {"psnr": 25.0, "haarpsi": 0.5, "niqe": 8.0}} for row in found]


def test_the_tables():
    quality, sizes = COMPRESSION.tables(rows())
    assert quality.startswith("Photographs held aside\n\n| | PSNR-Y |")
    assert sizes.splitlines() == [
        "Sizes",
        "",
        "| | parameters | transformer's | multiply-accumulates | transformer's | time | latents' L1 to whole |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| start | 4 M | 3 M | 20.5 G | 8 G | 1.00 |  |",
        "| TinySR | 4 M | 3 M | 20.5 G | 8 G | 0.55 ± 0.07 | 0.25000 ± 0.00000 |",
    ]


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    COMPRESSION.draw(rows(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
