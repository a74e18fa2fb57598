"""Prepared shards: what they hold, and that interrupted runs, or several sharing the work, end with the same files."""

import hashlib
import io
import json
import multiprocessing
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tsdsr.imaging import read
from tsdsr.pipelines.text import load_text_encoder
from tsdsr.training.data import BatchSettings, PreparedShards, UnreadableImage, load_uint8, training_batches
from tsdsr.training.data.prepare import prepare
from tsdsr.training.degradation import DegradationConfig, degrade
from tsdsr.training.draws import DEGRADATION, draws
from tsdsr.training.one_step import OneStepModel
from tsdsr.training.validation import bicubic


@pytest.fixture(scope="session")
def models_of(make_pipeline, tmp_path_factory):
    """A function that saves a tiny pipeline once: `models_of("tiny" or "kl", **pipeline_arguments)`."""
    saved = {}

    def make(kind, **arguments):
        key = kind, tuple(arguments.items())
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp("model") / kind
            make_pipeline(kind, **arguments).save_pretrained(saved[key])
        return saved[key]

    return make


@pytest.fixture
def run(folder, tmp_path, models_of):
    """A function that prepares the ten photographs: `run(name of the output, **options)`; returns its folder."""

    def go(name="out", kind="tiny", **options):
        given = {"resolution": 32, "samples_per_shard": 4, "num_workers": 0, "batch_size": 3, **options}
        go.result = prepare(given.pop("model", None) or models_of(kind), folder, tmp_path / name, **given)
        return tmp_path / name

    return go


def members(folder):
    """Content of every member, by name; the names of the shards."""
    found = {}
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            found |= {f"{shard.name}/{member.name}": tar.extractfile(member).read() for member in tar}
    return found


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["tiny", "kl"])
@pytest.mark.parametrize("use_shift_factor", [None, True])
def test_what_shards_hold(folder, run, models_of, kind, use_shift_factor):
    out = run(kind=kind, dtype="fp32", use_shift_factor=use_shift_factor, crops=2)
    assert (run.result.samples, run.result.shards, run.result.skipped) == (20, 5, [])
    assert run.result.images_per_second > 0
    vae = (AutoencoderKL if kind == "kl" else AutoencoderTiny).from_pretrained(models_of(kind), subfolder="vae")
    found = members(out)
    assert len(found) == 60 and "shard-00001.tar/00000007.png" in found
    boxes = set()
    for number in range(20):
        key = f"shard-{number // 4:05d}.tar/{number:08d}"
        facts = json.loads(found[f"{key}.json"])
        assert facts["source"] == f"p{number // 2}.png" and facts["caption"] is None
        left, top, right, bottom = facts["box"]
        boxes.add((left, top))
        crop = load_uint8(io.BytesIO(found[f"{key}.png"]))
        assert torch.equal(crop, load_uint8(folder / facts["source"])[:, top:bottom, left:right])
        with torch.no_grad():
            encoded = vae.encode(crop[None].float() / 127.5 - 1)
        expected = encoded.latent_dist.mode() if kind == "kl" else encoded.latents
        shift = 0.06 if use_shift_factor and kind == "kl" else 0.0
        expected = (expected - shift) * vae.config.scaling_factor
        torch.testing.assert_close(load(found[f"{key}.safetensors"])["latents"], expected[0])
    assert len(boxes) > 12


def test_the_shift_of_the_model_itself(run, models_of):
    plain, shifted = (
        members(run(name, model=models_of("kl", use_shift_factor=shift), dtype="fp32"))
        for name, shift in (("plain", False), ("shifted", True))
    )
    name = "shard-00000.tar/00000000.safetensors"
    difference = load(plain[name])["latents"] - load(shifted[name])["latents"]
    torch.testing.assert_close(difference, torch.full_like(difference, 0.06 * 1.5))


