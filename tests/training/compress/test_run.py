"""A compression from flags to the model: each stage, the whole, in pieces, and on what was prepared."""

import json
import os
import signal

import pytest
import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from safetensors.torch import load_file

from tsdsr import OneStepSD3Transformer2DModel, TSDSRPipeline
from tsdsr.models.autoencoder_tiny_separable import AutoencoderTinySeparable
from tsdsr.training import losses
from tsdsr.training.compress import layer_mask, masked
from tsdsr.training.compress.config import parse
from tsdsr.training.compress.counts import counts
from tsdsr.training.compress.run import compress
from tsdsr.training.compress.stages import FOLDERS, Run, Training
from tsdsr.training.config import ConfigError
from tsdsr.training.data import load_uint8
from tsdsr.training.data.prepare import prepare
from tsdsr.training.initialisation import start_as_interpolation
from tsdsr.training.inputs import read_batches
from tsdsr.training.one_step import OneStepModel, baked_step
from tsdsr.training.reporting import Report, Stopped

LEARNING = ("encoder", "decoder", "search", "restore", "refine")
LOSSES = dict(zip(LEARNING, ("latent_mse", "encoder_features", "latent_l1", "latent_l1", "latent_l1"), strict=True))


@pytest.fixture(scope="module")
def clear_folder(make_pipeline, make_transformer, tmp_path_factory):
    """A model whose autoencoder is one that can be learned in a few steps: it averages pixels."""
    pipeline = make_pipeline("tiny", use_shift_factor=True)
    pipeline.register_modules(transformer=make_transformer(4))
    start_as_interpolation(pipeline.vae)
    pipeline.vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
    folder = tmp_path_factory.mktemp("clear") / "four"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learned(words, clear_folder, tmp_path_factory):
    """A run that is long enough to learn something."""
    folder = tmp_path_factory.mktemp("learned")
    sides = [word for name in LEARNING for word in (f"--{name}.resolution", 32)]
    compress(parse(words(folder, "--model", clear_folder, *sides, "--bake.dtype", "fp32", steps=24)))
    return folder


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read(folder, name):
    return json.loads((folder / name).read_text())


def weights(folder):
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for file in ours:
        assert [name for name in ours[file] if not torch.equal(ours[file][name], theirs[file][name])] == [], file


@pytest.fixture(scope="module")
def pictures(photographs):
    """(8, 3, 64, 64) in -1..1."""
    return torch.stack([load_uint8(path) for path in sorted(photographs.iterdir())]).float() / 127.5 - 1


@pytest.mark.parametrize("stage", LOSSES)
def test_a_stage_learns(learned, stage):
    log = lines(learned / FOLDERS[stage])
    assert [line["step"] for line in log] == list(range(1, 25)) and {line["phase"] for line in log} == {stage}
    values = [line[LOSSES[stage]] for line in log]
    assert sum(values[-6:]) < 0.95 * sum(values[:6])
    assert ("discriminator" in log[0]) == (stage in ("decoder", "refine"))


def test_the_search_decides(learned):
    found, log = read(learned / "3_search", "search.json"), lines(learned / "3_search")
    assert found["curve"] == [{"step": line["step"], "confidence": line["confidence"]} for line in log]
    likeliest = [max(p) for p in (*found["options"], *found["pairs"])]
    assert found["confidence"] == pytest.approx(sum(likeliest) / 3, abs=1e-6) and found["options"][0][0] != 0.5
    assert len(found["kept"]) == 2 and found["mask"] == [float(block in found["kept"]) for block in range(4)]
    assert found["groups"] == [[2, 1], [2, 1]] and sum(found["expected"]) == pytest.approx(2, abs=1e-4)
    assert [len(p) for p in found["options"]] == [2, 2] and [len(q) for q in found["pairs"]] == [3]
    names = load_file(learned / "3_search" / "search.safetensors").keys()
    assert {"masks.option_gates.0", "masks.pair_gates.0"} <= names and any(".lora_A." in name for name in names)


