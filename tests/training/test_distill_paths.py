"""The trainer from each kind of source and base to the written student."""

import json
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tsdsr import TSDSRPipeline
from tsdsr.imaging import Picture, find_images, read, write
from tsdsr.pipelines.text import load_text_encoder
from tsdsr.training import distill as module
from tsdsr.training import terms
from tsdsr.training.config import ConfigError
from tsdsr.training.data import PreparedShards, load_uint8
from tsdsr.training.data.prepare import prepare
from tsdsr.training.distill import distill
from tsdsr.training.networks import STUDENT, TEACHER, Networks


def trained(output_dir, step):
    return load_file(output_dir / "checkpoints" / f"checkpoint-{step}" / "trained.safetensors")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def first_step(output_dir):
    lines = map(json.loads, (output_dir / "log.jsonl").read_text().splitlines())
    return next(line for line in lines if "phase" in line)


def upscaled(pipeline, lq):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(lq, process_size=0, color_fix="none", output_type="np").images[0]


def assert_exports_agree(output_dir, base):
    """Merged pipeline, and LoRA over the base, both give the validation results that the trainer wrote."""
    final = output_dir / "validation" / "final"
    name = next(path.stem.removesuffix("_lq") for path in sorted(final.glob("*_lq.png")))
    lq, expected = (read(final / f"{name}{suffix}.png").rgb for suffix in ("_lq", ""))
    over_base = TSDSRPipeline.from_pretrained(base, local_files_only=True)
    start = upscaled(over_base, lq)
    over_base.load_lora_weights(output_dir / "lora")
    merged = TSDSRPipeline.from_pretrained(output_dir / "pipeline", local_files_only=True)
    for pipeline in (over_base, merged):
        assert np.abs(upscaled(pipeline, lq) - expected).max() <= 0.51 / 255
    assert np.abs(upscaled(merged, lq) - start).max() > 2 / 255, "training changed nothing"


# --- streams


def write_parquet(folder, pictures):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [train]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [train]")
    datasets = pytest.importorskip("datasets", reason="needs the extra [train]")
    features = datasets.Features({"image": datasets.Image()})
    for number in range(2):
        rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in pictures[number::2]]
        table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
        parquet.write_table(table, folder / f"part-{number}.parquet")


def write_tar(folder, pictures):
    pytest.importorskip("datasets", reason="needs the extra [train]")
    for number in range(2):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for path in pictures[number::2]:
                tar.add(path, path.name)


@pytest.mark.parametrize(("write_files", "num_workers"), [(write_parquet, 0), (write_tar, 1)])
def test_a_stream_that_is_stopped_and_resumed(
    photographs, config, tmp_path, monkeypatch, read_losses, write_files, num_workers
):
    """Over the end of an epoch: twelve samples of eight photographs."""
    files = tmp_path / "files"
    files.mkdir()
    write_files(files, find_images(photographs))

    def settings(name, **more):
        given = {"train_data_dir": None, "data_files": sorted(files.iterdir()), "train_batch_size": 3}
        given |= {"validation_photographs": None, "validation_dir": photographs, "max_validation_images": 1}
        return config(tmp_path / name, **{**given, "dataloader_num_workers": num_workers, **more})

    distill(settings("whole"))
    real, calls = terms.fake_score_term, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(terms, "fake_score_term", stopping)
        assert distill(settings("again")) == {}
    assert [path.name for path in (tmp_path / "again" / "checkpoints").iterdir()] == ["checkpoint-2"]
    with pytest.raises(ConfigError, match="its position only fits the same numbers"):
        distill(settings("again", resume_from_checkpoint="latest", dataloader_num_workers=2))
    assert distill(settings("again", resume_from_checkpoint="latest"))["student"]
    assert read_losses(tmp_path / "again") == read_losses(tmp_path / "whole")
    assert_equal(trained(tmp_path / "again", 4), trained(tmp_path / "whole", 4))
    assert str(tmp_path) not in (tmp_path / "again" / "lora" / "README.md").read_text()


