"""The rows of the ablation: what is run, and what is made of it."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tsdsr.benchmarks import comparison
from tsdsr.benchmarks.ablation import ABLATION
from tsdsr.benchmarks.methods import METHODS
from tsdsr.imaging import draw_rows
from tsdsr.pipelines.loading import EMBEDDED
from tsdsr.training.config import parse


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        photographs=Path("x"), base=Path("base"), student=Path("start"), output_dir=tmp_path, steps=0
    )


def test_a_row_differs_in_the_distillation_alone(options, tmp_path):
    configs = {variant: parse(ABLATION.training(variant, 3, options)[3:]) for variant in ABLATION.variants}
    found = {}
    for variant, config in configs.items():
        (phase,) = config.phases
        terms = phase.weights(0)
        found[variant] = phase.vsd_weight if "tsd" in terms else None, phase.dasm_steps if "tsd" in terms else None
        assert config.seed == 3 and config.initial_student == "start" and config.recipe == "ablation.yaml"
        assert {name: weight for name, weight in terms.items() if name != "tsd"} == {
            name: weight for name, weight in configs["TSD"].phases[0].weights(0).items() if name != "tsd"
        }
    assert found == {
        "reconstruction": (None, None),
        "VSD": (1, 1),
        "TSM": (0, 1),
        "TSD without DASM": (0.7, 1),
        "TSD": (0.7, 4),
    }
    assert len({config.output_dir for config in configs.values()}) == len(ABLATION.variants)
    options.steps = 7
    assert parse(ABLATION.training("TSD", 0, options)[3:]).max_train_steps == 7


def test_a_row_of_the_methods_differs_in_the_method_alone(options):
    """Reconstruction, base, start, steps and rates are the same; the terms are those of the row."""
    configs = {variant: parse(METHODS.training(variant, 3, options)[3:]) for variant in METHODS.variants}
    rest = ("seed", "initial_student", "learning_rate", "max_train_steps", "recipe", "discriminator_learning_rate")
    assert len({tuple(getattr(config, name) for name in rest) for config in configs.values()}) == 1
    assert len({config.output_dir for config in configs.values()}) == len(configs)
    assert all(Path(config.output_dir).name.replace("_", "").replace("-", "").isalnum() for config in configs.values())
    pictures = {"pixel_l1": 1.0, "gradient_l1": 0.5, "frequency_l1": 0.05}
    tad, scores = {"teacher_mse": 1.0, "hsd": 1.0}, {"latent_mse": 1.0, "tsd": 1.0}
    wanted = {
        "VSD (OSEDiff)": scores,
        "TSD-SR": scores,
        "SDS": tad,
        "HSD": tad,
        "HSD + D": {**tad, "latent_adversarial": 0.02},
        "HSD + time-aware D (TAD-SR)": {**tad, "latent_adversarial": 0.02},
    }
    assert {variant: config.phases[0].weights(0) for variant, config in configs.items()} == {
        variant: {**pictures, **terms} for variant, terms in wanted.items()
    }
    phases = {variant: config.phases[0] for variant, config in configs.items()}
    assert [(phases[name].vsd_weight, phases[name].dasm_steps) for name in ("VSD (OSEDiff)", "TSD-SR")] == [
        (1.0, 1),
        (0.7, 4),
    ]
    assert [phases[name].hsd_target for name in ("SDS", "HSD")] == ["none", "teacher"]
    assert [name for name, config in configs.items() if not config.time_aware] == ["HSD + D"]
    options.student = None
    assert parse(METHODS.training("HSD", 0, options)[3:]).initial_student is None


def test_what_was_stopped_goes_on(options, tmp_path):
    assert "--resume_from_checkpoint" not in ABLATION.training("TSD without DASM", 1, options)
    (tmp_path / "tsd_without_dasm-1" / "checkpoints").mkdir(parents=True)
    assert ABLATION.training("TSD without DASM", 1, options)[-2:] == ["--resume_from_checkpoint", "latest"]


def rows():
    values = {("start", 0): (24.0, 9.0), ("VSD", 0): (25.0, 8.0), ("VSD", 1): (26.0, 7.0), ("TSD", 0): (25.25, 7.0)}
    return [
        {
            "variant": variant,
            "seed": seed,
            "realsr": {"psnr": psnr, "niqe": niqe, "edge_energy": 0.5},
            "losses": [{"step": step, "phase": "ablation", "pixel_l1": 1 / step} for step in (1, 2)],
        }
        for (variant, seed), (psnr, niqe) in values.items()
    ]


def test_the_table():
    assert ABLATION.table(rows(), "realsr").splitlines() == [
        "| | PSNR-Y | NIQE | edge energy |",
        "| --- | --- | --- | --- |",
        "| start | 24.00 | 9.00 | 0.5000 |",
        "| VSD | **25.50 ± 0.71** | 7.50 ± 0.71 | 0.5000 ± 0.0000 |",
        "| TSD | 25.25 | **7.00** | 0.5000 |",
    ]


def test_tables_of_a_file(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(rows()))
    ABLATION.main(["--tables", "--results", str(tmp_path / "results.json")])
    assert capsys.readouterr().out == f"RealSR\n\n{ABLATION.table(rows(), 'realsr')}\n\n"


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    ABLATION.draw(rows(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_crops(tmp_path, monkeypatch):
    """A row a photograph, a column a model: the start and the runs that are there, beside bicubic and the truth."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for index in range(3):
        Image.effect_noise((64, 64), 40 + index).convert("RGB").save(photographs / f"p{index}_00.png")
    (tmp_path / "runs" / "vsd-1").mkdir(parents=True)
    (tmp_path / "runs" / "vsd-1" / "pipeline").symlink_to(EMBEDDED)
    drawn = []
    monkeypatch.setattr(comparison, "draw_rows", lambda title, rows: (drawn.extend(rows), draw_rows(title, rows))[1])
    command = [photographs, "--base", "base", "--student", EMBEDDED, "--output_dir", tmp_path / "runs", "--seeds", 1]
    ABLATION.main([*map(str, command), "--held_aside", "2", "--crops", str(tmp_path / "crops.png")])
    assert [[cell.label for cell in row] for row in drawn] == [["bicubic", "start", "VSD", "photograph"]] * 2
    for row in drawn:
        bicubic, start, vsd, photograph = (cell.rgb for cell in row)
        assert np.array_equal(start, vsd) and not np.array_equal(start, bicubic) and photograph.shape == (64, 64, 3)
    assert Image.open(tmp_path / "crops.png").width > 4 * 64
