"""Tiny pipelines with random weights: the real classes, small enough that a test takes a moment."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tsdsr import PromptEmbeddings, TSDSRPipeline

from .fake_hub import TOKEN, FakeHub


@pytest.fixture(autouse=True)
def _default_attention() -> Iterator[None]:
    """No test may leave another kernel of attention behind: later ones would differ in their last digits."""
    yield
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def _vae(kind: str) -> AutoencoderKL | AutoencoderTiny:
    if kind == "tiny":  # f = 4
        return AutoencoderTiny(
            encoder_block_out_channels=[8, 8, 8],
            decoder_block_out_channels=[8, 8, 8],
            num_encoder_blocks=[0, 0, 1],
            num_decoder_blocks=[1, 0, 0],
            latent_channels=4,
        )
    return AutoencoderKL(  # f = 2, with a posterior
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        pos_embed_max_size=16,
    )


def _unet() -> UNet2DConditionModel:  # halves its input once
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        use_linear_projection=True,
    )


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., TSDSRPipeline]:
    """A function that builds a pipeline with random weights: `make_pipeline(vae, network, **pipeline_arguments)`.

    `vae` is "tiny" or "kl", `network` "transformer" or "unet".
    """

    def make(vae: str = "tiny", network: str = "transformer", **arguments: object) -> TSDSRPipeline:
        torch.manual_seed(0)
        modules: dict[str, object] = {}
        if network == "unet":
            modules["unet"] = _unet().eval()
            # SD2's schedule of betas.
            modules["scheduler"] = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
            modules["vae"] = _vae(vae).eval()
            modules["prompt_embeddings"] = PromptEmbeddings.from_tensors(torch.randn(1, 3, 12))
        else:
            modules["transformer"] = _transformer().eval()
            modules["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
            modules["vae"] = _vae(vae).eval()
            modules["prompt_embeddings"] = PromptEmbeddings.from_tensors(torch.randn(1, 3, 12), torch.randn(1, 10))
        pipeline = TSDSRPipeline(**{**modules, **arguments})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int], np.ndarray]:
    """A function for smooth random pictures (H, W, 3), float32, 0..1: `picture(height, width)`."""

    def make(height: int, width: int, seed: int = 0) -> np.ndarray:
        noise = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
        smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear", align_corners=True)
        return smooth[0].permute(1, 2, 0).contiguous().numpy()

    return make


@pytest.fixture(scope="session")
def one_sentence():
    """Check that an error reads as one sentence and says all of `words`."""

    def check(error, *words):
        message = str(error)
        assert "\n" not in message
        assert message.endswith(".")
        assert not re.search(r"[.!?] +[A-Z]", message), f"more than one sentence: {message}"
        for word in words:
            assert str(word) in message, f"{word} is not named in: {message}"
        return message

    return check


@pytest.fixture(scope="session")
def sd3():
    """A tiny SD3 whose sizes can be read off its weights: heads of 64, 16 latent channels."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=12,
        caption_projection_dim=128,
        pooled_projection_dim=10,
        pos_embed_max_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return transformer.eval(), vae.eval()


@pytest.fixture(scope="session")
def text_encoders() -> dict[str, torch.nn.Module]:
    """SD3's three text encoders in miniature, by their names in the pipeline; CLIP-L's projection changes nothing."""
    torch.manual_seed(1)

    def clip(width: int, projection: int, act: str) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=54,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=width // 64,
            max_position_embeddings=8,
            projection_dim=projection,
            hidden_act=act,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
        return CLIPTextModelWithProjection(config).eval()

    clip_l, clip_g = clip(64, 64, "quick_gelu"), clip(128, 24, "gelu")
    clip_l.text_projection.weight.data = torch.eye(64)
    sizes = {"vocab_size": 30, "d_model": 192, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 3}
    t5 = T5EncoderModel(T5Config(**sizes, relative_attention_num_buckets=16, feed_forward_proj="gated-gelu")).eval()
    encoders = {"text_encoder": clip_l, "text_encoder_2": clip_g, "text_encoder_3": t5}
    for encoder in encoders.values():  # far enough from zero that all of it counts
        for weight in encoder.parameters():
            if weight is not clip_l.text_projection.weight:
                weight.data += 0.1 * torch.randn_like(weight)
    return encoders