def test_a_data_set_by_name(photographs, config, tmp_path):
    """A local folder as `datasets` reads one, with a caption column that no text encoder has embedded."""
    pytest.importorskip("datasets", reason="needs the extra [train]")
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    rows = [{"file_name": path.name, "text": f"picture {path.stem}"} for path in find_images(folder)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"train_data_dir": None, "dataset_name": folder, "validation_photographs": None}
    distill(config(tmp_path / "run", **source, caption_column="text", max_train_steps=2))
    assert first_step(tmp_path / "run")["latent_mse"] > 0
    assert str(tmp_path) not in (tmp_path / "run" / "lora" / "README.md").read_text()
    with pytest.raises(ConfigError, match="no column 'caption'; it has image, text"):
        distill(config(tmp_path / "other", **source, caption_column="caption"))


# --- prepared shards


def clip(width):
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    sizes = {"vocab_size": len(vocabulary), "hidden_size": width, "intermediate_size": 16, "projection_dim": width}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 8}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **layers, **ids)).eval()
    return encoder, CLIPTokenizer(vocab=numbers, merges=[], model_max_length=8)


def t5(width):
    words = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", "red", "blue"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = T5EncoderModel(T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 8}
    return encoder, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def transformer(**more):
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "pos_embed_max_size": 16}
    widths = {"joint_attention_dim": 12, "pooled_projection_dim": 10}
    return SD3Transformer2DModel(**{**sizes, **heads, **widths, **more}).eval()


