"""What a base folder is made into, and what does not fit it."""

import json
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

from tsdsr import TSDSRPipeline
from tsdsr.training import base as module
from tsdsr.training.base import PUBLISHED_PROMPT, build_networks, load_base, prompts_of
from tsdsr.training.config import ConfigError
from tsdsr.training.families import Ddpm, RectifiedFlow
from tsdsr.training.networks import FAKE_SCORE, STUDENT, TEACHER


@pytest.fixture
def load(config, tmp_path, base_folder):
    """A function that loads the tiny base, or another, for settings."""

    def go(name=None, null_prompt=None, **changed):
        return load_base(config(tmp_path / "run", **changed), str(name or base_folder), null_prompt)

    return go


@pytest.fixture(scope="module")
def unet_folder(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    make_pipeline("kl", network="unet").save_pretrained(folder)
    return folder


@pytest.fixture
def embeddings(tmp_path):
    """A function that writes embeddings in the published layout: `embeddings(name, tokens, width, pooled width)`."""

    def write(name, tokens=5, width=12, pooled=10, suffix=".pt"):
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(len(name))
        for stem, shape in (("prompt_embeds", (1, tokens, width)), ("pool_embeds", (1, pooled))):
            if not pooled and stem == "pool_embeds":
                continue
            if suffix == ".pt":
                torch.save(torch.randn(shape), folder / f"{stem}.pt")
            else:
                save_file({stem: torch.randn(shape)}, folder / f"{stem}.safetensors")
        return folder

    return write


def test_families(load, unet_folder):
    flow, ddpm = load(), load(unet_folder)
    assert isinstance(flow.family, RectifiedFlow) and flow.family.timestep == 1000
    assert isinstance(ddpm.family, Ddpm) and ddpm.family.timestep == 999
    assert load(timestep=900.5).family.timestep == 900.5 and load(unet_folder, timestep=900).family.timestep == 900


@pytest.mark.parametrize(
    ("unet", "changed", "message"),
    [
        (False, {"timestep": 1001}, "timestep must be above 0 and at most 1000 for"),
        (False, {"timestep": 0}, "not 0."),
        (True, {"timestep": 1000}, "timestep must be a whole number from 1 to 999 for"),
        (True, {"timestep": 1.5}, "not 1.5."),
        (False, {"resolution": 20, "scale": 2}, None),
        (False, {"resolution": 22, "scale": 2}, "resolution must be a multiple of 4 for"),
        (False, {"prompt_embeds": "NARROW"}, "The fixed prompt's embeddings must be (1, tokens, 12) for"),
        (False, {"prompt_embeds": "POOLED"}, "The fixed prompt's pooled embeddings must be (1, 10) for"),
        (False, {"prompt_embeds": "NONE"}, "pooled embeddings must be (1, 10)"),
        (True, {"prompt_embeds": "NONE"}, None),
        (False, {"null_prompt_embeds": "NARROW"}, "The empty prompt's embeddings must be (1, tokens, 12) for"),
        (False, {"prompt_embeds": "BROKEN"}, "prompt_embeds.pt cannot be read ("),
        (False, {"prompt_embeds": "LISTED"}, "prompt_embeds.pt holds no tensor."),
        (False, {"prompt_embeds": "CUT"}, "prompt_embeds.safetensors cannot be read ("),
        (False, {"prompt": "sharp"}, "has no text encoders, so the fixed prompt cannot be made"),
        (False, {"guidance_scale": 7.5}, "Guidance needs the empty prompt, and"),
    ],
)
def test_what_does_not_fit_is_one_sentence(load, unet_folder, embeddings, unet, changed, message):
    places = {"NARROW": {"width": 11}, "POOLED": {"pooled": 9}, "NONE": {"pooled": 0}, "BROKEN": {}, "LISTED": {}}
    places["CUT"] = {"suffix": ".safetensors"}
    given = dict(changed)
    for name, value in changed.items():
        if value in places:
            given[name] = embeddings(value, **places[value])
            if value == "BROKEN":
                (given[name] / "prompt_embeds.pt").write_bytes(b"nothing")
            if value == "LISTED":
                torch.save([1, 2], given[name] / "prompt_embeds.pt")
            if value == "CUT":
                (given[name] / "prompt_embeds.safetensors").write_bytes(b"nothing at all")
    name = unet_folder if unet else None
    if message is None:
        assert load(name, **given)
        return
    with pytest.raises(ConfigError) as refused:
        load(name, **given)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_tiny_autoencoder_takes_no_lora(load, make_pipeline, tmp_path):
    make_pipeline("tiny").save_pretrained(tmp_path / "tiny")
    assert load(tmp_path / "tiny", vae_encoder="frozen") and load(tmp_path / "tiny", vae_encoder="full")
    with pytest.raises(ConfigError, match=r"^AutoencoderTiny, the VAE of .*, takes no LoRA"):
        load(tmp_path / "tiny")


def test_a_broken_base_is_one_sentence(load, base_folder, tmp_path):
    for part in ("transformer", "vae", "scheduler"):
        folder = tmp_path / part
        shutil.copytree(base_folder, folder)
        shutil.rmtree(folder / part)
        with pytest.raises(ConfigError, match=f"^{part} of .* cannot be loaded") as refused:
            load(folder)
        assert "\n" not in str(refused.value)
    weights = tmp_path / "cut"
    shutil.copytree(base_folder, weights)
    file = weights / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"^transformer of .* cannot be loaded"):
        load(weights)