def _original_transformer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' keys of an SD3 transformer -> Stability AI's."""
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    simple = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        **{
            f"time_text_embed.{ours}_embedder.linear_{i}": f"{theirs}_embedder.mlp.{2 * (i - 1)}"
            for ours, theirs in (("timestep", "t"), ("text", "y"))
            for i in (1, 2)
        },
    }

    def swapped(tensor: torch.Tensor) -> torch.Tensor:  # scale, shift -> shift, scale
        return torch.cat(tensor.chunk(2)[::-1])

    found = {}
    for key, tensor in weights.items():
        module, _, kind = key.rpartition(".")
        if key in simple or module in simple:
            found[simple.get(key) or f"{simple[module]}.{kind}"] = tensor
        elif module == "norm_out.linear":
            found[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(tensor)
    for index in range(last + 1):
        ours, theirs = f"transformer_blocks.{index}", f"joint_blocks.{index}"
        for kind in ("weight", "bias"):
            for block, names in (
                ("x_block", ("to_q", "to_k", "to_v")),
                ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                parts = [weights[f"{ours}.attn.{name}.{kind}"] for name in names]
                found[f"{theirs}.{block}.attn.qkv.{kind}"] = torch.cat(parts)
            for name, target in (
                ("attn.to_out.0", "x_block.attn.proj"),
                ("attn.to_add_out", "context_block.attn.proj"),
                ("norm1.linear", "x_block.adaLN_modulation.1"),
                ("norm1_context.linear", "context_block.adaLN_modulation.1"),
                ("ff.net.0.proj", "x_block.mlp.fc1"),
                ("ff.net.2", "x_block.mlp.fc2"),
                ("ff_context.net.0.proj", "context_block.mlp.fc1"),
                ("ff_context.net.2", "context_block.mlp.fc2"),
            ):
                tensor = weights.get(f"{ours}.{name}.{kind}")
                if tensor is not None:
                    ends = name == "norm1_context.linear" and index == last
                    found[f"{theirs}.{target}.{kind}"] = swapped(tensor) if ends else tensor
    return found


def _original_vae(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' keys of an AutoencoderKL -> those of latent diffusion."""
    levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("decoder.up_blocks."))
    renames = [
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ]
    found = {}
    for key, tensor in weights.items():
        original = key
        for pattern, replacement in renames:
            original = re.sub(pattern, replacement, original)
        if ".attn_1." in original and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        found[original] = tensor
    return found


@pytest.fixture(scope="session")
def save_single_file() -> Callable[..., Path]:
    """A function that writes networks as one file in Stability AI's layout: `save(path, transformer, vae)`.

    `text_encoders` are given by their names in the pipeline, other tensors by their keys.
    """
    packed = {
        "text_encoder": ("text_encoders.clip_l.transformer.", "text_projection.weight"),
        "text_encoder_2": ("text_encoders.clip_g.transformer.", None),
        "text_encoder_3": ("text_encoders.t5xxl.transformer.", "encoder.embed_tokens.weight"),
    }

    def save(
        path: Path,
        transformer=None,
        vae=None,
        prefixes=("model.diffusion_model.", "first_stage_model."),
        text_encoders=None,
        **more,
    ):
        tensors = dict(more)
        for name, encoder in (text_encoders or {}).items():
            prefix, left_out = packed[name]
            weights = encoder.state_dict().items()
            tensors.update({f"{prefix}{key}": value for key, value in weights if key != left_out})
        if transformer is not None:
            converted = _original_transformer(transformer.state_dict())
            tensors.update({f"{prefixes[0]}{key}": value for key, value in converted.items()})
        if vae is not None:
            converted = _original_vae(vae.state_dict())
            tensors.update({f"{prefixes[1]}{key}": value for key, value in converted.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
        return path

    return save


@pytest.fixture(scope="session")
def clip_tokenizer() -> CLIPTokenizer:
    """One that knows letters, eight tokens long."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)}, merges=[], model_max_length=8
    )


@pytest.fixture(scope="session")
def clip_config() -> Callable[..., CLIPTextConfig]:
    """A function that describes a tiny CLIP text encoder, whose tokens and pooled vectors are `width` numbers."""
    return lambda width=8: CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


@pytest.fixture(scope="session")
def t5_tokenizer() -> T5TokenizerFast:
    """One that knows letters, of any number of tokens."""
    letters = [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -5.0), ("▁", -1.0), *letters], extra_ids=0)


@pytest.fixture(scope="session")
def save_text_base(clip_tokenizer, clip_config, t5_tokenizer) -> Callable[..., Path]:
    """A function that saves the text encoders of a base whose prompts fit `make_pipeline`'s networks, and what says how
    wide they are: `save_text_base(folder, "sd3" or "sd2", t5=True)`. CLIP reads 8 tokens, T5 as many as asked for.
    """

    def save(folder: Path, kind: str, t5: bool = True) -> Path:
        torch.manual_seed(1)
        index: dict[str, object] = {}

        def add(suffix: str, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
            encoder.save_pretrained(folder / f"text_encoder{suffix}")
            tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
            index[f"text_encoder{suffix}"] = ["transformers", type(encoder).__name__]
            index[f"tokenizer{suffix}"] = ["transformers", name]

        if kind == "sd2":
            index |= {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
            add("", CLIPTextModel(clip_config(12)), clip_tokenizer, "CLIPTokenizer")
        else:
            index |= {
                "_class_name": "StableDiffusion3Pipeline",
                "transformer": ["diffusers", "SD3Transformer2DModel"],
                "text_encoder_3": [None, None],
                "tokenizer_3": [None, None],
            }
            _transformer().save_config(folder / "transformer")  # no weights: embedding does not look at them
            for suffix, width in (("", 4), ("_2", 6)):
                add(suffix, CLIPTextModelWithProjection(clip_config(width)), clip_tokenizer, "CLIPTokenizer")
            if t5:
                sizes = {"vocab_size": 30, "d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
                add("_3", T5EncoderModel(T5Config(**sizes)), t5_tokenizer, "T5TokenizerFast")
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return save


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hugging Face Hub on this machine: for uploads of this process, and for processes with its `environment`."""
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