def test_reading_it(run):
    out = run(kind="kl")
    source = PreparedShards(out)
    assert len(source) == 10 and source.resolution == 32 and source.settings["seed"] == 0
    example, found = source[6], members(out)
    assert example.name == source.name(6) == "shard-00001.tar/00000006"
    assert torch.equal(example.hq, load_uint8(io.BytesIO(found[f"{example.name}.png"])))
    assert torch.equal(example.hq_latents, load(found[f"{example.name}.safetensors"])["latents"])
    assert example.hq_latents.shape == (4, 16, 16) and example.hq_latents.dtype == torch.float16
    assert example.prompt_embeds is None and example.lq is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_it(run, num_workers):
    source = PreparedShards(run(kind="kl"))
    by_name = {source.name(index): source[index] for index in range(10)}
    found = list(training_batches(source, BatchSettings(5, resolution=32), stop=2, num_workers=num_workers))
    assert {name for batch in found for name in batch["names"]} == set(by_name)
    for batch in found:
        assert batch["hq_latents"].shape == (5, 4, 16, 16) and batch["lq"].shape == (5, 3, 8, 8)
        for name, hq, latents in zip(batch["names"], batch["hq"], batch["hq_latents"], strict=True):
            # Neither moved nor mirrored: the latents are those of this very crop.
            assert torch.equal(hq, by_name[name].hq.float() / 255) and torch.equal(latents, by_name[name].hq_latents)
    with pytest.raises(ValueError, match="was prepared as 32x32 pixels; set the resolution to that, not to 16"):
        next(training_batches(source, BatchSettings(5, resolution=16), stop=2))


def test_a_photograph_as_large_as_a_crop(run, folder, save):
    for number in range(1, 10):
        (folder / f"p{number}.png").unlink()
    save(folder / "p0.png", 32, 32)
    save(folder / "p1.png", 32, 40)
    found = members(run(crops=3, samples_per_shard=2))
    keys = sorted(name for name in found if name.endswith(".png"))
    assert keys == [f"shard-0000{n // 2}.tar/0000000{n}.png" for n in (0, 3, 4, 5)]
    assert json.loads(found["shard-00000.tar/00000000.json"])["box"] == [0, 0, 32, 32]


def test_workers_seeds_and_batch_size(run):
    first = members(run("a"))
    assert first == members(run("b", num_workers=2))
    other = members(run("c", seed=1))
    assert first.keys() == other.keys()
    assert any(first[name] != other[name] for name in first if name.endswith(".png"))


def test_the_random_generators_of_the_process_stay_untouched(run):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(num_workers=1)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_what_cannot_be_used_is_skipped_and_named(run, folder, save):
    (folder / "p1.png").write_bytes((folder / "p1.png").read_bytes()[:300])
    save(folder / "p2.png", 20, 50)
    out = run(crops=3)  # the crops of p1 lie in two shards
    assert [name for name, _ in run.result.skipped] == ["p1.png", "p2.png"] and run.result.samples == 24
    facts = json.loads((out / "dataset.json").read_text())
    assert [name for name, _ in facts["skipped"]] == ["p1.png", "p2.png"]
    assert "50x20 pixels, smaller than crops of 32x32" in facts["skipped"][1][1]
    assert (facts["samples"], facts["shards"], facts["total_shards"]) == (24, 7, 8)
    assert len(PreparedShards(out)) == 24


def test_nothing_can_be_used(run, folder, tmp_path, save):
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for path in whole:
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"None of the photographs in .* can be used: .*p0\.png"):
        run()
    assert not list((tmp_path / "out").glob("*.tar"))
    with pytest.raises(ValueError, match="no whole shard"):
        PreparedShards(tmp_path / "out")
    for path, data in whole.items():
        path.write_bytes(data)
    assert len(PreparedShards(run())) == 10


