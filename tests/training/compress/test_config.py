"""Settings of a compression: recipes that ship with it, flags, and what a card says of them."""

import pytest
import yaml

from tsdsr.training.compress import even_groups
from tsdsr.training.compress.config import SECTIONS, STAGES, parse
from tsdsr.training.config import RECIPES, ConfigError

REST = ["--model", "m", "--train_data_dir", "x"]


@pytest.mark.parametrize("name", ["tinysr_sd3", "tinysr_tiny_cpu", "compression"])
def test_a_recipe_can_be_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(["--recipe", name, *REST])
    said = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    left_out = [section for section in SECTIONS if section in said and said[section] is None]
    assert config.recipe == f"{name}.yaml" and config.stages == tuple(one for one in STAGES if one not in left_out)
    for section in SECTIONS.keys() & said.keys() - set(left_out):
        for setting, value in said[section].items():
            assert getattr(getattr(config, section), setting) == value


def test_the_published_numbers():
    """arXiv 2508.17434, supplement: steps, rates, weights, and images in a step of 8 GPUs."""
    config = parse(["--recipe", "tinysr_sd3", *REST])
    stages = config.trained()
    assert [stage.steps for stage in stages.values()] == [100_000, 200_000, 100_000, 150_000, 50_000]
    assert [stage.learning_rate for stage in stages.values()] == [3e-4, 5e-4, 5e-5, 1e-4, 1e-6]
    pictures = [8 * stage.train_batch_size * stage.gradient_accumulation_steps for stage in stages.values()]
    assert pictures == [64, 64, 8, 128, 96]
    assert config.decoder.weights() == {"lpips": 3.0} and config.decoder.adversarial == 1.0
    assert config.search.weights("latent_l1") == {"latent_l1": 1.0, "lpips": 1.0}
    assert config.refine.weights("latent_l1") == {"latent_l1": 5.0, "lpips": 1.0} and config.refine.adversarial == 0.3
    rates = [config.run_of(name, "x").discriminator_learning_rate for name in ("decoder", "refine")]
    assert rates == [1e-5, 5e-6] and config.run.seed == 80
    assert config.encoder.separable and not config.decoder.separable and config.prune.text_stream == "none"
    assert config.search.layout(24) == even_groups(24, 4, 2)
    assert config.search.annealing().at(1.0) == pytest.approx((0.1, 100.0))


def test_what_is_typed_wins(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("{seed: 3, random_flip: false, search: {steps: 5, groups: [[3, 1], [1, 1]]}, refine: null}")
    config = parse(["--recipe", str(recipe), "--search.steps", "7", "--seed", "4", "--restore", "null", *REST])
    assert (config.search.steps, config.run.seed, config.run.random_flip) == (7, 4, False)
    assert config.stages == ("encoder", "decoder", "search", "prune", "bake") and config.recipe == "own.yaml"
    assert [(group.size, group.keep) for group in config.search.layout(4)] == [(3, 1), (1, 1)]
    assert parse([*REST, "--random_flip"]).run.random_flip and not parse([*REST, "--no-random_flip"]).run.random_flip
    assert parse([*REST, "--stages", "bake", "search"]).stages == ("search", "bake")


def test_photographs_are_needed_where_they_are_looked_at():
    assert parse(["--model", "m", "--stages", "prune", "bake"]).stages == ("prune", "bake")
    with pytest.raises(ConfigError, match="Name the photographs by exactly one of"):
        parse(["--model", "m", "--stages", "restore", "bake"])


def test_a_card_has_what_differs_from_the_defaults():
    said = parse([*REST, "--search.steps", "7", "--restore", "null", "--seed", "4"]).to_dict()
    assert said == {"train_data_dir": "x", "seed": 4, "search": {"steps": 7}, "restore": None}


def test_what_a_stage_depends_on():
    """Its own settings by name; a stage that is left out is one too."""
    config = parse([*REST, "--restore", "null", "--refine.rank", "3"])
    found = config.settings_of(["restore", "refine"])
    assert found["restore"] is None and found["refine.rank"] == 3 and found["seed"] == 0
    assert "search.steps" not in found and "output_dir" not in found


@pytest.mark.parametrize("groups", [[4, 2], [["a", 1]], [[2, 3]], "all"])
def test_groups_that_are_none(groups):
    config = parse(REST)
    config.search.groups = groups
    with pytest.raises(ConfigError):
        config.search.layout(4)