def test_what_comes_out(learned, clear_folder, pictures):
    """Restoration helps; the model takes pictures, and says what it is."""
    teacher = OneStepModel.load(clear_folder)
    z = teacher.lq_latents(pictures)
    errors = []
    for name in ("4_pruned", "5_restored"):
        with torch.no_grad():
            made = baked_step(TSDSRPipeline.from_pretrained(learned / name).transformer, z)
        errors.append(float((made - teacher.restored(z)).abs().mean()))
    assert errors[1] < 0.9 * errors[0]
    pipeline = TSDSRPipeline.from_pretrained(learned / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.is_baked and pipeline.config.use_shift_factor and pipeline.transformer.config.num_layers == 2
    assert isinstance(pipeline.vae, AutoencoderTinySeparable) and pipeline.vae.config.separable_encoder
    assert pipeline.vae.config.scaling_factor == 1.5 and pipeline.vae.config.shift_factor == 0.06
    assert pipeline(torch.rand(1, 3, 4, 8), process_size=0, output_type="pt").images.shape == (1, 3, 16, 32)
    kept = read(learned / "3_search", "search.json")["kept"]
    card = (learned / "model" / "README.md").read_text()
    for said in (
        f"Blocks: 2 of 4, chosen by tinysr: {kept[0]}, {kept[1]}",
        "-m tsdsr.training.compress --config recipe.yaml --model four --train_data_dir PHOTOGRAPHS",
        "  group_size: 2",
    ):
        assert said in card
    assert not list((learned / "checkpoints").iterdir())
    for path in learned.rglob("*.json"):
        assert str(learned) not in path.read_text() or path.name == "compressed_model.json"


def test_a_folder_can_be_used_by_itself(learned, clear_folder, pictures):
    """Each half of the VAE where it was trained; both in the last one, whose decoder was trained on."""
    halves = [AutoencoderTinySeparable.from_pretrained(learned / name) for name in ("1_encoder", "2_decoder")]
    last = TSDSRPipeline.from_pretrained(learned / "model").vae
    ours, theirs = last.encoder.state_dict(), halves[0].encoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(
        not torch.equal(tensor, halves[1].decoder.state_dict()[name])
        for name, tensor in last.decoder.state_dict().items()
    )
    wanted, errors = OneStepModel.load(clear_folder).plain_latents(pictures), []
    for vae in halves:  # in the second one's folder the encoder is untrained
        with torch.no_grad():
            errors.append(float(((vae.encode(pictures).latents - 0.06) * 1.5 - wanted).square().mean()))
    assert errors[0] < 0.95 * errors[1]


def test_counts(learned):
    before, after = (read(learned / "model", "counts.json")[name] for name in ("before", "after"))
    pipeline = TSDSRPipeline.from_pretrained(learned / "model")
    assert after["parameters"]["transformer"] == sum(w.numel() for w in pipeline.transformer.parameters())
    assert after["parameters"]["total"] == after["parameters"]["transformer"] + sum(
        w.numel() for w in pipeline.vae.parameters()
    )
    # Two blocks of one stream of 16 tokens each: q, k, v, out and a feed-forward of 4 times the width; patches in, out.
    tokens, width = (after["pixels"] // 8) ** 2, 16
    assert after["macs"]["transformer"] == tokens * (2 * 12 * width**2 + 2 * 16 * width)
    assert (
        before["macs"]["transformer"] > 1.5 * after["macs"]["transformer"]
        and before["parameters"]["transformer"] > 40_000
    )
    assert read(learned / "4_pruned", "counts.json")["before"] == before


def test_counts_of_the_release():
    """arXiv 2508.17434: 341.5 M parameters and 426.6 G for TinySR; SD3-medium's DiT has 2028.3 M."""
    with torch.device("meta"):
        tiny = counts(
            AutoencoderTinySeparable(), OneStepSD3Transformer2DModel(num_layers=12, text_stream="none", prompt_tokens=0)
        )
        medium = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        )
    assert tiny["parameters"]["total"] / 1e6 == pytest.approx(341.5, abs=0.05) and tiny["pixels"] == 512
    assert tiny["macs"]["total"] / 1e9 == pytest.approx(426.6, abs=0.1)
    whole = counts(AutoencoderTinySeparable(), medium, prompt_tokens=333)
    assert whole["parameters"]["transformer"] / 1e6 == pytest.approx(2028.3, abs=0.1)
    blocks = whole["macs"]["transformer"] / 1e9  # 24 image halves of 28.99, and the prompt's tokens beside them
    assert 24 * 28.99 < blocks < 1100


def test_a_run_in_pieces_makes_what_an_unbroken_one_makes(words, tmp_path, monkeypatch):
    """Killed in every stage, after the checkpoint of step 2, or asked to stop in it; and stage by stage."""
    compress(parse(words(tmp_path / "whole")))
    deaths = {(name, 3) for name in LEARNING}
    asked = {"decoder", "restore"}
    real = Report.log

    def dying(self, step, phase, **more):
        if (phase, step) in deaths:
            deaths.remove((phase, step))
            if phase not in asked:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, phase, **more)

    monkeypatch.setattr(Report, "log", dying)
    resume = ("--resume_from_checkpoint", "latest")
    for name in LEARNING:
        with pytest.raises(Stopped if name in asked else KeyboardInterrupt):
            compress(parse(words(tmp_path / "again", *resume)))
        left = tmp_path / "again" / "checkpoints" / FOLDERS[name]
        assert [path.name for path in left.glob("checkpoint-*")] == [f"checkpoint-{3 if name in asked else 2}"]
        assert not (tmp_path / "again" / FOLDERS[name]).exists()
    assert compress(parse(words(tmp_path / "again", *resume))) == tmp_path / "again" / "model" and not deaths
    whole = weights(tmp_path / "whole")
    assert len(whole) == 11
    assert_equal(weights(tmp_path / "again"), whole)
    for name in LEARNING:
        steps = [line["step"] for line in lines(tmp_path / "again" / FOLDERS[name])]
        assert steps == [1, 2, 3, 4]
    for names in (("search", "prune"), ("decoder", "encoder"), ("restore", "refine", "bake")):
        compress(parse(words(tmp_path / "parts", "--stages", *names)))
    assert_equal(weights(tmp_path / "parts"), whole)


