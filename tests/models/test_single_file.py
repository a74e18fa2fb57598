"""SD3 networks from single files in the layouts ComfyUI users have."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from tsdsr.models import single_file
from tsdsr.models.errors import CheckpointError
from tsdsr.models.headers import read_header


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("prefixes", [("model.diffusion_model.", "first_stage_model."), ("", "vae.")])
def test_original_layout(sd3, save_single_file, tmp_path, prefixes):
    transformer, vae = sd3
    path = save_single_file(
        tmp_path / "sd3.safetensors", transformer, vae, prefixes, **{"text_encoders.x": torch.ones(1)}
    )
    assert single_file.holds(read_header(path)) == {"transformer", "vae"}
    loaded = single_file.load_transformer(path, torch.float32)
    same_weights(loaded, transformer)
    same_weights(single_file.load_vae(path, torch.float32), vae)
    z = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {
        "encoder_hidden_states": torch.ones(1, 3, 12),
        "pooled_projections": torch.ones(1, 10),
        "timestep": torch.tensor([1000.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        torch.testing.assert_close(loaded(z, **arguments)[0], transformer(z, **arguments)[0], rtol=0, atol=3e-5)


def test_vae_keeps_the_constants_of_sd3(sd3, save_single_file, tmp_path):
    loaded = single_file.load_vae(save_single_file(tmp_path / "v.safetensors", vae=sd3[1]), torch.float32)
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (1.5305, 0.0609)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(sd3, save_single_file, tmp_path, dtype):
    path = save_single_file(tmp_path / "sd3.safetensors", *sd3)
    for model in (single_file.load_transformer(path, dtype), single_file.load_vae(path, dtype)):
        assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_diffusers_keys(sd3, tmp_path):
    transformer, vae = sd3
    for model, load in ((transformer, single_file.load_transformer), (vae, single_file.load_vae)):
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        same_weights(load(tmp_path / "model.safetensors", torch.float32), model)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"transformer_blocks.0.attn.to_q.lora_A.weight": (2, 2)}, "a LoRA"),
        ({"double_blocks.0.img_attn.qkv.weight": (2, 2)}, "a Flux-like transformer"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (2, 2)}, "a UNet of another Stable Diffusion"),
        ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "the VAE of another model"),
        ({"text_model.encoder.weight": (2, 2)}, "a text encoder"),
        ({"something": (2, 2)}, "no SD3 model (its first key is something)"),
    ],
)
def test_other_files_are_named(tmp_path, one_sentence, keys, said):
    path = tmp_path / "wrong.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, path)
    for load in (single_file.load_transformer, single_file.load_vae):
        with pytest.raises(CheckpointError) as caught:
            load(path, torch.float32)
        one_sentence(caught.value, path, said, "expected")


def test_the_other_half_is_named(sd3, save_single_file, tmp_path, one_sentence):
    only_vae = save_single_file(tmp_path / "vae.safetensors", vae=sd3[1])
    only_transformer = save_single_file(tmp_path / "dit.safetensors", sd3[0])
    with pytest.raises(CheckpointError) as caught:
        single_file.load_transformer(only_vae, torch.float32)
    one_sentence(caught.value, "the VAE of SD3 alone")
    with pytest.raises(CheckpointError) as caught:
        single_file.load_vae(only_transformer, torch.float32)
    one_sentence(caught.value, "an SD3 transformer without a VAE")


@pytest.mark.parametrize(
    "lost",
    [
        "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight",
        "model.diffusion_model.y_embedder.mlp.0.weight",
        "first_stage_model.encoder.mid.block_1.conv1.weight",
        "first_stage_model.decoder.up.0.block.0.conv1.weight",
    ],
)
def test_a_lost_weight_is_refused(sd3, save_single_file, tmp_path, one_sentence, lost):
    path = save_single_file(tmp_path / "sd3.safetensors", *sd3)
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path)
    load = single_file.load_transformer if "diffusion_model" in lost else single_file.load_vae
    with pytest.raises(CheckpointError) as caught:
        load(path, torch.float32)
    one_sentence(caught.value, path, "download")


def outputs(encoder):
    """What SD3 reads: the last but one hidden state and the projected one of a CLIP, the last one of T5."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 30, (2, 8), generator=generator)
    with torch.no_grad():
        found = encoder(ids, output_hidden_states=True)
    return [found[0]] if isinstance(encoder, T5EncoderModel) else [found.hidden_states[-2], found.text_embeds]


