"""Recipes and flags: what is said where, what wins, and what is refused in one sentence."""

import dataclasses

import pytest
import yaml

from tsdsr.training.config import ConfigError, DistillConfig, Phase, parse, reason

BASE = ("--pretrained_model_name_or_path", "base")
DATA = ("--train_data_dir", "photographs")
ENOUGH = (*BASE, *DATA, "--max_train_steps", "8")


@pytest.fixture
def recipe(tmp_path):
    """A function from a recipe's text or settings to the flags that name it."""

    def write(content):
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return ["--config", str(path)]

    return write


TWO_PHASES = """
pretrained_model_name_or_path: base
train_data_dir: photographs
learning_rate: 1e-5
max_train_steps: 2e3
gradient_checkpointing: true
dasm_steps: 3
tsd: 0.5
phases:
  - {name: one, steps: 10, latent_mse: 1e-1, dasm_steps: 1}
  - {name: two, steps: 20, tsd: [1, 2], latent_mse: 0}
"""


def test_a_recipe(recipe):
    config = parse(recipe(TWO_PHASES))
    assert config.learning_rate == 1e-5 and config.max_train_steps == 2000 and config.gradient_checkpointing is True
    one, two = config.phases
    assert (one.name, one.steps, one.latent_mse, one.tsd, one.dasm_steps) == ("one", 10, [0.1], [0.5], 1)
    assert (two.name, two.steps, two.latent_mse, two.tsd, two.dasm_steps) == ("two", 20, [0.0], [1.0, 2.0], 3)
    assert config.recipe == "recipe.yaml" and config.rank == 64


def test_flags_win_over_the_recipe_in_all_phases(recipe):
    flags = ["--learning_rate", "2e-4", "--dasm_steps", "2", "--tsd", "3", "4", "--rank", "8", "--vsd_weight", "1"]
    config = parse([*recipe(TWO_PHASES), *flags, "--no_gradient_checkpointing", "--no_dasm_jitter"])
    assert config.learning_rate == 2e-4 and config.rank == 8 and config.gradient_checkpointing is False
    for phase in config.phases:
        assert (phase.dasm_steps, phase.tsd, phase.vsd_weight, phase.dasm_jitter) == (2, [3.0, 4.0], 1.0, False)
    assert [phase.latent_mse for phase in config.phases] == [[0.1], [0.0]]


def test_without_a_recipe_there_is_one_phase():
    config = parse([*ENOUGH, "--guidance_scale", "3"])
    (phase,) = config.phases
    assert phase == Phase(guidance_scale=3.0) and config.recipe is None and config.max_train_steps == 8
    assert config.phase_at(0) == (phase, 0.0) and config.phase_at(7) == (phase, 1.0)


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(DistillConfig) if item.type is bool])
def test_booleans_are_switches(name):
    for spelling in (name, name.replace("_", "-")):
        assert getattr(parse([*ENOUGH, f"--{spelling}"]), name) is True
    for spelling in (f"no_{name}", f"no-{name.replace('_', '-')}"):
        assert getattr(parse([*ENOUGH, f"--{spelling}"]), name) is False


def test_unknown_flags_are_refused(capsys):
    """Abbreviations too, and what only a recipe can say."""
    for flag in ("--rnak", "--learning_rat", "--phases", "--pretrain", "--recipe", "--steps", "--name"):
        with pytest.raises(SystemExit) as stopped:
            parse([*ENOUGH, flag, "1"])
        assert stopped.value.code == 2 and f"unrecognized arguments: {flag} 1" in capsys.readouterr().err


def test_phases_follow_each_other_and_the_last_goes_on():
    phases = [Phase(name="a", steps=3), Phase(name="b", steps=1), Phase(name="c", steps=4)]
    config = DistillConfig(pretrained_model_name_or_path="base", train_data_dir="x", phases=phases, max_train_steps=12)
    found = [(phase.name, progress) for phase, progress in map(config.phase_at, range(12))]
    assert found == [
        *(("a", 0.0), ("a", 0.5), ("a", 1.0)),
        ("b", 0.0),
        *(("c", 0.0), ("c", 1 / 3), ("c", 2 / 3), ("c", 1.0)),
        *[("c", 1.0)] * 4,
    ]


