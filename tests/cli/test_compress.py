"""The command `tsdsr compress`: what it refuses, in one sentence, and what it makes."""

import json

import numpy as np
import pytest

from tsdsr.imaging import Picture, write


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).random((16, 16, 3), dtype=np.float32)
        write(Picture(pixels), folder / f"{index}.png")
    return folder


@pytest.fixture
def compress(tsdsr, model, photographs, tmp_path):
    """Function that runs the command on the tiny pipeline; later options win over its own."""

    def run(*arguments):
        common = ("--model", model, "--train_data_dir", photographs, "--output_dir", tmp_path / "out")
        return tsdsr("compress", *common, *arguments)

    return run


def test_it_makes_a_model(compress, tmp_path):
    result = compress(
        "--search.method", "first", "--search.group_size", "2", "--search.keep", "1", "--stages", "search", "prune"
    )
    assert result.exit_code == 0 and result.stdout == f"{tmp_path / 'out' / '4_pruned'}\n"
    assert json.loads((tmp_path / "out" / "3_search" / "search.json").read_text())["kept"] == [0]
    assert json.loads((tmp_path / "out" / "4_pruned" / "transformer" / "config.json").read_text())["num_layers"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--search.steps", "many"), "search.steps cannot be 'many'; it is a whole number."),
        (("--search.stps", "1"), "Unrecognized arguments: --search.stps 1; see --help."),
        (("--search.method", "best"), "search.method must be one of tinysr, tinyfusion, "),
        (("--search.tau", "[0]"), "tau must be one or two numbers above 0, not [0.0]."),
        (("--search.kept", "[0]"), "search.kept goes with search.method given, and only with that."),
        (("--search.latent_l1", "0"), "search has no loss: "),
        (("--search.group_size", "0"), "search.group_size must be at least 1, not 0."),
        (
            ("--encoder.num_blocks", "[1, x]"),
            "encoder.num_blocks must be a list of whole numbers from 0, not [1, 'x'].",
        ),
        (("--encoder.separable", "yes please"), "encoder.separable cannot be 'yes please'; it is true or false."),
        (("--decoder.encoder_features", "0"), "decoder has no loss but the adversarial one: "),
        (("--refine.adversarial", "-1"), "refine.adversarial must be at least 0, not -1.0."),
        (("--refine.adversarial_from", "2"), "refine.adversarial_from must be from 0 to 1, not 2.0."),
        (("--refine.resolution", "4"), "needs crops of at least 8 pixels, not 4."),
        (("--restore.latent_l1", "0"), "restore.latent_l1 must be above 0: "),
        (("--restore.ema_decay", "1"), "restore.ema_decay must be from 0 to below 1, not 1.0."),
        (("--bake.dtype", "int8"), "bake.dtype must be one of fp32, fp16, bf16, not 'int8'."),
        (("--prune.text_stream", "half"), "prune.text_stream must be one of none, full, not 'half'."),
        (("--stages", "F"), "stages are encoder, decoder, search, prune, restore, refine, bake, not F."),
        (
            ("--scale", "3", "--encoder.resolution", "16"),
            "The section encoder cannot be used (resolution must be a multiple",
        ),
        (("--seed", "-1"), "seed must be at least 0, not -1."),
        (("--recipe", "nothing"), "The recipe nothing cannot be read (No such file or directory)."),
        (("--recipe", "tiny_cpu"), "The setting pretrain does not exist."),
        (("--encoder.resolution", "20"), "encoder: sides of crops must be multiples of 8 for "),
        (
            ("--search.groups", "[[4, 2]]", "--stages", "search"),
            "search.groups holds 4 blocks, but the transformer has 2.",
        ),
        (("--search.method", "given", "--search.kept", "[0, 7]"), "must be rising numbers from 0 to 1, not [0, 7]."),
        (("--search.method", "given", "--search.kept", "[a]"), "search.kept must list numbers of blocks, not ['a']."),
        (("--encoder.num_blocks", "[1, 1]"), "encoder.num_blocks must list 3 numbers, one for each size between "),
        (("--train_data_dir", "nowhere"), "train_data_dir nowhere is not a folder."),
        (("--stages", "prune"), "The stage prune begins with what search leaves, and "),
        (("--model", "nothing/here/at_all"), "The model nothing/here/at_all cannot be loaded ("),
    ],
)
def test_what_it_refuses(compress, tmp_path, arguments, message):
    result = compress(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_models_that_cannot_be_compressed(compress, tsdsr, model, make_pipeline, tmp_path):
    assert tsdsr("bake", model, "-o", tmp_path / "baked").exit_code == 0
    result = compress("--model", tmp_path / "baked", "--stages", "search")
    assert result.exit_code == 2 and "is baked, so that there are no prompt and timestep" in result.stderr
    make_pipeline("tiny", "unet").save_pretrained(tmp_path / "unet")
    result = compress("--model", tmp_path / "unet", "--stages", "search")
    assert result.exit_code == 2 and "has no SD3 transformer, and no other network can be compressed" in result.stderr


def test_help(tsdsr):
    result = tsdsr("compress", "--help")
    assert result.exit_code == 0
    assert all(
        said in result.stdout for said in ("--recipe", "--search.partner", "--train_data_dir", "leave this stage out")
    )


def test_a_model_is_needed(tsdsr, tmp_path):
    result = tsdsr("compress", "--train_data_dir", tmp_path)
    assert result.exit_code == 2 and "Name the one-step model that is compressed (model)." in result.stderr
