"""The published TinySR in miniature: what becomes of it, against what its paper says it computes."""

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tsdsr import AutoencoderTinySeparable, OneStepSD3Transformer2DModel, TSDSRPipeline, convert_tinysr, describe
from tsdsr.checkpoints import CheckpointError
from tsdsr.cli import app

HEADS, HEAD_DIM, BLOCKS, CHANNELS, POOLED, RANK = 2, 8, 3, 4, 10, 3
DIM = HEADS * HEAD_DIM
PARTS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
BACKBONE = "checkpoint/tinybackbone/prune-12-merge-tinysr/transformer"
WEIGHTS = f"{BACKBONE}/diffusion_pytorch_model.safetensors"
VAE, LORA = "checkpoint/vae/separable", "checkpoint/tinysr/transformer.safetensors"
POOL, POSITIONS = "dataset/default/pool_embeds.pt", "dataset/cache/pos_embed.pt"
QUICK = {"process_size": 0, "color_fix": "none", "output_type": "pt"}

LAYERS = {
    "pos_embed.proj": (DIM, CHANNELS, 2, 2),
    "time_text_embed.timestep_embedder.linear_1": (DIM, 256),
    "time_text_embed.timestep_embedder.linear_2": (DIM, DIM),
    "time_text_embed.text_embedder.linear_1": (DIM, POOLED),
    "time_text_embed.text_embedder.linear_2": (DIM, DIM),
    "norm_out.linear": (2 * DIM, DIM),
    "proj_out": (4 * CHANNELS, DIM),
}
for _index in range(BLOCKS):
    LAYERS |= {
        f"transformer_blocks.{_index}.{name}": shape
        for name, shape in {
            "norm1.linear": (6 * DIM, DIM),
            "attn.to_q": (DIM, DIM),
            "attn.to_k": (DIM, DIM),
            "attn.to_v": (DIM, DIM),
            "attn.to_out.0": (DIM, DIM),
            "ff.net.0.proj": (4 * DIM, DIM),
            "ff.net.2": (DIM, 4 * DIM),
        }.items()
    }


# --- the release ----------------------------------------------------------------------------------------------------