def same_encoder(loaded, original):
    same_weights(loaded, original)
    assert type(loaded) is type(original) and not loaded.training
    for ours, theirs in zip(outputs(loaded), outputs(original), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


CALLED = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
ENCODERS = [*CALLED.values()]


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoder(text_encoders, save_single_file, tmp_path, name):
    path = save_single_file(tmp_path / "clips.safetensors", text_encoders=text_encoders)
    assert single_file.holds(read_header(path)) == set(ENCODERS)
    loaded, original = single_file.load_text_encoder(path, name, torch.float32), text_encoders[name]
    same_encoder(loaded, original)
    for setting in ("hidden_act", "eos_token_id", "bos_token_id", "pad_token_id", "num_heads", "projection_dim"):
        assert getattr(loaded.config, setting, None) == getattr(original.config, setting, None)


def test_the_projection_of_clip_l_is_not_that_of_a_file(text_encoders, save_single_file, tmp_path):
    """SD3 does not project CLIP-L's pooled state, whatever lies beside it."""
    other = {"text_encoders.clip_l.transformer.text_projection.weight": torch.rand(64, 64)}
    path = save_single_file(tmp_path / "clips.safetensors", text_encoders=text_encoders, **other)
    same_encoder(single_file.load_text_encoder(path, "text_encoder", torch.float32), text_encoders["text_encoder"])


def test_t5_has_one_table_of_tokens(text_encoders, save_single_file, tmp_path):
    path = save_single_file(tmp_path / "t5.safetensors", text_encoders=text_encoders)
    loaded = single_file.load_text_encoder(path, "text_encoder_3", torch.float32)
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    loaded.save_pretrained(tmp_path / "saved")
    again = T5EncoderModel.from_pretrained(tmp_path / "saved", local_files_only=True)
    same_encoder(again.eval(), text_encoders["text_encoder_3"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoder_in_half_precision(text_encoders, save_single_file, tmp_path, name, dtype):
    """As transformers casts it, which leaves some of T5 in float32."""
    path = save_single_file(tmp_path / "clips.safetensors", text_encoders=text_encoders)
    text_encoders[name].save_pretrained(tmp_path / "folder")
    expected = type(text_encoders[name]).from_pretrained(tmp_path / "folder", dtype=dtype, local_files_only=True)
    loaded = single_file.load_text_encoder(path, name, dtype)
    assert loaded.dtype == dtype
    same_weights(loaded, expected)


@pytest.mark.parametrize("scale", [None, "scale_weight", "weight_scale"])
def test_weights_in_8_bits(sd3, text_encoders, save_single_file, tmp_path, scale):
    """As they are, or with a scale for each layer, as ComfyUI writes them."""
    parts = {"transformer": sd3[0], **text_encoders}
    stored = copy.deepcopy(parts)
    for part in stored.values():
        for weight in part.parameters():
            weight.data = weight.data.to(torch.float8_e4m3fn)
    path = save_single_file(
        tmp_path / "fp8.safetensors", stored["transformer"], text_encoders={name: stored[name] for name in ENCODERS}
    )
    if scale:
        tensors = load_file(path)
        scaled = {key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.ndim == 2}
        tensors |= {f"{key.removesuffix('weight')}{scale}": torch.tensor(0.5) for key in scaled}
        save_file(tensors | {"text_encoders.t5xxl.transformer.scaled_fp8": torch.zeros(0)}, path)
    loaded = {name: single_file.load_text_encoder(path, name, torch.float32) for name in ENCODERS}
    loaded["transformer"] = single_file.load_transformer(path, torch.float32)
    for name, original in parts.items():
        for key, weight in original.named_parameters():
            halved = scale and key.endswith(".weight") and weight.ndim == 2
            # Of CLIP-L's projection, which is not in the file, nothing is halved.
            factor = 0.5 if halved and (name, key) != ("text_encoder", "text_projection.weight") else 1.0
            expected = weight.data.to(torch.float8_e4m3fn).float() * factor
            assert torch.equal(loaded[name].get_parameter(key), expected), (name, key)


def test_text_encoder_that_is_not_there(sd3, text_encoders, save_single_file, tmp_path, one_sentence):
    part = {name: text_encoders[name] for name in ENCODERS[:2]}
    path = save_single_file(tmp_path / "sd3.safetensors", *sd3, text_encoders=part)
    assert single_file.holds(read_header(path)) == {"transformer", "vae", *part}
    with pytest.raises(CheckpointError) as caught:
        single_file.load_text_encoder(path, "text_encoder_3", torch.float32)
    one_sentence(caught.value, path, "no text_encoder_3", "text_encoders.t5xxl.transformer.")


@pytest.mark.parametrize(
    "lost",
    [
        "clip_l.transformer.text_model.embeddings.token_embedding.weight",
        "clip_l.transformer.text_model.embeddings.position_embedding.weight",
        "clip_l.transformer.text_model.encoder.layers.2.mlp.fc2.bias",
        "clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "clip_g.transformer.text_projection.weight",
        "t5xxl.transformer.shared.weight",
        "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo.weight",
    ],
)
def test_a_lost_weight_of_a_text_encoder(text_encoders, save_single_file, tmp_path, one_sentence, lost):
    path = save_single_file(tmp_path / "clips.safetensors", text_encoders=text_encoders)
    tensors = load_file(path)
    del tensors[f"text_encoders.{lost}"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        single_file.load_text_encoder(path, CALLED[lost.split(".")[0]], torch.float32)
    one_sentence(caught.value, path, lost.split("transformer.")[1], "download it again")


@pytest.mark.parametrize(
    "key",
    [
        "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "clip_g.transformer.text_model.final_layer_norm.weight",
        "t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo.weight",
    ],
)
def test_a_weight_of_a_text_encoder_in_another_shape(text_encoders, save_single_file, tmp_path, one_sentence, key):
    path = save_single_file(tmp_path / "clips.safetensors", text_encoders=text_encoders)
    tensors = load_file(path)
    tensors[f"text_encoders.{key}"] = tensors[f"text_encoders.{key}"][:-1]
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        single_file.load_text_encoder(path, CALLED[key.split(".")[0]], torch.float32)
    one_sentence(caught.value, path, "shape", "was expected; use")


def test_heads_of_another_width(make_pipeline, save_single_file, tmp_path, one_sentence):
    table = {"text_encoders.clip_g.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(54, 16)}
    rest = {
        f"text_encoders.clip_g.transformer.{key}": torch.zeros(16, 16)
        for key in ("text_projection.weight", "text_model.encoder.layers.0.mlp.fc1.weight")
    }
    path = save_single_file(tmp_path / "narrow.safetensors", make_pipeline().transformer, **table, **rest)
    for load in (
        lambda: single_file.load_transformer(path, torch.float32),
        lambda: single_file.load_text_encoder(path, "text_encoder_2", torch.float32),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        one_sentence(caught.value, path, "width 16", "multiples of 64")