def test_a_second_run_keeps_what_is_whole(run):
    out = run()
    before, times = digest(out), {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    run()
    assert (run.result.samples, run.result.kept) == (0, 3) and digest(out) == before
    (out / "shard-00001.tar").unlink()
    run()
    assert (run.result.samples, run.result.kept) == (4, 2) and digest(out) == before
    assert {path for path, when in times.items() if path.stat().st_mtime_ns != when} == {out / "shard-00001.tar"}


def prepare_and_hang(model, folder, out, photographs, pipe):
    """What the process that will be killed does: prepares so many photographs, says so, and waits."""
    torch.set_num_threads(1)  # of threads that the parent started, a forked process has none

    def progress(done, total):
        if done == photographs:
            pipe.send(done)
            time.sleep(60)

    options = {"resolution": 32, "samples_per_shard": 4, "num_workers": 0, "batch_size": 1}
    prepare(model, folder, out, progress=progress, **options)


@pytest.mark.parametrize("photographs", [4, 6])
def test_after_a_kill(run, folder, tmp_path, models_of, photographs):
    """Four photographs fill the first shard, so one run is killed between shards; after six the second is half done."""
    fork = multiprocessing.get_context("fork")  # which spares it the imports
    ours, theirs = fork.Pipe()
    arguments = (models_of("tiny"), folder, tmp_path / "out", photographs, theirs)
    process = fork.Process(target=prepare_and_hang, args=arguments)
    process.start()
    assert ours.poll(30) and ours.recv() == photographs
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert [name for name in names if name.endswith(".tar")] == ["shard-00000.tar"]
    assert any(name.startswith(".") for name in names) == (photographs == 6)
    assert len(PreparedShards(tmp_path / "out")) == 4
    out = run(batch_size=1)
    assert run.result.kept == 1 and run.result.samples == 6
    assert digest(out) == digest(run("unbroken", batch_size=1))


def test_an_error_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("tsdsr.training.data.prepare._Shard.finish", fail)
    with pytest.raises(OSError, match="No space"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset.json"]


def test_parts_end_with_what_one_run_does(run):
    run("shared", part=1, parts=2)
    assert run.result.samples == 4
    out = run("shared", part=0, parts=2)
    assert run.result.samples == 6
    assert digest(out) == digest(run("alone"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 36}, "resolution 32, not 36"),
        ({"seed": 3, "crops": 2}, "crops 1, not 2; seed 0, not 3"),
        ({"kind": "kl"}, "vae_sha256"),
        ({"dtype": "fp32"}, "dtype fp16, not fp32"),
    ],
)
def test_other_settings_are_refused(run, tmp_path, options, message):
    before = digest(run())
    with pytest.raises(ValueError, match="was prepared with other settings") as caught:
        run(**options)
    assert message in str(caught.value)
    assert digest(tmp_path / "out") == before