def test_a_last_phase_without_steps_takes_what_is_left():
    phases = [Phase(name="a", steps=3), Phase(name="b")]
    config = DistillConfig(pretrained_model_name_or_path="base", train_data_dir="x", phases=phases, max_train_steps=8)
    assert config.phase_at(3) == (phases[1], 0.0) and config.phase_at(5) == (phases[1], 0.5)
    assert config.phase_at(7) == (phases[1], 1.0)


def test_weights_go_in_a_straight_line():
    phase = Phase(latent_mse=[0.0], tsd=[1.0, 3.0], pixel_l1=[0.0, 2.0], lpips=[2.0, 0.0])
    assert phase.weights(0.0) == {"tsd": 1.0, "pixel_l1": 0.0, "lpips": 2.0}
    assert phase.weights(0.25) == {"tsd": 1.5, "pixel_l1": 0.5, "lpips": 1.5}
    assert phase.weights(1.0) == {"tsd": 3.0, "pixel_l1": 2.0, "lpips": 0.0}
    assert phase.uses("lpips") and not phase.uses("latent_mse")
    assert phase.uses(*Phase.PICTURES) and not phase.uses(*Phase.ADVERSARIAL)
    phase = Phase(adversarial=[0.0, 0.1])
    assert phase.weights(0.5)["adversarial"] == 0.05 and phase.uses(*Phase.ADVERSARIAL)


def test_steps_in_which_a_term_counts():
    phases = [Phase(name="a", steps=3), Phase(name="b", steps=2, adversarial=[0.1]), Phase(name="c", steps=4)]
    phases[2].feature_matching = [0.0, 1.0]
    config = DistillConfig(pretrained_model_name_or_path="base", train_data_dir="x", phases=phases)
    assert config.steps_using("adversarial") == 2 and config.steps_using(*Phase.ADVERSARIAL) == 6
    assert config.steps_using("tsd") == 9 and config.steps_using("lpips") == 0


def test_the_settings_as_a_recipe_are_the_same_settings(recipe, tmp_path):
    flags = ["--no_random_flip", "--hub_token", "hf_secret", "--validation_metrics", "psnr_y", "--report_to", "wandb"]
    config = parse([*recipe(TWO_PHASES), *flags])
    said = config.to_dict()
    assert "hf_secret" not in str(said) and "hub_token" not in said and "recipe" not in said
    assert "rank" not in said, "defaults need not be said"
    again = parse(recipe(yaml.safe_dump(said, sort_keys=False)))
    assert again == dataclasses.replace(config, hub_token=None)


TERMS = ("latent_mse", "teacher_mse", "tsd", "vsd_weight", "dasm_steps", "hsd", "latent_adversarial")
OF_METHODS = {
    "tsd": ([1.0], [0.0], [1.0], 0.7, 4, [0.0], [0.0]),
    "vsd": ([1.0], [0.0], [1.0], 1.0, 1, [0.0], [0.0]),
    "tad": ([0.0], [1.0], [0.0], 0.7, 4, [1.0], [0.02]),
}


def terms_of(phase):
    return tuple(getattr(phase, name) for name in TERMS)


@pytest.mark.parametrize("objective", OF_METHODS)
def test_a_method_is_one_line(recipe, objective):
    """Of a recipe, of one of its phases, or a flag; and its own terms as a recipe are the same settings."""
    for flags in (
        ["--objective", objective],
        recipe({"objective": objective}),
        recipe(f"phases: [{{objective: {objective}}}]"),
    ):
        config = parse([*ENOUGH, *flags])
        (phase,) = config.phases
        assert phase.objective == objective and terms_of(phase) == OF_METHODS[objective]
        assert parse(recipe(config.to_dict())).phases == [phase]


def test_what_is_said_wins_over_the_method(recipe):
    said = {"objective": "tad", "hsd": 2, "phases": [{"steps": 2}, {"objective": "vsd", "dasm_steps": 3}]}
    tad, vsd = parse([*ENOUGH, *recipe(said)]).phases
    assert tad.hsd == [2.0] and tad.teacher_mse == [1.0] and tad.tsd == [0.0]
    assert (vsd.hsd, vsd.dasm_steps, vsd.vsd_weight, vsd.tsd) == ([2.0], 3, 1.0, [1.0])
    (phase,) = parse([*ENOUGH, "--objective", "tad", "--latent_adversarial", "0", "--latent_mse", "0.5"]).phases
    assert phase.latent_adversarial == [0.0] and phase.latent_mse == [0.5] and phase.hsd == [1.0]
    (phase,) = parse([*ENOUGH, *recipe({"objective": "tad", "hsd": 2}), "--objective", "tad"]).phases
    assert phase.hsd == [2.0]