@pytest.fixture(scope="module")
def sd3(make_pipeline, tmp_path_factory):
    """A whole SD3 base with its three text encoders."""
    folder = tmp_path_factory.mktemp("sd3")
    network = transformer(joint_attention_dim=16, pooled_projection_dim=16)
    (one, tokens_one), (two, tokens_two), (three, tokens_three) = clip(8), clip(8), t5(16)
    StableDiffusion3Pipeline(
        transformer=network,
        vae=make_pipeline("kl").vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=one,
        tokenizer=tokens_one,
        text_encoder_2=two,
        tokenizer_2=tokens_two,
        text_encoder_3=three,
        tokenizer_3=tokens_three,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioned(photographs, tmp_path_factory):
    """The photographs with a caption each."""
    folder = tmp_path_factory.mktemp("captioned") / "photographs"
    shutil.copytree(photographs, folder)
    for number, path in enumerate(find_images(folder)):
        path.with_suffix(".txt").write_text(("red", "blue")[number % 2])
    return folder


@pytest.fixture(scope="module")
def shards(sd3, captioned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    result = prepare(sd3, captioned, folder, resolution=32, samples_per_shard=3, num_workers=0, device="cpu")
    assert result.embedded and result.samples == 8
    return folder


def test_captions_and_the_empty_prompt_come_from_the_shards(sd3, shards, config, tmp_path, monkeypatch):
    """The text encoders are not there any more: the student's prompt comes from files, all others from the shards."""
    encode = load_text_encoder(str(sd3))
    base = tmp_path / "base"
    shutil.copytree(sd3, base, ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    index = json.loads((base / "model_index.json").read_text())
    kept = {part: entry for part, entry in index.items() if not part.startswith(("text_encoder", "tokenizer"))}
    (base / "model_index.json").write_text(json.dumps(kept))
    (tmp_path / "prompt").mkdir()
    fixed = encode(["red blue"])
    for stem, tensor in zip(("prompt_embeds", "pool_embeds"), fixed, strict=True):
        save_file({stem: tensor}, tmp_path / "prompt" / f"{stem}.safetensors")

    captions, guided, forwarded = [], [], []
    real_batches, real_guided, real_forward = module.read_batches, terms.guided_velocity, Networks.forward

    def read_batches(*arguments, **more):
        for batch in real_batches(*arguments, **more):
            captions.append(batch["captions"])
            yield batch

    def guided_velocity(family, network, prompt, null, scale):
        guided.append((prompt, null, scale))
        return real_guided(family, network, prompt, null, scale)

    def forward(self, role, *arguments, prompt, **more):
        forwarded.append((role, prompt))
        return real_forward(self, role, *arguments, prompt=prompt, **more)

    monkeypatch.setattr(module, "read_batches", read_batches)
    monkeypatch.setattr(terms, "guided_velocity", guided_velocity)
    monkeypatch.setattr(Networks, "forward", forward)
    more = {"pretrained_model_name_or_path": base, "prompt_embeds": tmp_path / "prompt", "train_data_dir": shards}
    distill(config(tmp_path / "run", **more, validation_photographs=None, guidance_scale=7.5, max_train_steps=3))

    assert {caption for batch in captions for caption in batch} == {"red", "blue"}
    # Two points on the trajectory: the teacher reads both latents, the fake score those of the student.
    assert len(captions) == 3 and len(guided) == 3 * 2 * 3 and len(forwarded) == 3 * 2
    half = {"rtol": 1e-3, "atol": 1e-3}  # as shards hold them
    for number, ((embeds, pooled), null, scale) in enumerate(guided):
        torch.testing.assert_close((embeds, pooled), encode(captions[number // 6]), **half)
        torch.testing.assert_close(null, encode([""]), **half)
        assert scale == 7.5
    for number, (role, prompt) in enumerate(forwarded):
        expected = fixed if role == STUDENT else encode(captions[number // 2])
        torch.testing.assert_close(prompt, expected, **half)
    assert not torch.allclose(encode(["red"])[0], encode(["blue"])[0], rtol=0.1, atol=0.1)


def test_a_base_with_text_encoders_makes_its_prompts(sd3, config, tmp_path):
    """The fixed prompt is what the base's own encoders make of the text, and goes into the written student."""
    more = {"pretrained_model_name_or_path": sd3, "guidance_scale": 7.5, "prompt": "blue", "max_train_steps": 1}
    distill(config(tmp_path / "run", **more))
    written = TSDSRPipeline.from_pretrained(tmp_path / "run" / "pipeline", local_files_only=True).prompt_embeddings
    embeds, pooled = load_text_encoder(str(sd3))(["blue"])
    torch.testing.assert_close((written.prompt_embeds.data, written.pooled_prompt_embeds.data), (embeds, pooled))


def test_latents_of_shards_are_those_made_on_the_fly(sd3, shards, config, tmp_path):
    """The same crops once with their latents, in half precision, and once as plain pictures."""
    source = PreparedShards(shards)
    crops = tmp_path / "crops"
    crops.mkdir()
    for index in range(len(source)):
        write(Picture(source[index].hq.permute(1, 2, 0).numpy().astype(np.float32) / 255), crops / f"{index:02d}.png")
    steps = {}
    for name, folder in (("shards", shards), ("crops", crops)):
        more = {"pretrained_model_name_or_path": sd3, "train_data_dir": folder, "random_flip": False}
        distill(config(tmp_path / name, **more, validation_photographs=None, max_train_steps=1, output="lora"))
        steps[name] = first_step(tmp_path / name)
    assert steps["shards"]["latent_mse"] != steps["crops"]["latent_mse"]
    assert steps["shards"]["latent_mse"] == pytest.approx(steps["crops"]["latent_mse"], rel=1e-3)


# --- ready pairs


def test_ready_pairs(photographs, config, tmp_path, monkeypatch):
    """Nothing is degraded: neither to train on nor to validate on."""

    def degrade(*_):
        raise AssertionError("ready pairs were degraded")

    monkeypatch.setattr("tsdsr.training.data.loader.degrade", degrade)
    monkeypatch.setattr("tsdsr.training.validation.degrade", degrade)
    lq_dir = tmp_path / "lq"
    lq_dir.mkdir()
    for path in find_images(photographs):
        small = F.avg_pool2d(load_uint8(path)[None].float() / 255, 4)[0]
        write(Picture(small.permute(1, 2, 0).numpy()), lq_dir / path.name)
    more = {"train_lq_dir": lq_dir, "validation_dir": photographs, "validation_lq_dir": lq_dir}
    found = distill(config(tmp_path / "run", **more, validation_photographs=None, max_validation_images=3))
    assert found["student"]["psnr_y"] != found["start"]["psnr_y"]
    final = tmp_path / "run" / "validation" / "final"
    assert len(list(final.glob("*_lq.png"))) == 3
    for name in ("p_0000_00", "p_0002_00"):
        assert np.array_equal(read(final / f"{name}_lq.png").rgb, read(lq_dir / f"{name}.png").rgb)
        assert np.array_equal(read(final / f"{name}_hq.png").rgb, read(photographs / f"{name}.png").rgb)
    assert "ready pairs" in (tmp_path / "run" / "lora" / "README.md").read_text()


# --- another base, another teacher


@pytest.fixture(scope="module")
def sd35(make_pipeline, tmp_path_factory):
    """SD3.5 medium in small: normalised queries and keys, a second attention in the first block."""
    folder = tmp_path_factory.mktemp("sd35")
    network = transformer(qk_norm="rms_norm", dual_attention_layers=(0,), pos_embed_max_size=24)
    make_pipeline("kl", transformer=network).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_lora(sd35, tmp_path_factory):
    """In the published layout: no metadata, so alpha = rank."""
    network = SD3Transformer2DModel.from_pretrained(sd35, subfolder="transformer")
    generator, weights = torch.Generator().manual_seed(5), {}
    for name, module_ in network.named_modules():
        if isinstance(module_, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            for side, shape in (("A", (3, module_.in_features)), ("B", (module_.out_features, 3))):
                weights[f"transformer.{name}.lora_{side}.weight"] = 0.5 * torch.randn(shape, generator=generator)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def sd35_run(sd35, config, tmp_path_factory):
    output = tmp_path_factory.mktemp("sd35_run")
    return output, distill(config(output, pretrained_model_name_or_path=sd35))


def test_sd35(sd35, sd35_run):
    output, _ = sd35_run
    names = set(trained(output, 4))
    for role in ("student", "fake_score"):
        layers = {name.split(".lora_")[0] for name in names if f".{role}." in name and name.startswith("network.")}
        for layer in ("attn.to_q", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"):
            assert f"network.transformer_blocks.0.{layer}" in layers
        assert not any("transformer_blocks.1.attn2" in layer for layer in layers)
    assert_exports_agree(output, sd35)


def test_a_teacher_of_its_own(sd35, sd35_run, teacher_lora, config, tmp_path, monkeypatch):
    """It changes what is distilled, and nothing else: not the student's beginning, and none of its files."""
    built, real = [], module.build_networks

    def build_networks(*arguments):
        built.append(real(*arguments))
        return built[-1]

    monkeypatch.setattr(module, "build_networks", build_networks)
    output = tmp_path / "run"
    found = distill(config(output, pretrained_model_name_or_path=sd35, teacher_lora=teacher_lora))
    plain, plain_found = sd35_run
    assert found["start"] == plain_found["start"]
    ours, theirs = first_step(output), first_step(plain)
    # The fake score's loss is taken after the student's first step, which the teacher has moved.
    assert ours["latent_mse"] == theirs["latent_mse"] and ours["tsd"] > 1.1 * theirs["tsd"]

    (networks,) = built
    weights = networks.denoiser.named_parameters(TEACHER)
    read_ = {f"transformer.{name.replace('.teacher.', '.')}": weight for name, weight in weights.items()}
    assert_equal({name: weight.detach() for name, weight in read_.items()}, load_file(teacher_lora))
    assert not any(weight.requires_grad for weight in weights.values())
    assert not any("teacher" in name for name in trained(output, 4))
    lora = load_file(output / "lora" / "pytorch_lora_weights.safetensors")
    assert lora.keys() == load_file(plain / "lora" / "pytorch_lora_weights.safetensors").keys()
    assert all(tensor.shape[0 if ".lora_A." in name else 1] == 2 for name, tensor in lora.items())
    assert_exports_agree(output, sd35)


# --- compiled


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_the_blocks_are_compiled(make_pipeline, config, tmp_path, monkeypatch, network):
    """Which modules are; compiling them takes minutes."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    make_pipeline("kl", network=network).save_pretrained(tmp_path / "base")
    more = {"pretrained_model_name_or_path": tmp_path / "base", "max_train_steps": 1, "validation_photographs": None}
    with torch._dynamo.config.patch(recompile_limit=8):
        distill(config(tmp_path / "run", **more, torch_compile=True))
        assert torch._dynamo.config.recompile_limit > 8
    kinds = {"transformer": ("JointTransformerBlock", 2), "unet": ("BasicTransformerBlock", 4)}
    assert [(kind, compiled.count(kind)) for kind in set(compiled)] == [kinds[network]]


# --- the Hub


def test_a_hub_that_cannot_be_reached_is_told_before_training(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "open_photographs", lambda _: pytest.fail("training began"))
    for token in (None, "hf_" + "a" * 34):
        with pytest.raises(SystemExit) as stopped:
            module.main(arguments(tmp_path, push_to_hub=True, hub_model_id="someone/student", hub_token=token))
        assert stopped.value.code == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith("Error: push_to_hub: the repository someone/student cannot be made (")
        assert "hf auth login" in message and "hf_a" not in message