def test_another_folder_is_refused(run, folder, save):
    run()
    save(folder / "p3b.png")
    with pytest.raises(ValueError, match="photographs 10, not 11"):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 34}, "multiple of 4, the pixels of one latent, not 34"),
        ({"crops": 0}, "crops must be at least 1"),
        ({"part": 2, "parts": 2}, r"part must be within 0\.\.1, not 2"),
        ({"dtype": "bf16"}, "fp16 or fp32, not 'bf16'"),
        ({"seed": -1}, "at least 0"),
        ({"model": "/nowhere/model"}, "neither a folder nor a Hub id"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
    ],
)
def test_arguments_that_cannot_be_used(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_other_things_in_it(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no empty folder"):
        run()


def test_a_folder_that_was_not_prepared(tmp_path):
    with pytest.raises(ValueError, match="was not written by `tsdsr prepare`"):
        PreparedShards(tmp_path)


def test_a_damaged_shard(run):
    out = run()
    data = bytearray((out / "shard-00002.tar").read_bytes())
    index = json.loads((out / "shard-00002.json").read_text())["samples"]["00000008"]
    offset, size = index["safetensors"]
    data[offset : offset + size] = bytes(size)
    offset, size = index["json"]
    (out / "shard-00002.tar").write_bytes(data)
    source = PreparedShards(out)
    with pytest.raises(UnreadableImage, match=r"shard-00002\.tar/00000008 is damaged"):
        source[8]
    assert source[9].hq_latents is not None


@pytest.fixture
def sd2(models_of, tmp_path, clip_tokenizer, clip_config):
    """SD2's layout, as far as it is looked at: VAE and one text encoder."""
    folder = tmp_path / "sd2"
    AutoencoderTiny.from_pretrained(models_of("tiny"), subfolder="vae").save_pretrained(folder / "vae")
    torch.manual_seed(1)
    CLIPTextModel(clip_config()).save_pretrained(folder / "text_encoder")
    clip_tokenizer.save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderTiny"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def sd3(models_of, tmp_path, clip_tokenizer, clip_config):
    """SD3's three text encoders."""
    folder = tmp_path / "sd3"
    AutoencoderKL.from_pretrained(models_of("kl"), subfolder="vae").save_pretrained(folder / "vae")
    torch.manual_seed(1)
    for suffix in ("", "_2"):
        CLIPTextModelWithProjection(clip_config()).save_pretrained(folder / f"text_encoder{suffix}")
        clip_tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder_3")
    letters = Tokenizer(
        models.WordLevel({token: n for n, token in enumerate(["<pad>", "</s>", "<unk>", "red", "blue"])}, "<unk>")
    )
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    ).save_pretrained(folder / "tokenizer_3")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    )
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "PreTrainedTokenizerFast"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def caption_some(folder):
    for number, text in ((0, "red"), (1, "blue"), (2, "red"), (5, "red")):
        (folder / f"p{number}.txt").write_text(text)


@pytest.mark.parametrize("layout", ["sd2", "sd3"])
def test_captions(run, folder, request, layout):
    model = request.getfixturevalue(layout)
    caption_some(folder)
    out = run(model=model, dtype="fp32")
    assert run.result.captions == 4 and run.result.embedded
    found = members(out)
    prompts = [name for name in found if name.endswith(".prompt.safetensors")]
    assert [name.split("/")[0] for name in prompts] == ["shard-00000.tar"] * 2 + ["shard-00001.tar"]
    # At the end, where readers of webdatasets have seen what samples look like.
    assert list(found)[12:14] == prompts[:2]
    encode = load_text_encoder(str(model))
    source = PreparedShards(out)
    for index, text in ((0, "red"), (1, "blue"), (2, "red"), (5, "red"), (3, ""), (9, "")):
        example = source[index]
        assert example.caption == (text or None)
        embeds, pooled = encode([text])
        torch.testing.assert_close(example.prompt_embeds, embeds[0])
        if layout == "sd3":
            torch.testing.assert_close(example.pooled_prompt_embeds, pooled[0])
        else:
            assert example.pooled_prompt_embeds is None
    assert not torch.allclose(source[0].prompt_embeds, source[1].prompt_embeds)
    (batch,) = training_batches(source, BatchSettings(10, resolution=32), stop=1)
    assert batch["prompt_embeds"].shape == (10, *source[0].prompt_embeds.shape)
    assert ("pooled_prompt_embeds" in batch) == (layout == "sd3")


def test_captions_of_a_model_without_text_encoders(run, folder):
    caption_some(folder)
    out = run()
    assert run.result.captions == 4 and not run.result.embedded and not (out / "null_prompt.safetensors").exists()
    example = PreparedShards(out)[0]
    assert example.caption == "red" and example.prompt_embeds is None


def test_text_encoders_are_not_loaded_without_captions(run, sd2):
    (sd2 / "text_encoder" / "model.safetensors").unlink()
    out = run(model=sd2)
    assert run.result.samples == 10 and not (out / "null_prompt.safetensors").exists()


