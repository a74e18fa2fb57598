"""A pipeline from one SD3 file."""

import os
import socket

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import save_file

from tsdsr import PromptEmbeddings, TSDSRPipeline
from tsdsr.models.errors import CheckpointError

load = TSDSRPipeline.from_single_file

SMALL = {"upscale": 2, "process_size": 0, "tile_size": 32, "tile_overlap": 8, "output_type": "pt"}
ENCODERS = ["text_encoder", "text_encoder_2", "text_encoder_3"]
TOKENIZERS = ["tokenizer", "tokenizer_2", "tokenizer_3"]


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """What this process wanted to connect to. huggingface_hub is not told to be offline, so that it would try."""
    wanted = []

    def refuse(*arguments, **_):
        wanted.append(arguments[-1])
        raise OSError("no connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return wanted


@pytest.fixture(scope="module")
def networks(sd3, text_encoders):
    """SD3's networks in miniature, whose transformer takes what the text encoders give."""
    torch.manual_seed(5)
    widths = {"joint_attention_dim": 192, "pooled_projection_dim": 64 + 24}
    transformer = SD3Transformer2DModel.from_config({**sd3[0].config, **widths}).eval()
    return {"transformer": transformer, "vae": sd3[1], **text_encoders}


@pytest.fixture(scope="module")
def prompt_embeddings():
    generator = torch.Generator().manual_seed(6)
    tensors = torch.randn(1, 5, 192, generator=generator), torch.randn(1, 88, generator=generator)
    return PromptEmbeddings.from_tensors(*tensors)


@pytest.fixture(scope="module")
def tokenizers(clip_tokenizer, t5_tokenizer):
    return dict(zip(TOKENIZERS, (clip_tokenizer, clip_tokenizer, t5_tokenizer), strict=True))


@pytest.fixture(scope="module")
def config(tokenizers, tmp_path_factory):
    """A diffusers folder with tokenizers."""
    folder = tmp_path_factory.mktemp("config")
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def whole(networks, save_single_file, tmp_path_factory):
    """As sd3_medium_incl_clips_t5xxlfp16.safetensors: transformer, VAE and text encoders."""
    encoders = {name: networks[name] for name in ENCODERS}
    path = tmp_path_factory.mktemp("file") / "sd3.safetensors"
    return save_single_file(path, networks["transformer"], networks["vae"], text_encoders=encoders)


def run(pipeline, image, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(image, **{**SMALL, **arguments}).images


def same(result, expected):
    # Not to the last bit: weights that lie elsewhere in memory are multiplied in another order.
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-5)


def test_gives_what_its_networks_give(whole, networks, prompt_embeddings, picture, connections):
    pipeline = load(whole, prompt_embeddings=prompt_embeddings)
    assert type(pipeline) is TSDSRPipeline
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler and pipeline.scheduler.config.shift == 3.0
    assert (pipeline.config.use_shift_factor, pipeline.config.timestep) == (False, 1000.0)
    assert all(getattr(pipeline, name) is None for name in ENCODERS + TOKENIZERS)
    expected = TSDSRPipeline(
        networks["vae"], networks["transformer"], FlowMatchEulerDiscreteScheduler(shift=3.0), prompt_embeddings
    )
    for name in ("vae", "transformer"):
        loaded, original = getattr(pipeline, name).state_dict(), networks[name].state_dict()
        assert loaded.keys() == original.keys() and all(torch.equal(loaded[key], original[key]) for key in loaded)
    same(run(pipeline, picture(10, 12)), run(expected, picture(10, 12)))
    assert connections == []


def test_prompt_through_the_text_encoders_of_the_file(whole, networks, config, tokenizers, picture, connections):
    pipeline = load(str(whole), config=str(config))
    expected = TSDSRPipeline(**networks, **tokenizers, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    image = run(pipeline, picture(10, 12), prompt="a photo")
    same(image, run(expected, picture(10, 12), prompt="a photo"))
    assert (run(pipeline, picture(10, 12), prompt="z") - image).abs().max() > 1e-3
    assert connections == []


def test_saved_as_a_folder(whole, config, prompt_embeddings, picture, tmp_path):
    pipeline = load(whole, config=config, prompt_embeddings=prompt_embeddings)
    pipeline.save_pretrained(tmp_path / "folder")
    again = TSDSRPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    for arguments in ({}, {"prompt": "a photo"}):
        same(run(again, picture(8, 8), **arguments), run(pipeline, picture(8, 8), **arguments))


def test_a_subclass(whole):
    class Mine(TSDSRPipeline):
        pass

    assert type(Mine.from_single_file(whole)) is Mine


def test_a_text_encoder_needs_its_tokenizer(whole, config, tokenizers):
    pipeline = load(whole, tokenizer_2=tokenizers["tokenizer_2"])
    assert [name for name in ENCODERS if getattr(pipeline, name) is not None] == ["text_encoder_2"]
    assert pipeline.tokenizer_2 is tokenizers["tokenizer_2"] and pipeline.tokenizer is None

    pipeline = load(whole, config=config, text_encoder_3=None)
    assert [name for name in ENCODERS if getattr(pipeline, name) is not None] == ENCODERS[:2]
    assert pipeline.tokenizer is not None and pipeline.tokenizer_3 is None

    pipeline = load(whole, config=config, tokenizer=None, tokenizer_2=tokenizers["tokenizer_2"])
    assert [name for name in ENCODERS if getattr(pipeline, name) is not None] == ENCODERS[1:]
    assert pipeline.tokenizer is None and pipeline.tokenizer_2 is tokenizers["tokenizer_2"]


def test_a_file_without_text_encoders(networks, save_single_file, config, text_encoders, tmp_path):
    path = save_single_file(tmp_path / "sd3.safetensors", networks["transformer"], networks["vae"])
    pipeline = load(path, config=config, text_encoder=text_encoders["text_encoder"])
    assert pipeline.text_encoder is text_encoders["text_encoder"] and pipeline.tokenizer is not None
    assert pipeline.text_encoder_2 is None and pipeline.tokenizer_2 is None


def test_passed_components_and_settings(whole, networks):
    vae, scheduler = AutoencoderKL.from_config(networks["vae"].config), FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipeline = load(whole, vae=vae, scheduler=scheduler, use_shift_factor=True, timestep=900)
    assert pipeline.vae is vae and pipeline.scheduler is scheduler
    assert (pipeline.config.use_shift_factor, pipeline.config.timestep) == (True, 900)
    assert load(whole, transformer=networks["transformer"]).transformer is networks["transformer"]


def test_passed_transformer_and_a_file_of_the_vae(networks, save_single_file, tmp_path):
    """As where the transformer comes from a GGUF file."""
    path = save_single_file(tmp_path / "sd3_vae.safetensors", vae=networks["vae"], prefixes=("", ""))
    pipeline = load(path, transformer=networks["transformer"])
    assert torch.equal(pipeline.vae.encoder.conv_in.weight, networks["vae"].encoder.conv_in.weight)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [torch.float32] * 3),
        (torch.bfloat16, [torch.bfloat16] * 3),
        ({"vae": torch.float32, "default": torch.float16}, [torch.float16, torch.float32, torch.float16]),
        ({"text_encoder_3": torch.bfloat16}, [torch.float32, torch.float32, torch.bfloat16]),
    ],
)
def test_dtype(whole, config, prompt_embeddings, name, value, expected):
    pipeline = load(whole, config=config, prompt_embeddings=prompt_embeddings, **{name: value})
    assert [part.dtype for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder_3)] == expected
    assert pipeline.prompt_embeddings is prompt_embeddings