def test_what_is_there_is_not_made_otherwise(words, tmp_path):
    chosen = ("--search.method", "ends", "--stages", "search")
    compress(parse(words(tmp_path, *chosen)))
    with pytest.raises(ConfigError, match=r"3_search is there already: go on with it \(--resume"):
        compress(parse(words(tmp_path, *chosen)))
    changed = words(tmp_path, "--search.method", "first", "--stages", "prune")
    with pytest.raises(ConfigError, match=r"other settings \(search.method ends, not first\); use the same, or delete"):
        compress(parse(changed))
    with pytest.raises(ConfigError, match=r"restore begins with what prune leaves, and .*4_pruned is not there"):
        compress(parse(words(tmp_path, "--search.method", "ends", "--stages", "restore")))
    with pytest.raises(ConfigError, match="resume_from_checkpoint is latest"):
        compress(parse(words(tmp_path, "--resume_from_checkpoint", "checkpoint-3")))


def test_a_checkpoint_is_not_resumed_with_other_settings(words, tmp_path, monkeypatch):
    def dying(self, step, *_, **__):
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Report, "log", dying)
        compress(parse(words(tmp_path, "--stages", "encoder")))
    resumed = ("--stages", "encoder", "--resume_from_checkpoint", "latest", "--encoder.steps", "6")
    with pytest.raises(ConfigError, match=r"other settings \(encoder.steps 4, not 6\); go on with the same, or delete"):
        compress(parse(words(tmp_path, *resumed)))