def test_where_prompts_come_from(load, embeddings, base_folder, monkeypatch):
    """Files and text win over what the base has saved; text encoders are loaded only for what is missing."""
    encoded = []

    def encode(captions):
        encoded.append(captions)
        return torch.full((1, 3, 12), float(len(captions[0]))), torch.zeros(1, 10)

    saved = load().prompt.prompt_embeds
    assert saved.shape == (1, 3, 12)
    monkeypatch.setattr(module, "load_text_encoder", lambda *_: encode)
    assert torch.equal(load().prompt.prompt_embeds, saved) and load().null_prompt is None and not encoded
    guided = load(guidance_scale=7.5)
    assert encoded == [[""]] and torch.equal(guided.prompt.prompt_embeds, saved)
    assert (guided.null_prompt[0] == 0).all()
    assert (load(prompt="sharp").prompt.prompt_embeds == 5).all()
    given = torch.ones(1, 4, 12), torch.ones(1, 10)
    assert load(null_prompt=given, guidance_scale=7.5).null_prompt[0] is given[0]
    files = embeddings("files"), embeddings("null", suffix=".safetensors")
    both = load(prompt_embeds=files[0], null_prompt_embeds=files[1], null_prompt=given, guidance_scale=7.5)
    assert torch.equal(both.prompt.prompt_embeds, torch.load(files[0] / "prompt_embeds.pt", weights_only=True))
    assert both.null_prompt[0].shape == (1, 5, 12) and encoded[1] == ["sharp"]