def test_other_programs_can_read_the_shards(run, sd2, folder):
    datasets = pytest.importorskip("datasets", reason="needs the extra [train]")
    caption_some(folder)
    out = run(model=sd2, samples_per_shard=10)
    files = {"train": [str(out / "shard-00000.tar")]}
    rows = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    assert [row["__key__"] for row in rows[:10]] == [f"{number:08d}" for number in range(10)]
    assert rows[0]["png"].size == (32, 32) and rows[0]["json"]["caption"] == "red"


def test_png_is_what_was_read(run, folder):
    """Without loss, down to the last bit."""
    found = members(run())
    facts = json.loads(found["shard-00002.tar/00000009.json"])
    left, top, right, bottom = facts["box"]
    assert np.array_equal(
        read(io.BytesIO(found["shard-00002.tar/00000009.png"])).rgb, read(folder / "p9.png").rgb[top:bottom, left:right]
    )


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_targets(run, models_of, kind):
    """The degraded picture depends on seed and number alone; latents are the model's."""
    out = run(kind=kind, dtype="fp32", targets=True, use_shift_factor=False)
    model, found = OneStepModel.load(models_of(kind)), members(out)
    for number in range(10):
        key = f"shard-{number // 4:05d}.tar/{number:08d}"
        crop, stored = load_uint8(io.BytesIO(found[f"{key}.png"])), load(found[f"{key}.safetensors"])
        lq = degrade(crop[None].float() / 255, draws(0, DEGRADATION, number), DegradationConfig(scale=4))
        assert stored["lq"].dtype == torch.uint8 and torch.equal(stored["lq"].float() / 255, lq[0])
        z = model.lq_latents(bicubic(lq, (32, 32)) * 2 - 1)
        torch.testing.assert_close(stored["lq_latents"], z[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(stored["teacher_latents"], model.restored(z)[0], rtol=0, atol=1e-4)
    settings = json.loads((out / "dataset.json").read_text())["settings"]
    assert (settings["targets"], settings["scale"], settings["teacher_sha256"]) == (True, 4, model.fingerprint())


def test_batches_with_targets(run):
    source = PreparedShards(run(targets=True))
    by_name = {source.name(index): source[index] for index in range(10)}
    (batch,) = training_batches(source, BatchSettings(5, resolution=32), stop=1)
    assert batch["lq"].shape == (5, 3, 8, 8) and batch["lq"].dtype == torch.float32
    for index, name in enumerate(batch["names"]):
        example = by_name[name]
        assert torch.equal(batch["lq"][index] * 255, example.lq.float())
        for target in ("lq_latents", "teacher_latents", "hq_latents"):
            assert torch.equal(batch[target][index], getattr(example, target))
        assert example.lq_latents.dtype == torch.float16
    with pytest.raises(ValueError, match="must be 2 times the first"):
        next(training_batches(source, BatchSettings(5, resolution=32, scale=2), stop=1))


def test_targets_are_not_mixed_with_what_has_none(run):
    run("with", targets=True)
    with pytest.raises(ValueError, match=r"other settings \(targets True, not None; scale 4, not None; teacher_sha256"):
        run("with")
    run("without")
    with pytest.raises(ValueError, match=r"other settings \(targets None, not True; scale None, not 4; teacher_sha256"):
        run("without", targets=True)
    plain = members(run("without"))
    assert load(plain["shard-00000.tar/00000000.safetensors"]).keys() == {"latents"}


def test_targets_that_cannot_be_made(run, tmp_path, make_pipeline):
    with pytest.raises(ValueError, match=r"resolution \(32\) must be a multiple of scale \(5\)\."):
        run(targets=True, scale=5)
    with pytest.raises(ValueError, match=r"resolution must be a multiple of 8 for .*, not 36"):
        run(targets=True, resolution=36)
    make_pipeline("tiny", "unet").save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="has no SD3 transformer"):
        run(targets=True, model=tmp_path / "unet")
