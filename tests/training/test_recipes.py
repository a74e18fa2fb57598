"""The recipes that ship with the trainer say things that exist."""

from pathlib import Path

import pytest
import yaml

import tsdsr
from tsdsr.training.config import parse

RECIPES = sorted((Path(tsdsr.__file__).resolve().parent / "training" / "recipes").glob("*.yaml"))
DISTILLED = [path for path in RECIPES if "phases" in yaml.safe_load(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", DISTILLED, ids=lambda path: path.stem)
def test_a_recipe_can_be_run(path):
    """Unknown settings, values of other kinds and phases without steps would be a `ConfigError`."""
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = {"pretrained_model_name_or_path", "pretrain"} & said.keys()
    base = [] if own else ["--pretrained_model_name_or_path", "base"]  # a recipe for any base
    config = parse(["--config", str(path), "--train_data_dir", "x", *base])
    assert config.recipe == path.name
    assert config.max_train_steps == sum(phase["steps"] for phase in said["phases"])
    assert [phase.name for phase in config.phases] == [phase["name"] for phase in said["phases"]]
    assert config.learning_rate == float(said["learning_rate"])
    if config.pretrain:
        from tsdsr.training.pretrain import PretrainConfig

        settings = PretrainConfig.from_dict(config.pretrain)
        assert settings.teacher.steps == said["pretrain"]["teacher"]["steps"]
        vae, family, denoiser = settings.build()
        assert denoiser.config.in_channels == (1 + family.conditioned) * vae.config.latent_channels


def test_there_are_recipes():
    assert {"tiny_cpu", "tsdsr_sd3_medium", "tsdsr_sd21", "tadsr_sd3_medium", "tadsr_sd21", "tadsr_tiny_cpu"} <= {
        path.stem for path in DISTILLED
    }


def test_the_published_schedule():
    """Reconstruction without DASM, then distillation with it and a weight that goes up (train/train.py)."""
    (path,) = (path for path in DISTILLED if path.stem == "tsdsr_sd3_medium")
    config = parse(["--config", str(path), "--train_data_dir", "x"])
    first, last = config.phase_at(0)[0], config.phase_at(config.max_train_steps - 1)[0]
    assert (first.dasm_steps, last.dasm_steps) == (1, 4) and config.learning_rate == 5e-6
    assert "latent_mse" in first.weights(0) and "latent_mse" not in last.weights(0)
    assert (last.weights(0)["tsd"], last.weights(1)["tsd"]) == (1.0, 2.0)
    assert first.guidance_scale == last.guidance_scale == 7.5 and first.vsd_weight == 0.7


@pytest.mark.parametrize("name", ["tiny_cpu", "recipes/tiny_cpu.yaml"])
def test_a_recipe_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", name, "--train_data_dir", "x"]).recipe == "tiny_cpu.yaml"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny_cpu.yaml").write_text(
        "{seed: 7, pretrained_model_name_or_path: b, max_train_steps: 1}"
    )
    assert parse(["--config", "recipes/tiny_cpu.yaml", "--train_data_dir", "x"]).seed == 7


@pytest.mark.parametrize("name", ["tadsr_sd21", "tadsr_sd3_medium"])
def test_the_published_numbers_of_tad_sr(name):
    """Of the variant for Stable Diffusion 2 (train_tadsr.py): weights, rates, steps; no fake score."""
    config = parse(["--config", name, "--train_data_dir", "x"])
    (phase,) = config.phases
    assert phase.weights(0) == {"teacher_mse": 0.2, "hsd": 1.0, "latent_adversarial": 0.2}
    assert config.learning_rate == config.discriminator_learning_rate == 2e-5 and config.max_train_steps == 30000
    assert (phase.hsd_target, phase.judged_real, phase.hsd_noise, phase.hsd_share) == ("teacher", "hq", "gaussian", 0.2)
    assert phase.guidance_scale == 1 and config.guided()