def test_a_method_that_is_typed_is_not_mixed_with_that_of_the_recipe(recipe):
    one, two = parse([*ENOUGH, *recipe(TWO_PHASES), "--objective", "tad", "--hsd", "3"]).phases
    for phase in (one, two):
        assert terms_of(phase) == (*OF_METHODS["tad"][:5], [3.0], [0.02])
    assert (one.steps, two.steps) == (10, 20)
    recipe = recipe({"objective": "tad", "hsd": 2, "pixel_l1": 3})
    (phase,) = parse([*ENOUGH, *recipe, "--objective", "tsd"]).phases
    assert terms_of(phase) == OF_METHODS["tsd"] and phase.pixel_l1 == [3.0]


def test_who_needs_the_empty_prompt():
    def guided(*flags):
        return parse([*ENOUGH, *flags]).guided()

    assert guided() and not guided("--guidance_scale", "1") and not guided("--tsd", "0")
    assert guided("--objective", "tad") and not guided("--objective", "tad", "--guidance_scale", "1")
    only = ["--objective", "tad", "--guidance_scale", "1", "--teacher_guidance_scale", "3"]
    assert guided(*only) and not guided(*only, "--hsd_target", "none", "--teacher_mse", "0")
    assert guided(*only, "--hsd_target", "hq", "--teacher_mse", "0", "--judged_real", "teacher")


def test_a_base_that_is_typed_stands_for_the_one_a_recipe_would_train(recipe):
    section = {"vae": {}, "transformer": {}}
    config = parse([*recipe({"pretrain": section, "guidance_scale": 1}), *DATA, *BASE, "--max_train_steps", "1"])
    assert config.pretrain is None and config.pretrained_model_name_or_path == "base"


