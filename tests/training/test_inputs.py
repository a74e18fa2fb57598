"""Which photographs are read for which settings, and that those held aside are never trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tsdsr.imaging import Picture, find_images, write
from tsdsr.training.config import ConfigError
from tsdsr.training.data import BatchSettings, Folder, Pairs, PreparedShards, load_uint8
from tsdsr.training.data.prepare import prepare
from tsdsr.training.inputs import batch_settings, open_photographs, read_batches


@pytest.fixture
def open_(config, tmp_path):
    """A function that opens what settings name."""
    return lambda **changed: open_photographs(config(tmp_path / "run", **changed))


@pytest.fixture(scope="module")
def shards(base_folder, photographs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(str(base_folder), photographs, folder, resolution=32, num_workers=0, device="cpu")
    return folder


@pytest.fixture(scope="module")
def partners(photographs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("partners")
    for path in find_images(photographs):
        small = F.avg_pool2d(load_uint8(path)[None].float() / 255, 4)[0]
        write(Picture(small.permute(1, 2, 0).numpy()), folder / path.name)
    return folder


def test_photographs_held_aside_are_never_trained_on(open_, photographs):
    found = open_(validation_photographs=3)
    held = {name for name, _, _ in found.validation}
    trained = {path.stem for path in found.paths}
    assert len(held) == 3 and len(trained) == 5 and not held & trained
    assert isinstance(found.source, Folder) and found.source.paths == found.paths
    settings = BatchSettings(train_batch_size=4, resolution=32)
    seen = {name for batch in read_batches(found.source, settings, stop=8) for name in batch["names"]}
    assert seen == {path.name for path in found.paths}
    assert found.facts == {
        "photographs": f"5 pictures of the folder {photographs.name}",
        "validation": "3 photographs of the folder, held aside",
    }


def test_a_photograph_is_held_aside_with_all_of_its_crops(open_, photographs, tmp_path):
    folder = tmp_path / "crops"
    shutil.copytree(photographs, folder)
    for path in find_images(photographs):
        shutil.copy(path, folder / path.name.replace("_00.", "_01."))
    found = open_(train_data_dir=folder, validation_photographs=2)
    held = {name[:6] for name, _, _ in found.validation}
    assert len(held) == len(found.validation) == 2 and len(found.paths) == 12
    assert not held & {path.stem[:6] for path in found.paths}


def test_how_many_are_used(open_):
    found = open_(validation_photographs=3, max_validation_images=2)
    assert len(found.validation) == 2 and len(found.paths) == 5
    assert open_(validation_photographs=0).validation == []


def test_a_folder_to_validate_on(open_, photographs, partners):
    """It comes instead of photographs held aside: then all are trained on."""
    found = open_(validation_photographs=2, validation_dir=photographs, max_validation_images=5)
    assert len(found.paths) == 8 and len(found.validation) == 5
    assert found.validation[0][2].shape == (1, 3, 32, 32)
    assert found.facts["validation"] == f"the folder {photographs.name}"
    pairs = open_(validation_dir=photographs, validation_lq_dir=partners, validation_photographs=0).validation
    assert pairs[0][1].shape == (1, 3, 16, 16) and pairs[0][2].shape == (1, 3, 64, 64)


def test_ready_pairs(open_, partners):
    found = open_(train_lq_dir=partners, validation_photographs=0)
    assert isinstance(found.source, Pairs) and found.source.scale == 4 and found.paths == []
    assert found.facts["photographs"].startswith("8 pictures")


def test_prepared_shards(open_, shards, tmp_path):
    found = open_(train_data_dir=shards, validation_photographs=0)
    assert isinstance(found.source, PreparedShards) and found.null_prompt is None and len(found.source) == 8
    with_prompt = tmp_path / "shards"
    shutil.copytree(shards, with_prompt)
    embeds, pooled = torch.randn(1, 3, 12), torch.randn(1, 10)
    file = with_prompt / "null_prompt.safetensors"
    save_file({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, file)
    null = open_(train_data_dir=with_prompt, validation_photographs=0).null_prompt
    assert torch.equal(null[0], embeds) and torch.equal(null[1], pooled)
    save_file({"prompt_embeds": embeds}, file)
    assert open_(train_data_dir=with_prompt, validation_photographs=0).null_prompt[1] is None
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ConfigError, match=r"null_prompt\.safetensors is damaged"):
        open_(train_data_dir=with_prompt, validation_photographs=0)


def test_streams(open_, photographs, tmp_path):
    pytest.importorskip("datasets", reason="needs the extra [train]")
    source = {"train_data_dir": None, "dataset_name": photographs, "validation_photographs": 0}
    found = open_(**source)
    (batch,) = read_batches(found.source, BatchSettings(train_batch_size=2, resolution=32), stop=1)
    assert batch["hq"].shape == (2, 3, 32, 32) and found.facts == {"photographs": photographs.name}
    with pytest.raises(ConfigError, match="holds pictures of a plain folder aside; use validation_dir"):
        open_(**{**source, "validation_photographs": 2})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_data_dir": "/nowhere"}, "train_data_dir /nowhere is not a folder."),
        ({"validation_dir": "/nowhere"}, "/nowhere cannot be listed"),
        ({"validation_dir": "EMPTY"}, "EMPTY holds no pictures."),
        ({"train_data_dir": "EMPTY", "validation_photographs": 0}, "EMPTY holds no pictures."),
        ({"train_data_dir": "EMPTY"}, "EMPTY holds 0 photographs; more than 2 are needed."),
        ({"train_lq_dir": "EMPTY"}, "EMPTY holds no pictures."),
        ({"train_lq_dir": "PARTNERS"}, "validation_photographs holds pictures of a plain folder aside"),
        ({"train_data_dir": "SHARDS"}, "validation_photographs holds pictures of a plain folder aside"),
        ({"train_data_dir": "SHARDS", "train_lq_dir": "PARTNERS"}, "which have no partners: leave out train_lq_dir."),
        ({"train_data_dir": "SHARDS", "resolution": 64}, "was prepared at resolution 32, not 64"),
        ({"train_data_dir": "SHARDS", "use_shift_factor": True}, "prepared without the shift factor"),
        ({"train_data_dir": "SHARDS", "pretrain": True}, "holds latents of another autoencoder"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(config, tmp_path, shards, partners, changed, message):
    (tmp_path / "EMPTY").mkdir()
    places = {"EMPTY": tmp_path / "EMPTY", "SHARDS": shards, "PARTNERS": partners}
    given = {name: places.get(value, value) for name, value in changed.items() if name != "pretrain"}
    settings = config(tmp_path / "run", **given)
    if "pretrain" in changed:  # recipes only
        settings.pretrain = {"vae": {}}
    with pytest.raises(ConfigError) as refused:
        open_photographs(settings)
    assert message.replace("EMPTY", str(tmp_path / "EMPTY")) in str(refused.value) and "\n" not in str(refused.value)


def test_a_damaged_index_of_shards(open_, tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(ConfigError, match="was not written by `tsdsr prepare`"):
        open_(train_data_dir=tmp_path)


def test_what_shows_only_while_reading_is_a_sentence_too(open_, tmp_path):
    """Photographs smaller than a crop are known when they are read."""
    folder = tmp_path / "small"
    folder.mkdir()
    for number in range(2):
        write(Picture(np.zeros((16, 16, 3), np.float32)), folder / f"{number}.png")
    found = open_(train_data_dir=folder, validation_photographs=0)
    batches = read_batches(found.source, BatchSettings(train_batch_size=1, resolution=32), stop=1)
    with pytest.raises(ConfigError, match="smaller than crops of 32x32"):
        next(batches)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"64": [0.5, 1]}, "other_resolutions must hold sides of crops"),
        ({8: [0.5, 1]}, "needs crops of at least 16 pixels, not 8"),
    ],
)
def test_other_crops_that_cannot_be_used(config, tmp_path, others, message):
    settings = config(tmp_path, resolution=32, adversarial=0.1, discriminator_layers=4)
    settings.other_resolutions = others
    with pytest.raises(ConfigError, match=message):
        batch_settings(settings)
    settings.other_resolutions = {16: [0.5, 1]}
    assert batch_settings(settings).resolutions == [32, 16]