@pytest.mark.parametrize("layout", ["bare", "diffusers"])
def test_a_file_of_the_transformer_alone(networks, save_single_file, tmp_path, one_sentence, layout):
    path = tmp_path / "dit.safetensors"
    if layout == "bare":
        save_single_file(path, networks["transformer"], prefixes=("", ""))
    else:
        save_file(networks["transformer"].state_dict(), path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    one_sentence(caught.value, path, "no VAE", "vae=AutoencoderKL.from_pretrained(", 'subfolder="vae")')
    pipeline = load(path, vae=networks["vae"])
    for key, weight in pipeline.transformer.state_dict().items():
        assert torch.equal(weight, networks["transformer"].state_dict()[key])


@pytest.mark.parametrize(
    ("link", "revision", "ref"),
    [
        ("https://huggingface.co/owner/name/blob/main/sub/sd3.safetensors", None, "main"),
        ("https://huggingface.co/owner/name/resolve/main/sub/sd3.safetensors?download=true", None, "main"),
        ("hf.co/owner/name/blob/refs%2Fpr%2F1/sub/sd3.safetensors", None, "refs/pr/1"),
        ("https://huggingface.co/owner/name/blob/main/sub/sd3.safetensors", "v2", "v2"),
    ],
)
def test_a_link_to_the_hub(whole, tmp_path, link, revision, ref):
    """Answered from the cache, whose layout is huggingface_hub's."""
    commit = "0123456789" * 4
    folder = tmp_path / "models--owner--name"
    (folder / "refs" / ref).parent.mkdir(parents=True)
    (folder / "refs" / ref).write_text(commit)
    (folder / "snapshots" / commit / "sub").mkdir(parents=True)
    os.link(whole, folder / "snapshots" / commit / "sub" / "sd3.safetensors")
    assert load(link, revision=revision, cache_dir=tmp_path, local_files_only=True).vae is not None


def test_a_link_that_is_not_in_the_cache(tmp_path):
    with pytest.raises(OSError):
        load("https://huggingface.co/owner/name/blob/main/sd3.safetensors", cache_dir=tmp_path, local_files_only=True)


def test_connections_are_noticed(connections):
    with pytest.raises(Exception, match="no connection"):
        huggingface_hub.HfApi().model_info("owner/name")
    assert connections


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.safetensors", "is missing"),
        ("folder", "from_pretrained"),
        ("sd3.gguf", "SD3Transformer2DModel.from_single_file"),
        ("sd3.gguf", "GGUFQuantizationConfig"),
        ("lora.safetensors", "a LoRA, but an SD3 transformer was expected"),
        ("vae.safetensors", "the VAE of SD3 alone, but an SD3 transformer was expected"),
        ("sd3.ckpt", "a PyTorch pickle"),
    ],
)
def test_other_files(networks, save_single_file, tmp_path, one_sentence, name, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "sd3.gguf").write_bytes(b"GGUF")
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    save_single_file(tmp_path / "vae.safetensors", vae=networks["vae"])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "sd3.ckpt")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / name)
    assert isinstance(caught.value, ValueError)
    one_sentence(caught.value, tmp_path / name, said)


@pytest.mark.parametrize(
    ("source", "arguments", "error", "said"),
    [
        ("sd3.safetensors", {"scheduler_type": "euler", "unet": None}, TypeError, "`scheduler_type`, `unet`"),
        ("sd3.safetensors", {"dtype": "bf16"}, TypeError, "'bf16'"),
        ("sd3.safetensors", {"dtype": {"vae": "bf16"}}, TypeError, "'bf16'"),
        ("sd3.safetensors", {"config": "stabilityai/stable-diffusion-3"}, ValueError, "stabilityai/stable-diffusion-3"),
        ("https://example.com/sd3.safetensors", {}, ValueError, "https://example.com/sd3.safetensors"),
        ("https://huggingface.co/owner/name", {}, ValueError, "blob/main"),
    ],
)
def test_arguments(one_sentence, connections, source, arguments, error, said):
    with pytest.raises(error) as caught:
        load(source, **arguments)
    one_sentence(caught.value, said)
    assert connections == []