def test_half_precision(words, tmp_path, monkeypatch):
    """What is frozen computes in it, what is trained stays in float32."""
    seen, real = set(), torch.nn.functional.linear

    def linear(x, *given):
        result = real(x, *given)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    more = ("--mixed_precision", "bf16", "--gradient_checkpointing", "--search.encoder_features", 0.1)
    compress(
        parse(
            words(tmp_path, *more, "--restore.train_type", "full", "--search.gradient_accumulation_steps", 2, steps=1)
        )
    )
    assert torch.bfloat16 in seen
    for name in ("1_encoder", "2_decoder", "3_search", "4_pruned", "5_restored", "6_refined"):
        assert {t.dtype for file in weights(tmp_path / name).values() for t in file.values()} == {torch.float32}
    made = [
        load_file(tmp_path / name / "vae/diffusion_pytorch_model.safetensors") for name in ("4_pruned", "5_restored")
    ]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    kinds = {tensor.dtype for file in weights(tmp_path / "model").values() for tensor in file.values()}
    assert kinds == {torch.float16}


def test_half_a_tiny_vae_beside_a_kl_autoencoder(words, tmp_path):
    flags = words(tmp_path, "--decoder", "null")
    flags = [word for index, word in enumerate(flags) if not flags[index - index % 2].startswith("--decoder.")]
    with pytest.raises(ConfigError, match="the decoder of an AutoencoderKL cannot be half of a tiny VAE: train both"):
        compress(parse(flags))


def test_another_model_is_not_mixed_in(words, tmp_path, make_pipeline):
    compress(parse(words(tmp_path / "out", "--search.method", "ends", "--stages", "search")))
    make_pipeline("kl").save_pretrained(tmp_path / "other")
    other = words(tmp_path / "out", "--search.method", "ends", "--stages", "prune", "--model", tmp_path / "other")
    with pytest.raises(ConfigError, match="holds stages of another model than"):
        compress(parse(other))


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_pruned_model_is_the_masked_one(words, tmp_path, model_folder, with_lora):
    """With the prompt's tokens, baking changes nothing; with the LoRA of the search it is another's."""
    given = ("--search.method", "given", "--search.kept", "[0, 2]")
    method = ("--search.method", "tinysr", "--search.steps", 3) if with_lora else given
    more = ("--prune.text_stream", "full", "--stages", "search", "prune", "--prune.with_lora", str(with_lora).lower())
    compress(parse(words(tmp_path, *method, *more, rate=5e-2)))
    teacher = OneStepModel.load(model_folder)
    baked = TSDSRPipeline.from_pretrained(tmp_path / "4_pruned").transformer
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    mask = layer_mask(read(tmp_path / "3_search", "search.json")["kept"], 4)
    with torch.no_grad(), masked(teacher.transformer, mask):
        wanted = teacher.restored(latents)
        made = baked_step(baked, latents)
    difference = float((made - wanted).abs().max())
    assert difference > 1e-2 if with_lora else difference < 1e-4
    assert float((wanted - latents).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("method", "kept"),
    [("uniform", [0, 3]), ("first", [0, 1]), ("last", [2, 3]), ("ends", [0, 3]), ("block_influence", None)],
)
def test_other_ways_to_choose(words, tmp_path, method, kept):
    compress(parse(words(tmp_path, "--search.method", method, "--search.batches_watched", 2, "--stages", "search")))
    found = read(tmp_path / "3_search", "search.json")
    assert found["method"] == method and len(found["kept"]) == 2
    assert kept in (None, found["kept"])
    if method == "block_influence":
        best = sorted(sorted(range(4), key=lambda block: -found["influence"][block])[:2])
        assert best == found["kept"] and min(found["influence"]) > 0


