"""SD3 networks from single files in the layouts ComfyUI users have."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsdsr.checkpoints import CheckpointError, single_file
from tsdsr.checkpoints.headers import read_header

# Heads are 64 wide and latents 16 deep in every released SD3; the rest is small.
SD3_LIKE = {"attention_head_dim": 64, "caption_projection_dim": 128, "in_channels": 16, "out_channels": 16}


@pytest.fixture(scope="module")
def models(networks):
    return networks.transformer(**SD3_LIKE).eval(), networks.vae(latent_channels=16, norm_num_groups=8).eval()


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("prefixes", [("model.diffusion_model.", "first_stage_model."), ("", "vae.")])
def test_original_layout(models, save_single_file, tmp_path, prefixes):
    transformer, vae = models
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
        torch.testing.assert_close(loaded(z, **arguments)[0], transformer(z, **arguments)[0], rtol=0, atol=1e-5)


def test_vae_keeps_the_constants_of_sd3(models, save_single_file, tmp_path):
    loaded = single_file.load_vae(save_single_file(tmp_path / "v.safetensors", vae=models[1]), torch.float32)
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (1.5305, 0.0609)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(models, save_single_file, tmp_path, dtype):
    path = save_single_file(tmp_path / "sd3.safetensors", *models)
    for model in (single_file.load_transformer(path, dtype), single_file.load_vae(path, dtype)):
        assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_diffusers_keys(models, tmp_path):
    transformer, vae = models
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


def test_the_other_half_is_named(models, save_single_file, tmp_path, one_sentence):
    only_vae = save_single_file(tmp_path / "vae.safetensors", vae=models[1])
    only_transformer = save_single_file(tmp_path / "dit.safetensors", models[0])
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
def test_a_lost_weight_is_refused(models, save_single_file, tmp_path, one_sentence, lost):
    path = save_single_file(tmp_path / "sd3.safetensors", *models)
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path)
    load = single_file.load_transformer if "diffusion_model" in lost else single_file.load_vae
    with pytest.raises(CheckpointError) as caught:
        load(path, torch.float32)
    one_sentence(caught.value, path, "download")
