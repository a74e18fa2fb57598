"""Captions through a base's text encoders."""

import json

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tsdsr.training.text import load_text_encoder

CLIP = ["transformers", "CLIPTextModelWithProjection"]
TOKENIZER = ["transformers", "CLIPTokenizer"]


def index(folder, **parts):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **parts}))


@pytest.fixture
def sd3(make_pipeline, tmp_path, clip_tokenizer, clip_config):
    """SD3 without T5; its transformer reads tokens of 20 numbers, CLIP's two make 16."""
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    transformer = SD3Transformer2DModel(**sizes, in_channels=4, joint_attention_dim=20, pooled_projection_dim=16)
    transformer.save_config(tmp_path / "transformer")  # no weights: they are not looked at
    make_pipeline().scheduler.save_pretrained(tmp_path / "scheduler")
    torch.manual_seed(1)
    for suffix in ("", "_2"):
        encoder = CLIPTextModelWithProjection(clip_config()).half()
        encoder.save_pretrained(tmp_path / f"text_encoder{suffix}")
        clip_tokenizer.save_pretrained(tmp_path / f"tokenizer{suffix}")
    index(
        tmp_path,
        transformer=["diffusers", "SD3Transformer2DModel"],
        vae=["diffusers", "AutoencoderKL"],
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        text_encoder=CLIP,
        text_encoder_2=CLIP,
        text_encoder_3=[None, None],
        tokenizer=TOKENIZER,
        tokenizer_2=TOKENIZER,
        tokenizer_3=[None, None],
    )
    return tmp_path


def test_sd3_without_t5(sd3, clip_tokenizer):
    """CLIP's tokens side by side, zeros behind them and where T5's would be; pooled ones side by side."""
    embeds, pooled = load_text_encoder(str(sd3))(["red", "blue"])
    assert embeds.dtype == pooled.dtype == torch.float32
    clip_tokens = clip_tokenizer.model_max_length
    assert embeds.shape[0] == 2 and embeds.shape[1] > clip_tokens and embeds.shape[2] == 20
    assert pooled.shape == (2, 16)
    assert (embeds[:, :clip_tokens, :16] != 0).all() and (embeds[:, :clip_tokens, 16:] == 0).all()
    assert (embeds[:, clip_tokens:] == 0).all()
    tokens = clip_tokenizer("red", padding="max_length", max_length=8, return_tensors="pt").input_ids
    for number, suffix in enumerate(("", "_2")):
        encoder = CLIPTextModelWithProjection.from_pretrained(sd3 / f"text_encoder{suffix}", dtype=torch.float32)
        with torch.no_grad():
            out = encoder(tokens, output_hidden_states=True)
        part = slice(8 * number, 8 * number + 8)
        torch.testing.assert_close(embeds[:1, :clip_tokens, part], out.hidden_states[-2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pooled[:1, part], out.text_embeds, rtol=1e-4, atol=1e-4)
    assert not torch.equal(embeds[0], embeds[1])


def test_parts_that_an_index_does_not_name(sd3):
    said = json.loads((sd3 / "model_index.json").read_text())
    expected = load_text_encoder(str(sd3))(["red"])
    index(sd3, **{name: said[name] for name in said if name not in ("text_encoder_3", "tokenizer_3", "_class_name")})
    embeds, pooled = load_text_encoder(str(sd3))(["red"])
    assert torch.equal(embeds, expected[0]) and torch.equal(pooled, expected[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sd2(tmp_path, clip_tokenizer, clip_config, dtype):
    """float32 whatever the encoder was saved in; cut and filled up to the tokenizer's length."""
    torch.manual_seed(1)
    encoder = CLIPTextModel(clip_config()).to(dtype)
    encoder.save_pretrained(tmp_path / "text_encoder")
    clip_tokenizer.save_pretrained(tmp_path / "tokenizer")
    index(
        tmp_path,
        unet=["diffusers", "UNet2DConditionModel"],
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=TOKENIZER,
    )
    embeds, pooled = load_text_encoder(str(tmp_path))(["red", "a caption of many more letters"])
    assert pooled is None and embeds.dtype == torch.float32 and embeds.shape == (2, 8, 8)
    tokens = clip_tokenizer("red", padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(embeds[:1], encoder.float()(tokens)[0], rtol=1e-4, atol=1e-4)


def test_a_base_without_text_encoders(base_folder, tmp_path):
    assert load_text_encoder(str(base_folder)) is None
    index(tmp_path, unet=["diffusers", "UNet2DConditionModel"], text_encoder=[None, None], tokenizer=[None, None])
    assert load_text_encoder(str(tmp_path)) is None