def test_tinyfusion_trades_nothing(words, tmp_path):
    compress(parse(words(tmp_path, "--search.method", "tinyfusion", "--stages", "search")))
    found = read(tmp_path / "3_search", "search.json")
    assert found["pairs"] == [] and sorted(block // 2 for block in found["kept"]) == [0, 1]


def test_stages_that_are_left_out(words, tmp_path, model_folder):
    """Without VAE stages and search, what is left is the model itself, baked."""
    nothing = [word for name in ("encoder", "decoder", "search", "restore", "refine") for word in (f"--{name}", "null")]
    keep = [word for index, word in enumerate(words(tmp_path)) if not _of_section(words(tmp_path), index)]
    compress(parse([*keep, *nothing, "--prune.text_stream", "full", "--bake.dtype", "fp32"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4_pruned", "compressed_model.json", "model"]
    given = {"process_size": 0, "output_type": "pt"}
    pictures = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = [TSDSRPipeline.from_pretrained(f)(pictures, **given).images for f in (model_folder, tmp_path / "model")]
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)


def _of_section(flags, index):
    """Whether a word is a setting of a section, or its value."""
    name = flags[index if flags[index].startswith("--") else index - 1]
    return "." in name


def test_a_tiny_vae_keeps_the_half_that_is_not_trained(words, tmp_path, make_pipeline, make_transformer):
    pipeline = make_pipeline("tiny")
    pipeline.register_modules(transformer=make_transformer(2))
    pipeline.save_pretrained(tmp_path / "model")
    flags = words(tmp_path / "out", "--encoder", "null", "--model", tmp_path / "model", "--stages", "decoder")
    flags = [word for index, word in enumerate(flags) if not flags[index - index % 2].startswith("--encoder.")]
    compress(parse(flags))
    vae = AutoencoderTinySeparable.from_pretrained(tmp_path / "out" / "2_decoder")
    original = AutoencoderTiny.from_pretrained(tmp_path / "model", subfolder="vae")
    pictures = torch.rand(1, 3, 16, 16)
    assert torch.equal(vae.encode(pictures).latents, original.encode(pictures).latents)
    assert vae.config.decoder_block_out_channels == [8, 8, 8] and not vae.config.separable_encoder


def test_prepared_targets(words, tmp_path, photographs, model_folder, monkeypatch, make_pipeline):
    """They are what a stage would compute, and taken instead; those of another model are refused."""
    out = tmp_path / "shards"
    prepare(model_folder, photographs, out, resolution=16, dtype="fp32", num_workers=0, targets=True)
    config = parse(words(tmp_path / "out", "--train_data_dir", out, "--stages", "restore"))
    training = Training(Run(config), "restore")
    batch = next(read_batches(training.source, training.batches, stop=1))
    stored = training.targets.latents(batch)
    computed = training.targets.latents({name: batch[name] for name in ("hq", "lq", "index")})
    for ours, theirs in zip(stored, computed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (stored[0] - stored[1]).abs().max() > 0.1
    compress(
        parse(
            words(tmp_path / "out", "--train_data_dir", out, "--search.method", "ends", "--stages", "search", "prune")
        )
    )
    monkeypatch.setattr(OneStepModel, "restored", lambda *_: pytest.fail("it was computed"))
    compress(parse(words(tmp_path / "out", "--train_data_dir", out, "--search.method", "ends", "--stages", "restore")))
    monkeypatch.undo()
    pipeline = make_pipeline("kl", use_shift_factor=True)
    pipeline.save_pretrained(tmp_path / "other")
    flags = words(tmp_path / "new", "--train_data_dir", out, "--model", tmp_path / "other", "--stages", "search")
    with pytest.raises(ConfigError, match=r"The targets in .* are of another model than"):
        compress(parse(flags))
    flags = words(tmp_path / "new2", "--train_data_dir", out, "--stages", "search", "--search.resolution", 32)
    with pytest.raises(ConfigError, match="was prepared at resolution 16, not 32"):
        compress(parse(flags))


def test_terms_of_pictures_are_the_trainers(words, tmp_path, model_folder, monkeypatch):
    """All that are no networks; the period of grid_l1 is a patch of the model's transformer."""
    periods, real = set(), losses.grid_l1

    def grid_l1(*pictures, period):
        periods.add(period)
        return real(*pictures, period)

    monkeypatch.setattr(losses, "grid_l1", grid_l1)
    names = ("pixel_l1", "gradient_l1", "frequency_l1", "grid_l1")
    flags = [word for name in names for word in (f"--decoder.{name}", 0.5)]
    compress(parse(words(tmp_path, "--stages", "decoder", *flags, steps=1)))
    (line,) = (line for line in lines(tmp_path / "2_decoder") if "phase" in line)
    assert all(line[name] > 0 for name in names)
    assert periods == {OneStepModel.load(model_folder).size_multiple}