def positions(height, width):
    """The middle of SD3's table: (height * width, DIM), columns first (arXiv 2403.03206, section 5.3.2)."""
    frequencies = [10000 ** (-index / (DIM // 4)) for index in range(DIM // 4)]

    def line(length):
        places = [((192 - length) // 2 + index - 64) / 4 for index in range(length)]
        return torch.tensor(
            [[f(place * each) for f in (math.sin, math.cos) for each in frequencies] for place in places]
        )

    rows, columns = line(height)[:, None].expand(-1, width, -1), line(width).expand(height, -1, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def write_release(root, separable=(True, False)):
    """Every file of the release, with random weights that all count."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    state = {}
    for name, shape in LAYERS.items():
        state[f"{name}.weight"] = random(*shape, scale=math.prod(shape[1:]) ** -0.5)
        state[f"{name}.bias"] = random(shape[0], scale=0.2)
    for index in range(BLOCKS):
        state |= {f"transformer_blocks.{index}.{part}": torch.zeros(0) for part in PARTS}
    state |= {"scale": torch.zeros(0), "shift": torch.zeros(0)}
    lora = {}
    for name, (out, *into) in LAYERS.items():
        if name != "proj_out":
            lora[f"transformer.{name}.lora_A.weight"] = random(RANK, *into, scale=math.prod(into) ** -0.5)
            lora[f"transformer.{name}.lora_B.weight"] = random(out, RANK, *[1] * len(into[1:]), scale=0.3)
    table = positions(32, 32)[None]
    config = {
        "_class_name": "TinySD3Transformer2DModel",
        "_diffusers_version": "0.29.1",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": CHANNELS,
        "num_layers": BLOCKS,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 12,
        "caption_projection_dim": DIM,
        "pooled_projection_dim": POOLED,
        "out_channels": CHANNELS,
        "pos_embed_max_size": 192,
    }
    for name in (BACKBONE, VAE, LORA, POOL, POSITIONS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / BACKBONE).mkdir()
    (root / BACKBONE / "config.json").write_text(json.dumps(config))
    save_file({**state, "pos_embed.pos_embed": table}, root / WEIGHTS)
    save_file(lora, root / LORA)
    torch.save(random(1, POOLED), root / POOL)
    torch.save(table, root / POSITIONS)
    write_vae(root / VAE, separable)
    return root


def write_vae(folder, separable=(True, False), latent_channels=CHANNELS):
    torch.manual_seed(1)
    vae = AutoencoderTinySeparable(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=latent_channels,
        scaling_factor=1.5305,
        separable_encoder=separable[0],
        separable_decoder=separable[1],
    )
    vae.save_pretrained(folder)
    change_json(folder / "config.json", _class_name="AutoencoderTiny", separable_encoder=None, separable_decoder=None)


def change_json(path, **changes):
    """Change a JSON file; None takes away."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def prune(mapping, pattern):
    for key in [key for key in mapping if re.search(pattern, key)]:
        del mapping[key]


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """Shared, so nobody writes here."""
    return write_release(tmp_path_factory.mktemp("tinysr"))


@pytest.fixture(scope="session")
def converted(release, tmp_path_factory):
    return convert_tinysr(release, tmp_path_factory.mktemp("converted") / "tinysr")


@pytest.fixture
def own(release, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(release, tmp_path / "release")
    return tmp_path / "release"


def load(folder):
    pipeline = TSDSRPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- what it computes, in float64 from the files --------------------------------------------------------------------


def merged(release):
    """The backbone's weights with the LoRA added."""
    state = {key: tensor.double() for key, tensor in load_file(release / WEIGHTS).items()}
    lora = {key: tensor.double() for key, tensor in load_file(release / LORA).items()}
    for name in LAYERS:
        if f"transformer.{name}.lora_A.weight" in lora:
            down, up = (lora[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
            state[f"{name}.weight"] += torch.einsum("or,r...->o...", up.flatten(1), down)
    return state


def modulation(release):
    """SiLU(temb), (DIM,), at timestep 1000."""
    state, pooled = merged(release), torch.load(release / POOL, weights_only=True).double()
    angles = 1000 * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    embedding = 0
    for name, x in (
        ("timestep_embedder", torch.cat([angles.cos(), angles.sin()])[None].double()),
        ("text_embedder", pooled),
    ):
        for number in (1, 2):
            layer = f"time_text_embed.{name}.linear_{number}"
            x = x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
            x = F.silu(x) if number == 1 else x
        embedding = embedding + x
    return F.silu(embedding)[0]


def velocity(release, latents, table):
    """Of latents (B, CHANNELS, h, w), with positions (tokens, DIM)."""
    state, activated = merged(release), modulation(release)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def split(x):
        return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)

    batch, _, height, width = latents.shape
    weight, bias = state["pos_embed.proj.weight"], state["pos_embed.proj.bias"]
    x = F.conv2d(latents.double(), weight, bias, stride=2).flatten(2).transpose(1, 2) + table.double()
    for index in range(BLOCKS):
        name = f"transformer_blocks.{index}"
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = linear(
            f"{name}.norm1.linear", activated
        ).chunk(6)
        y = norm(x) * (1 + scale_msa) + shift_msa
        query, key, value = (split(linear(f"{name}.attn.to_{part}", y)) for part in "qkv")
        scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        y = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + gate_msa * linear(f"{name}.attn.to_out.0", y)
        y = norm(x) * (1 + scale_mlp) + shift_mlp
        y = linear(f"{name}.ff.net.2", F.gelu(linear(f"{name}.ff.net.0.proj", y), approximate="tanh"))
        x = x + gate_mlp * y
    scale, shift = linear("norm_out.linear", activated).chunk(2)
    x = linear("proj_out", norm(x) * (1 + scale) + shift)
    x = x.reshape(batch, height // 2, width // 2, 2, 2, CHANNELS)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(latents.shape).float()


@torch.no_grad()
def test_the_network_is_the_published_one(release, converted):
    network = load(converted).transformer
    assert isinstance(network, OneStepSD3Transformer2DModel) and network.config.text_stream == "none"
    # The size of the release, with the table as it is stored, and others.
    stored = torch.load(release / POSITIONS, weights_only=True)[0]
    for table, shape in ((stored, (2, 64, 64)), (positions(10, 31), (1, 20, 62)), (positions(40, 7), (1, 80, 14))):
        latents = torch.randn(shape[0], CHANNELS, *shape[1:], generator=torch.Generator().manual_seed(2))
        expected = velocity(release, latents, table)
        assert expected.std() > 0.1
        torch.testing.assert_close(network(latents).sample, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("separable", [(True, False), (True, True), (False, False)])
@torch.no_grad()
def test_a_picture_goes_the_published_way(tmp_path, picture, separable):
    release = write_release(tmp_path / "release", separable)
    pipeline = load(convert_tinysr(release, tmp_path / "out"))
    assert type(pipeline.vae) is (AutoencoderTinySeparable if any(separable) else AutoencoderTiny)
    assert pipeline.config.timestep == 1000 and pipeline.prompt_embeddings is None
    # The release's own VAE, by the keys of its file.
    vae = AutoencoderTinySeparable.from_config(
        {**json.loads((release / f"{VAE}/config.json").read_text()), "_class_name": "AutoencoderTinySeparable"},
        separable_encoder=separable[0],
        separable_decoder=separable[1],
    )
    vae.load_state_dict(load_file(release / f"{VAE}/diffusion_pytorch_model.safetensors"))
    small = picture(12, 20)
    x = torch.from_numpy(small).permute(2, 0, 1)[None]
    x = (F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False) * 2 - 1).clamp(-1, 1)
    latents = vae.encode(x).latents * 1.5305
    expected = vae.decode((latents - velocity(release, latents, positions(3, 5))) / 1.5305).sample
    result = pipeline(small, **QUICK).images
    torch.testing.assert_close(result, expected.clamp(-1, 1) / 2 + 0.5, rtol=0, atol=1e-4)


# --- what it is made of ---------------------------------------------------------------------------------------------


def test_what_was_cached_of_the_modulation(release, own, converted, tmp_path, one_sentence):
    """Constants in place of the layers they came from: the result is the same, but for a LoRA on those layers."""
    weights, activated = merged(release), modulation(release)

    def drop(tensors):
        tensors.update({key: weights[key].float() for key in tensors if key in weights})
        for index in range(BLOCKS):
            name = f"transformer_blocks.{index}"
            made = weights[f"{name}.norm1.linear.weight"] @ activated + weights[f"{name}.norm1.linear.bias"]
            tensors.update({f"{name}.{part}": v[None].float() for part, v in zip(PARTS, made.chunk(6), strict=True)})
        made = weights["norm_out.linear.weight"] @ activated + weights["norm_out.linear.bias"]
        tensors.update({name: v[None].float() for name, v in zip(("scale", "shift"), made.chunk(2), strict=True)})
        prune(tensors, r"time_text_embed|norm1|norm_out")

    change_tensors(own / WEIGHTS, drop)
    with pytest.raises(CheckpointError) as error:
        convert_tinysr(own, tmp_path / "out")
    one_sentence(error.value, LORA, "norm_out.linear", "cached")
    (own / LORA).unlink()
    ours, expected = (
        load(folder).transformer.state_dict() for folder in (convert_tinysr(own, tmp_path / "out"), converted)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    change_tensors(own / WEIGHTS, lambda tensors: tensors.update({"transformer_blocks.1.gate_mlp": torch.ones(1, 3)}))
    with pytest.raises(CheckpointError) as error:
        convert_tinysr(own, tmp_path / "again")
    one_sentence(error.value, WEIGHTS, "transformer_blocks.1.gate_mlp", "adaLN")


def test_constants_beside_their_layers_and_the_prompts_side_do_not_count(own, converted, tmp_path):
    def add(tensors):
        for index in range(BLOCKS):
            name = f"transformer_blocks.{index}"
            tensors.update({f"{name}.{part}": torch.ones(1, DIM) for part in PARTS})
            for layer in ("attn.add_q_proj", "attn.to_add_out", "norm1_context.linear", "ff_context.net.0.proj"):
                tensors[f"{name}.{layer}.weight"] = torch.ones(DIM, DIM)
        tensors["context_embedder.weight"] = torch.ones(DIM, 12)

    change_tensors(own / WEIGHTS, add)
    layer = "transformer.transformer_blocks.0.attn.add_k_proj"
    change_tensors(
        own / LORA,
        lambda tensors: tensors.update(
            {f"{layer}.lora_A.weight": torch.ones(RANK, DIM), f"{layer}.lora_B.weight": torch.ones(DIM, RANK)}
        ),
    )
    # With the other file names that diffusers writes, and the parts named one by one.
    tensors = load_file(own / WEIGHTS)
    names = sorted(tensors)
    shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2], "2.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, own / BACKBONE / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (own / BACKBONE / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (own / WEIGHTS).unlink()
    (own / "dataset" / "default").rename(own / "pooled")
    output = convert_tinysr(own / "checkpoint", tmp_path / "out", embeddings=own / "pooled")
    ours, expected = (load(folder).transformer.state_dict() for folder in (output, converted))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_positions(own, converted, tmp_path, picture):
    pictures = [picture(12, 20), picture(8, 140)]  # the second has 70 patches a row
    expected = [load(converted)(image, tile_size=1024, **QUICK).images for image in pictures]
    assert load(converted).transformer.config.pos_embed_max_size == 192

    def converts(name):
        output = convert_tinysr(own, tmp_path / name, overwrite=True)
        return load(output), (output / "README.md").read_text()

    # As a run in half precision left it, in the file beside; one table for all sizes.
    change_tensors(own / WEIGHTS, lambda tensors: prune(tensors, "pos_embed.pos_embed"))
    torch.save(torch.load(own / POSITIONS, weights_only=True).half(), own / POSITIONS)
    pipeline, card = converts("half")
    assert "192x192" in card
    for image, right in zip(pictures, expected, strict=True):
        torch.testing.assert_close(pipeline(image, tile_size=1024, **QUICK).images, right, rtol=0, atol=0)
    # One of other numbers stays as it is: tiles are no longer than it.
    torch.save(torch.randn(1, 36, DIM, generator=torch.Generator().manual_seed(3)), own / POSITIONS)
    pipeline, card = converts("other")
    assert pipeline.transformer.config.pos_embed_max_size == 6 and "6x6 patches" in card and "96 pixels" in card
    assert pipeline(pictures[1], **QUICK).images.shape == (1, 3, 32, 560)
    # A larger one in the backbone comes first.
    whole = torch.randn(1, 200 * 200, DIM, generator=torch.Generator().manual_seed(4))
    change_tensors(own / WEIGHTS, lambda tensors: tensors.update({"pos_embed.pos_embed": whole}))
    network = converts("whole")[0].transformer
    assert torch.equal(network.position_table(200, 200), whole)


@pytest.mark.parametrize(("stored", "asked"), [("fp32", "fp16"), ("fp16", None), ("fp16", "bf16")])
def test_number_formats(own, converted, tmp_path, stored, asked):
    if stored == "fp16":
        for name in (WEIGHTS, f"{VAE}/diffusion_pytorch_model.safetensors"):
            change_tensors(own / name, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
        (own / WEIGHTS).rename(own / BACKBONE / "diffusion_pytorch_model.fp16.safetensors")
    output = convert_tinysr(own, tmp_path / "out", dtype=asked)
    found = {name: load_file(output / name / "diffusion_pytorch_model.safetensors") for name in ("transformer", "vae")}
    kind = torch.bfloat16 if asked == "bf16" else torch.float16
    assert {tensor.dtype for tensors in found.values() for tensor in tensors.values()} == {kind}
    for key, tensor in load_file(converted / "transformer" / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(found["transformer"][key].float(), tensor, rtol=0.02, atol=0.02)


def test_sizes_of_the_release():
    """The paper's figures, arXiv 2508.17434: 341.5 M parameters, 427 G multiply-accumulates without attention's own."""
    with torch.device("meta"):
        network = OneStepSD3Transformer2DModel(num_layers=12, text_stream="none", prompt_tokens=0)
        vae = AutoencoderTinySeparable()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(torch.zeros(1, 3, 512, 512))
            network(torch.zeros(1, 16, 64, 64))
            vae.decode(torch.zeros(1, 16, 64, 64))
    flops = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    of_layers = sum(count for name, count in flops.items() if name in ("aten.convolution", "aten.addmm", "aten.mm"))
    assert of_layers / 2e9 == pytest.approx(426.6, abs=0.1)
    weights = sum(weight.numel() for model in (network, vae) for weight in model.parameters())
    assert weights / 1e6 == pytest.approx(341.5, abs=0.05)


# --- as a model -----------------------------------------------------------------------------------------------------


def test_it_loads_where_others_do(converted, picture, tmp_path):
    expected = load(converted)(picture(12, 20), **QUICK).images
    pipeline = DiffusionPipeline.from_pretrained(converted)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, TSDSRPipeline) and isinstance(pipeline.vae, AutoencoderTinySeparable)
    torch.testing.assert_close(pipeline(picture(12, 20), **QUICK).images, expected, rtol=0, atol=0)
    strips = pipeline(picture(12, 20), vae_tile_size=16, **QUICK).images
    torch.testing.assert_close(strips, expected, rtol=0, atol=3e-5)
    # The code that travels with the weights is whole by itself.
    pipeline.save_pretrained(tmp_path / "model", include_code=True)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == ["tsdsr", "AutoencoderTinySeparable"]
    assert "class AutoencoderTinySeparable" in (tmp_path / "model" / "pipeline.py").read_text()
    code = tmp_path / "model" / "vae" / "tsdsr.py"
    specification = importlib.util.spec_from_file_location("alone", code)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    vae = module.AutoencoderTinySeparable.from_pretrained(code.parent)
    assert type(vae) is not type(pipeline.vae)
    torch.testing.assert_close(vae.state_dict(), pipeline.vae.state_dict(), rtol=0, atol=0)


def test_its_card(converted):
    card = (converted / "README.md").read_text()
    for words in ("2508.17434", "stabilityai-ai-community", "rank 3 (transformer)", "encoder with separable", "adain"):
        assert words in card
    said = describe(converted)
    assert said["family"] == "TinySR" and said["licence"] == "stabilityai-ai-community"
    assert (said["layers"], said["width"], said["vae_scale"], said["latent_channels"]) == (BLOCKS, DIM, 8, CHANNELS)
    pipeline = load(converted)
    for name in ("transformer", "vae"):
        assert said["parameters"][name] == sum(weight.numel() for weight in getattr(pipeline, name).parameters())


def test_on_the_command_line(release, tmp_path, one_sentence):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    model, photo = tmp_path / "tinysr", tmp_path / "photo.png"
    Image.fromarray(np.full((10, 12, 3), 90, np.uint8)).save(photo)
    result = run("convert", "--tinysr", release, "-o", model)
    assert result.exit_code == 0 and f"Wrote {model}" in result.stdout, result.output
    options = ("--process-size", "0", "--color-fix", "adain", "--device", "cpu")
    result = run("upscale", photo, "--model", model, "-o", tmp_path / "large.png", *options)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "large.png").size == (48, 40)
    assert json.loads(run("info", model, "--json").stdout)["family"] == "TinySR"
    for more, words in (((), (model, "not empty")), (("--overwrite", "--embeddings", tmp_path / "none"), ("none",))):
        result = run("convert", "--tinysr", release, "-o", model, *more)
        assert result.exit_code == 2
        one_sentence(result.stderr.strip(), *words)


# --- refusals -------------------------------------------------------------------------------------------------------


def _tensors(path, change):
    return lambda root: change_tensors(root / path, change)


FLAWS = {
    "no backbone": (lambda root: shutil.rmtree(root / BACKBONE), (BACKBONE, "download")),
    "no vae": (lambda root: shutil.rmtree(root / VAE), (VAE,)),
    "no weights": (lambda root: (root / WEIGHTS).unlink(), (BACKBONE, "safetensors")),
    "no lora": (lambda root: (root / LORA).unlink(), (LORA, "missing")),
    "no embeddings": (lambda root: shutil.rmtree(root / "dataset/default"), ("dataset/default", "pool_embeds")),
    "no pooled": (lambda root: (root / POOL).unlink(), ("pool_embeds.pt",)),
    "pooled of another width": (lambda root: torch.save(torch.ones(1, 9), root / POOL), (POOL, "(1, 9)", "(1, 10)")),
    "pooled NaN": (lambda root: torch.save(torch.full((1, POOLED), math.nan), root / POOL), (POOL, "NaN")),
    "another network": (
        lambda root: change_json(root / f"{BACKBONE}/config.json", _class_name="FluxTransformer2DModel"),
        (BACKBONE, "FluxTransformer2DModel"),
    ),
    "no heads": (lambda root: change_json(root / f"{BACKBONE}/config.json", num_attention_heads="two"), ("'two'",)),
    "more blocks": (lambda root: change_json(root / f"{BACKBONE}/config.json", num_layers=2), ("blocks.2", "no place")),
    "fewer blocks": (lambda root: change_json(root / f"{BACKBONE}/config.json", num_layers=4), ("blocks.3", "lacks")),
    "a layer of another size": (
        _tensors(WEIGHTS, lambda t: t.update({"proj_out.bias": torch.ones(3)})),
        (WEIGHTS, "proj_out.bias", "(3,)", "(16,)"),
    ),
    "half of the modulation": (
        _tensors(WEIGHTS, lambda t: prune(t, "time_text_embed")),
        (WEIGHTS, "time_text_embed.timestep_embedder.linear_1.weight"),
    ),
    "no modulation": (
        _tensors(WEIGHTS, lambda t: prune(t, r"time_text|norm1|norm_out")),
        (WEIGHTS, "adaLN", "shift_msa"),
    ),
    "NaN": (_tensors(WEIGHTS, lambda t: t["proj_out.bias"].fill_(math.nan)), (WEIGHTS, "proj_out.bias", "NaN")),
    "whole numbers": (
        _tensors(WEIGHTS, lambda t: t.update({"proj_out.bias": torch.ones(16, dtype=torch.int8)})),
        ("I8",),
    ),
    "lora of a vae": (
        lambda root: save_file(
            {f"transformer.encoder.conv_in.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}, root / LORA
        ),
        (LORA, "VAE"),
    ),
    "lora lacks a layer": (
        _tensors(LORA, lambda t: prune(t, "blocks.1.ff.net.2")),
        (LORA, "transformer_blocks.1.ff.net.2", "lacks"),
    ),
    "lora of another size": (
        _tensors(LORA, lambda t: t.update({"transformer.norm_out.linear.lora_B.weight": torch.ones(5, RANK)})),
        (LORA, "norm_out.linear", "(5, 3)"),
    ),
    "lora of another network": (
        _tensors(LORA, lambda t: t.update({f"transformer.x.lora_{half}.weight": torch.ones(3, 3) for half in "AB"})),
        (LORA, "no layer x"),
    ),
    "no positions": (
        lambda root: (
            change_tensors(root / WEIGHTS, lambda t: prune(t, "pos_embed.pos_embed")),
            (root / POSITIONS).unlink(),
        ),
        (POSITIONS, "table of positions"),
    ),
    "positions of another width": (
        _tensors(WEIGHTS, lambda t: t.update({"pos_embed.pos_embed": torch.ones(1, 4, 5)})),
        (WEIGHTS, "(1, 4, 5)", "table of positions"),
    ),
    "another vae": (
        lambda root: change_json(root / f"{VAE}/config.json", _class_name="AutoencoderKL"),
        ("AutoencoderKL",),
    ),
    "vae of other channels": (
        lambda root: change_json(root / f"{VAE}/config.json", latent_channels=5),
        (VAE, "encoder.layers", "5"),
    ),
    "vae of another model": (lambda root: write_vae(root / VAE, latent_channels=5), (VAE, "5 latent", BACKBONE, "4")),
    "vae half separable": (
        _tensors(
            f"{VAE}/diffusion_pytorch_model.safetensors",
            lambda t: prune(t, "encoder.layers.0.depthwise"),
        ),
        (VAE, "encoder.layers.0.depthwise.weight"),
    ),
    "vae beside itself": (
        lambda root: change_json(root / f"{VAE}/config.json", num_encoder_blocks=[1, 1]),
        (VAE, "AutoencoderTiny"),
    ),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_refusals(own, tmp_path, tree, one_sentence, flaw):
    spoil, words = FLAWS[flaw]
    spoil(own)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as error:
        convert_tinysr(own, tmp_path / "fresh" / "out")
    one_sentence(error.value, *words)
    assert tree(tmp_path) == before


def test_more_refusals(own, tmp_path, tree, one_sentence):
    before = tree(tmp_path)
    for folder, options, words in (
        (tmp_path / "none", {}, ("none", "config.json")),
        (own, {"dtype": "int4"}, ("int4", "bf16")),
        (own, {"embeddings": tmp_path / "nowhere"}, ("nowhere",)),
        (own, {"output": own}, (own, "input")),
        (own, {"output": own / "checkpoint"}, ("checkpoint", "not empty")),
    ):
        with pytest.raises(CheckpointError) as error:
            convert_tinysr(folder, options.pop("output", tmp_path / "out"), **options)
        one_sentence(error.value, *words)
        assert tree(tmp_path) == before


def test_numbers_beyond_half_precision(own, tmp_path, tree, one_sentence):
    change_tensors(own / WEIGHTS, lambda tensors: tensors["proj_out.weight"].mul_(1e6))
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as error:
        convert_tinysr(own, tmp_path / "out", dtype="fp16")
    one_sentence(error.value, BACKBONE, "float16", "bf16")
    assert tree(tmp_path) == before
    assert convert_tinysr(own, tmp_path / "out", dtype="bf16") == tmp_path / "out"


def test_files_stay_where_they_are(own, tmp_path, monkeypatch):
    """Relative names, from within the release."""
    monkeypatch.chdir(own / "checkpoint")
    assert convert_tinysr(".", tmp_path / "a") == tmp_path / "a"
    monkeypatch.chdir(own)
    assert convert_tinysr(Path(), "out") == own / "out"
