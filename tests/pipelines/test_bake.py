"""A pipeline in which everything constant is worked out: the same results, wherever it is loaded."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from tsdsr import OneStepSD3Transformer2DModel, TSDSRPipeline, describe
from tsdsr.pipelines.loading import load_pipeline

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "np"}


@pytest.fixture
def baked(make_pipeline):
    pipeline = make_pipeline("kl")
    pipeline.bake()
    return pipeline


@pytest.mark.parametrize(
    "more", [{}, {"vae_tile_size": 16, "tile_batch_size": 3}, {"color_fix": "adain", "upscale": 2}]
)
def test_results_stay(make_pipeline, picture, more):
    pipeline, images = make_pipeline("kl"), [picture(21, 34), picture(20, 8, seed=1)]
    expected = pipeline(images, **SMALL, **more).images
    pipeline.bake()
    assert isinstance(pipeline.transformer, OneStepSD3Transformer2DModel) and pipeline.prompt_embeddings is None
    for result, right in zip(pipeline(images, **SMALL, **more).images, expected, strict=True):
        np.testing.assert_allclose(result, right, rtol=0, atol=3e-5)


def test_loras_are_added_at_their_strength(make_pipeline, picture):
    pipeline, image = make_pipeline("kl"), picture(20, 8)
    bare = pipeline(image, **SMALL).images
    torch.manual_seed(3)
    for network, layers in ((pipeline.transformer, ["to_q", "linear", "proj"]), (pipeline.vae, ["encoder.conv_in"])):
        network.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False), "one")
    pipeline.set_adapters(["one"], [0.5])
    expected = pipeline(image, **SMALL).images
    assert np.abs(expected - bare).max() > 1e-3
    pipeline.bake()
    assert not any(pipeline.get_list_adapters().values())
    np.testing.assert_allclose(pipeline(image, **SMALL).images, expected, rtol=0, atol=3e-5)


def test_a_folder_of_it_loads_like_any_other(baked, picture, tmp_path):
    expected = baked(picture(20, 8), **SMALL).images
    baked.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["transformer"] == ["tsdsr", "OneStepSD3Transformer2DModel"]
    assert index["prompt_embeddings"] == [None, None] and index["timestep"] == 1000
    for load in (TSDSRPipeline.from_pretrained, DiffusionPipeline.from_pretrained, load_pipeline):
        pipeline = load(tmp_path / "model")
        pipeline.set_progress_bar_config(disable=True)
        assert isinstance(pipeline, TSDSRPipeline) and pipeline.is_baked
        np.testing.assert_allclose(pipeline(picture(20, 8), **SMALL).images, expected, rtol=0, atol=1e-5)
    said = describe(tmp_path / "model")
    assert said["family"] == "TSD-SR on SD3, baked" and said["layers"] == 2
    assert said["parameters"]["transformer"] == sum(weight.numel() for weight in baked.transformer.parameters())


def test_the_timestep_is_baked_too(make_pipeline, picture, tmp_path, one_sentence):
    pipeline = make_pipeline("kl", timestep=400.0)
    expected = pipeline(picture(20, 8), **SMALL).images
    pipeline.bake()
    np.testing.assert_allclose(pipeline(picture(20, 8), **SMALL).images, expected, rtol=0, atol=3e-5)
    parts = {name: part for name, part in pipeline.components.items() if name in ("vae", "transformer", "scheduler")}
    assert TSDSRPipeline(**parts).config.timestep == 400
    with pytest.raises(ValueError) as error:
        TSDSRPipeline(**parts, timestep=1000.0)
    one_sentence(error.value, "400", "1000")


def test_it_takes_no_other_prompt_and_no_lora_of_the_original(make_pipeline, baked, picture, one_sentence):
    tokens, pooled = torch.randn(1, 3, 12), torch.randn(1, 10)
    for arguments in ({"prompt": "sharp"}, {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}):
        with pytest.raises(ValueError) as error:
            baked(picture(8, 8), **arguments)
        one_sentence(error.value, "prompt", "baked")
    original = make_pipeline("kl")
    with pytest.raises(ValueError) as error:
        TSDSRPipeline(baked.vae, baked.transformer, baked.scheduler, original.prompt_embeddings)
    one_sentence(error.value, "prompt_embeddings")
    layer = "transformer.transformer_blocks.0.attn.to_q"
    with pytest.raises(ValueError) as error:
        baked.load_lora_weights(
            {f"{layer}.lora_A.weight": torch.zeros(2, 16), f"{layer}.lora_B.weight": torch.zeros(16, 2)}
        )
    one_sentence(error.value, "baked", "original")
    assert not any(baked.get_list_adapters().values())


def test_what_cannot_be_baked(make_pipeline, baked, one_sentence):
    kinds = {
        "UNet": make_pipeline("kl", "unet"),
        "prompt_embeddings": make_pipeline("kl", prompt_embeddings=None),
        "already": baked,
    }
    stored = make_pipeline("kl")
    stored.transformer.to(torch.float8_e4m3fn)
    for word, pipeline in {**kinds, "8 bits": stored}.items():
        with pytest.raises(ValueError) as error:
            pipeline.bake()
        one_sentence(error.value, word)


def test_offloaded_compiled_and_in_halves(baked, picture, tmp_path):
    image = picture(20, 8)
    expected = baked(image, **SMALL).images
    baked.save_pretrained(tmp_path / "model")
    half = TSDSRPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert np.abs(half(image, **SMALL).images - expected).mean() < 0.01
    baked.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    np.testing.assert_allclose(baked(image, **SMALL).images, expected, rtol=0, atol=1e-5)


def test_its_code_travels_along(baked, picture, tmp_path):
    expected = baked(picture(20, 8), **SMALL).images
    baked.save_pretrained(tmp_path / "model", include_code=True)
    # What the Hub needs to find beside the weights, which is whole by itself.
    assert (tmp_path / "model" / "transformer" / "tsdsr.py").is_file()
    np.save(tmp_path / "picture.npy", picture(20, 8))
    code = f"""
import sys
sys.modules["tsdsr"] = None
import importlib.util
import numpy as np
specification = importlib.util.spec_from_file_location("alone", "model/transformer/tsdsr.py")
module = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
module.OneStepSD3Transformer2DModel.from_pretrained("model/transformer")
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("model", trust_remote_code=True)
np.save("result.npy", pipeline(np.load("picture.npy"), **{SMALL!r}).images)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    np.testing.assert_allclose(np.load(tmp_path / "result.npy"), expected, rtol=0, atol=1e-5)