def test_a_pretrained_base_is_said_as_well(recipe):
    section = {"vae": {"latent_channels": 4}, "autoencoder": {"steps": 2}}
    config = parse([*recipe({"pretrain": section, "guidance_scale": 1}), *DATA, "--max_train_steps", "1"])
    assert config.pretrain == section
    assert parse(recipe(config.to_dict())) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--initial_student", "x"], "initial_student is a whole network, not a LoRA"),
        (
            ["--initial_student", "x", "--train_type", "full", "--vae_encoder", "lora"],
            "initial_student has an encoder of its own",
        ),
        (["--train_type", "half"], "train_type must be one of lora, full, not 'half'."),
        (["--vae_encoder", "no"], "vae_encoder must be one of lora, full, frozen, not 'no'."),
        (["--vae_decoder", "lora"], "vae_decoder must be one of full, frozen, not 'lora'."),
        (["--adversarial_loss", "wgan"], "adversarial_loss must be one of hinge, relativistic, not 'wgan'."),
        (["--objective", "add"], "objective must be one of tsd, vsd, tad, not 'add'."),
        (["--hsd_target", "lq"], "hsd_target must be one of teacher, hq, none, not 'lq'."),
        (["--judged_real", "lq"], "judged_real must be one of hq, teacher, not 'lq'."),
        (["--hsd_noise", "pink"], "hsd_noise must be one of gaussian, uniform, not 'pink'."),
        (["--judged_noise", "pink"], "judged_noise must be one of gaussian, uniform, not 'pink'."),
        (["--hsd_share", "0"], "hsd_share must be above 0 and at most 1, not 0.0."),
        (["--judged_share", "1.5"], "judged_share must be above 0 and at most 1, not 1.5."),
        (["--teacher_strength", "0"], "teacher_strength must be above 0 and at most 1, not 0.0."),
        (["--teacher_sampler", "dpm"], "teacher_sampler must be one of euler, heun, not 'dpm'."),
        (["--degrade_on", "disk"], "degrade_on must be one of worker, device, not 'disk'."),
        (["--output", "all"], "output must be one of lora, merged, both, not 'all'."),
        (["--mixed_precision", "fp8"], "mixed_precision must be one of no, fp16, bf16, not 'fp8'."),
        *(
            ([f"--{name}", "0"], f"{name} must be at least 1, not 0.")
            for name in (
                *("rank", "fake_score_rank", "vae_rank", "resolution", "scale", "train_batch_size", "lr_num_cycles"),
                *("gradient_accumulation_steps", "fake_score_updates", "checkpointing_steps", "logging_steps"),
                *("checkpoints_total_limit", "dasm_steps", "dasm_spacing"),
                *(
                    "discriminator_width",
                    "discriminator_layers",
                    "discriminator_scales",
                    "grid_period",
                    "teacher_steps",
                ),
                *("latent_discriminator_depths", "latent_discriminator_votes"),
            )
        ),
        *(
            ([f"--{name}", "-1"], f"{name} must be at least 0, not -1")
            for name in (
                *("dataloader_num_workers", "validation_photographs", "max_validation_images", "seed"),
                *("max_train_steps", "learning_rate", "fake_score_learning_rate", "lr_warmup_steps", "adam_epsilon"),
                *("adam_weight_decay", "validation_steps", "mild_degradation"),
                *("discriminator_learning_rate", "r1_weight", "latent_discriminator_width"),
                "discriminator_shift",
            )
        ),
        (["--validation_size", "8"], "validation_size must be at least 16, not 8."),
        (["--ema_decay", "1"], "ema_decay must be from 0 to below 1, not 1.0."),
        (["--adam_beta2", "1"], "adam_beta2 must be from 0 to below 1, not 1.0."),
        (["--discriminator_beta1", "1"], "discriminator_beta1 must be from 0 to below 1, not 1.0."),
        (["--max_grad_norm", "0"], "max_grad_norm must be above 0, not 0.0."),
        (["--mild_degradation", "1.5"], "mild_degradation must be from 0 to 1, not 1.5."),
        (["--adversarial_evidence", "26"], "adversarial_evidence must be two numbers, the lower first, not [26.0]."),
        (
            ["--adversarial_evidence", "31", "26"],
            "adversarial_evidence must be two numbers, the lower first, not [31.0, 26.0].",
        ),
        (["--learning_rate", "nan"], "learning_rate cannot be nan; it is a number."),
        (["--resolution", "30"], "resolution (30) must be a multiple of scale (4)."),
        (["--train_type", "full", "--output", "lora"], "train_type full has no LoRA to write: use output merged."),
        (
            ["--vae_decoder", "full", "--pixel_l1", "1", "--output", "lora"],
            "vae_decoder full trains weights that a LoRA cannot hold: use output merged.",
        ),
        (["--vae_decoder", "full"], "vae_decoder full needs a term that looks at pictures: give one of pixel_l1, "),
        (
            ["--adversarial", "1", "--discriminator_layers", "6", "--resolution", "32"],
            "A discriminator with 6 strided layers (discriminator_layers) needs crops of at least 64 pixels, not 32.",
        ),
        (
            ["--adversarial", "1", "--discriminator_kind", "multiscale", "--resolution", "28"],
            "A discriminator with 3 strided layers (discriminator_layers) at 3 sizes (discriminator_scales) needs "
            "crops of at least 32 pixels, not 28.",
        ),
        (
            ["--adversarial", "1", "--discriminator_shift", "8", "--resolution", "12"],
            "A discriminator with 3 strided layers (discriminator_layers), shifted by 8 (discriminator_shift), needs "
            "crops of at least 16 pixels, not 12.",
        ),
        (
            ["--discriminator_sees_lq", "--discriminator_kind", "dino"],
            "discriminator_sees_lq is for discriminator_kind patch and multiscale, not dino.",
        ),
        (["--grid_l1", "1", "--resolution", "12"], "grid_l1 needs crops of at least 16 pixels (grid_period)."),
        (["--discriminator_kind", "vit"], "discriminator_kind must be one of patch, multiscale, dino, not 'vit'."),
        (["--dataset_name", "x"], "exactly one of train_data_dir, dataset_name and data_files, not by train_data_dir"),
        (["--validation_lq_dir", "x"], "validation_lq_dir holds partners of those in validation_dir"),
        (["--prompt", "x", "--prompt_embeds", "y"], "as text (prompt) or as embeddings (prompt_embeds), not as both."),
        (["--latent_mse", "1", "2", "3"], "latent_mse takes one weight, or two to go from one to the other."),
        (["--pixel_l1", "-1"], "pixel_l1 must not have a negative weight (-1.0)."),
        (["--dasm_steps", "5"], "step_weights must hold 5 weights, one for each point (dasm_steps), not 4."),
        (["--latent_mse", "0", "--tsd", "0"], "Phase 'train' has no loss: give one of its terms a weight."),
        (["--config", "nowhere.yaml"], "The recipe nowhere.yaml cannot be read (No such file or directory)."),
    ],
)
def test_flags_that_cannot_be_used_are_one_sentence(flags, message):
    with pytest.raises(ConfigError) as refused:
        parse([*ENOUGH, *flags])
    assert message in str(refused.value) and "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_what_is_missing_is_named():
    for flags, message in (
        ([*BASE, "--max_train_steps", "8"], "exactly one of train_data_dir, dataset_name and data_files."),
        ([*DATA, "--max_train_steps", "8"], "Name a base (pretrained_model_name_or_path) or have one trained"),
        ([*BASE, *DATA], "Phase 'train' has no steps, and max_train_steps is not given."),
        (
            [*BASE, "--dataset_name", "x", "--train_lq_dir", "y", "--max_train_steps", "8"],
            "train_lq_dir holds partners of the photographs in train_data_dir",
        ),
    ):
        with pytest.raises(ConfigError) as refused:
            parse(flags)
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rnak: 4", "has settings that do not exist: rnak."),
        ("1: 4", "has settings that do not exist: 1."),
        ("phases: [{lerning_rate: 4}]", "A phase in"),
        ("phases: [{learning_rate: 4}]", "has settings that do not exist: learning_rate."),
        ("phases: 4", "must be a list of phases"),
        ("phases: [reconstruction]", "must be a list of phases"),
        ("phases: {name: one}", "must be a list of phases"),
        ("", "must hold settings and their values."),
        ("- rank", "must hold settings and their values."),
        ("rank: 4\nseed: [", "is not YAML (line 2:"),
        ("rank: many", "rank cannot be 'many'; it is a whole number."),
        ("rank: 4.5", "rank cannot be 4.5; it is a whole number."),
        ("rank: true", "rank cannot be True; it is a whole number."),
        ("rank: .inf", "rank cannot be inf; it is a whole number."),
        ("rank: null", "rank cannot be None; it is a whole number."),
        ("learning_rate: fast", "learning_rate cannot be 'fast'; it is a number."),
        ("learning_rate: false", "learning_rate cannot be False; it is a number."),
        ("push_to_hub: 1", "push_to_hub cannot be 1; it is true or false."),
        ("output_dir: 5", "output_dir cannot be 5; it is text."),
        ("prompt: 5", "prompt cannot be 5; it is text."),
        ("timestep: late", "timestep cannot be 'late'; it is a number."),
        ("checkpoints_total_limit: few", "checkpoints_total_limit cannot be 'few'; it is a whole number."),
        ("data_files: 5", "data_files cannot be 5; it is a list of texts."),
        ("pretrain: 5", "pretrain cannot be 5; it is a section with settings of its own."),
        ("objective: [tad]", "objective cannot be ['tad']; it is text."),
        ("objective: add", "objective must be one of tsd, vsd, tad, not 'add'."),
        ("tsd: true", "tsd cannot be [True]; it is a list of numbers."),
        ("step_weights: '11'", "step_weights cannot be '11'; it is a list of numbers."),
        ("phases: [{steps: 0, name: one}, {steps: 2}]", "Phase 'one' has no steps, which only the last phase may"),
        ("phases: [{steps: -2, name: one}]", "steps must be at least 0, not -2."),
    ],
)
def test_recipes_that_cannot_be_used_are_one_sentence(recipe, content, message):
    with pytest.raises(ConfigError) as refused:
        parse([*recipe(content), *ENOUGH])
    assert message in str(refused.value) and "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="is not YAML"):
        parse([*ENOUGH, "--config", str(tmp_path / "weights.bin")])


def test_a_base_and_one_that_is_trained(recipe):
    with pytest.raises(ConfigError, match=r"\(pretrain\), not both\."):
        both = {"pretrain": {"vae": {}}, "guidance_scale": 1, "pretrained_model_name_or_path": "base"}
        parse([*recipe(both), *DATA, "--max_train_steps", "8"])
    with pytest.raises(ConfigError, match=r"has no empty prompt for guidance: set guidance_scale 1\."):
        parse([*recipe({"pretrain": {"vae": {}}}), *DATA, "--max_train_steps", "8"])


def test_all_weights_have_no_lora():
    assert parse([*ENOUGH, "--train_type", "full"]).output == "merged"
    assert parse([*ENOUGH, "--vae_decoder", "full", "--pixel_l1", "1"]).output == "merged"


def test_the_reason_of_an_error():
    assert reason(ValueError("\n first \nsecond")) == "first"
    assert reason(TimeoutError()) == "TimeoutError"