def test_without_a_saved_prompt_it_is_the_published_one(load, base_folder, tmp_path, monkeypatch):
    folder = tmp_path / "bare"
    shutil.copytree(base_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["prompt_embeddings"]
    (folder / "model_index.json").write_text(json.dumps(index))
    seen = []

    def encode(captions):
        seen.append(captions)
        return torch.zeros(1, 3, 12), torch.zeros(1, 10)

    monkeypatch.setattr(module, "load_text_encoder", lambda *_: encode)
    load(folder)
    assert seen[0] == [PUBLISHED_PROMPT]


def test_prompts_of_a_batch(load, unet_folder):
    base = load(null_prompt=(torch.ones(1, 2, 12), torch.ones(1, 10)))
    cpu = torch.device("cpu")
    fixed, null, of = prompts_of(base, cpu, torch.float16)
    assert of({"hq": 1}) is fixed and fixed[0].dtype == null[0].dtype == torch.float16 and (null[0] == 1).all()
    embeds, pooled = of({"prompt_embeds": torch.zeros(4, 2, 12), "pooled_prompt_embeds": torch.zeros(4, 10)})
    assert embeds.shape == (4, 2, 12) and pooled.shape == (4, 10) and embeds.dtype == torch.float16
    fixed, null, _ = prompts_of(load(unet_folder), cpu, torch.float32)
    assert fixed[1] is None and null is None


def test_what_is_trained_begins_as_the_base_in_float32(config, tmp_path, load):
    settings = config(tmp_path, rank=3, fake_score_rank=2, vae_rank=4)
    networks = build_networks(load(), settings, torch.bfloat16)
    assert next(networks.vae.decoder.parameters()).dtype == torch.bfloat16
    for role, part, rank in (
        (STUDENT, networks.denoiser, 3),
        (FAKE_SCORE, networks.denoiser, 2),
        (STUDENT, networks.codec, 4),
    ):
        weights = part.named_parameters(role)
        assert weights and all(w.dtype == torch.float32 and w.requires_grad for w in weights.values())
        assert {len(w) for name, w in weights.items() if "lora_A" in name} == {rank}
        assert not any(w.any() for name, w in weights.items() if "lora_B" in name)
        assert part.network.peft_config[role].lora_alpha == rank
    assert not any("decoder" in name for name in networks.codec.named_parameters(STUDENT))
    full = build_networks(load(), config(tmp_path, train_type="full", vae_encoder="full"), torch.bfloat16)
    plain = load()
    for ours, network in ((full.denoiser, plain.denoiser), (full.codec, plain.vae)):
        weights = ours.named_parameters(STUDENT)
        expected = dict(network.named_parameters())
        assert weights and all(torch.equal(weight, expected[name]) for name, weight in weights.items())
        assert ours.network is not ours.own_student
    assert {name.split(".")[0] for name in full.codec.named_parameters(STUDENT)} == {"encoder"}
    assert full.student_vae.decoder is full.vae.decoder
    assert networks.shift == 0.0 and networks.scaling == 1.5
    assert build_networks(load(), config(tmp_path, use_shift_factor=True), torch.float32).shift == 0.06


@pytest.fixture
def earlier(base_folder, tmp_path):
    """A pipeline of the base's kind with other weights throughout, and its folder."""
    pipeline = TSDSRPipeline.from_pretrained(base_folder, local_files_only=True)
    for network in (pipeline.transformer, pipeline.vae):
        for weight in network.parameters():
            weight.data += 0.125 * torch.rand(weight.shape)
    pipeline.save_pretrained(tmp_path / "earlier")
    return pipeline, tmp_path / "earlier"


@pytest.mark.parametrize("encoder", ["full", "frozen"])
@pytest.mark.parametrize("decoder", ["full", "frozen"])
def test_a_student_that_begins_as_an_earlier_one(config, tmp_path, load, earlier, encoder, decoder):
    before, folder = earlier
    settings = config(
        tmp_path, train_type="full", vae_encoder=encoder, vae_decoder=decoder, initial_student=folder, pixel_l1=1.0
    )
    networks = build_networks(load(), settings, torch.bfloat16)
    trained = networks.denoiser.named_parameters(STUDENT)
    assert all(torch.equal(trained[name], weight) for name, weight in before.transformer.named_parameters())
    plain = load()
    assert torch.equal(networks.network.proj_out.weight, plain.denoiser.proj_out.weight.bfloat16())
    dtypes = {"encoder": torch.float32 if encoder == "full" else torch.bfloat16}
    dtypes["decoder"] = torch.float32 if decoder == "full" else torch.bfloat16
    with networks.role(STUDENT) as (_, vae):
        for part, dtype in dtypes.items():
            weight = getattr(vae, part).conv_in.weight
            assert weight.dtype == dtype and torch.equal(weight, getattr(before.vae, part).conv_in.weight.to(dtype))
    with networks.role(TEACHER) as (_, vae):
        assert torch.equal(vae.encoder.conv_in.weight, plain.vae.encoder.conv_in.weight.bfloat16())
    wanted = {part for part, dtype in dtypes.items() if dtype == torch.float32}
    assert {name.split(".")[0] for name in networks.codec.named_parameters(STUDENT)} == wanted


def test_a_student_goes_on_at_the_timestep_it_began_with(config, tmp_path, base_folder):
    pipeline = TSDSRPipeline.from_pretrained(base_folder, local_files_only=True)
    pipeline.register_to_config(timestep=250.0, use_shift_factor=True)
    pipeline.save_pretrained(tmp_path / "earlier")
    given = {"train_type": "full", "vae_encoder": "full", "initial_student": tmp_path / "earlier"}
    for timestep in (None, 250):
        settings = config(tmp_path, use_shift_factor=True, timestep=timestep, **given)
        assert load_base(settings, str(base_folder)).family.timestep == 250
    assert load_base(config(tmp_path), str(base_folder)).family.timestep == 1000
    with pytest.raises(ConfigError, match=r"timestep is 250 in the initial_student .*, not 1000: leave it out"):
        load_base(config(tmp_path, use_shift_factor=True, timestep=1000, **given), str(base_folder))
    with pytest.raises(ConfigError, match=r"use_shift_factor is True in the initial_student .*, not False: a student"):
        load_base(config(tmp_path, **given), str(base_folder))


def test_earlier_students_that_do_not_fit(config, tmp_path, load, make_pipeline):
    settings = dict(make_pipeline("kl").transformer.config)
    small = SD3Transformer2DModel.from_config({**settings, "num_layers": settings["num_layers"] - 1})
    make_pipeline("kl", transformer=small).save_pretrained(tmp_path / "small")
    make_pipeline("kl", network="unet").save_pretrained(tmp_path / "unet")
    for name, said in (("small", "another network"), ("unet", "cannot be loaded"), ("nowhere", "cannot be loaded")):
        settings = config(tmp_path, train_type="full", vae_encoder="full", initial_student=tmp_path / name)
        with pytest.raises(ConfigError, match=f"initial_student: transformer of .*{name} .*{said}"):
            build_networks(load(), settings, torch.float32)
