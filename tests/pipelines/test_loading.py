"""From a name to a pipeline."""

import pytest
import torch

from tsdsr import PromptEmbeddings, load_pipeline
from tsdsr.pipelines.loading import EMBEDDED

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "pt"}


@pytest.fixture
def folder(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_dtype(folder, dtype, expected):
    pipeline = load_pipeline(folder, dtype=dtype, device="cpu")
    assert pipeline.transformer.dtype == pipeline.vae.dtype == expected


def test_it_computes_what_from_pretrained_does(folder, make_pipeline, picture):
    loaded = load_pipeline(str(folder), device="cpu")
    loaded.set_progress_bar_config(disable=True)
    expected = make_pipeline()(picture(8, 8), **SMALL).images
    torch.testing.assert_close(loaded(picture(8, 8), **SMALL).images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": "./nowhere"}, "does not exist"),
        ({"model": "nowhere"}, "neither a folder nor a Hub id"),
        ({"dtype": "fp12"}, "dtype must be one of"),
        ({"device": "abacus"}, "not available"),
        ({"device": "cuda:77"}, "not available"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(folder, arguments, named):
    with pytest.raises(ValueError, match=named) as caught:
        load_pipeline(**{"model": folder, "device": "cpu", **arguments})
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)


def test_the_embedded_model_fits_its_budget():
    weights = list(EMBEDDED.rglob("*.safetensors"))
    assert weights and sum(path.stat().st_size for path in weights) <= 16 * 2**20


def test_convolutions_have_their_channels_last():
    weights = [weight for weight in load_pipeline(device="cpu").vae.parameters() if weight.ndim == 4]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize(("network", "pooled"), [("transformer", 10), ("unet", 0)])
def test_another_prompt_in_place_of_the_models_own(make_pipeline, picture, tmp_path, network, pooled):
    """In the number format of the pipeline, and only where it is as wide as the network takes."""
    make_pipeline("tiny", network).save_pretrained(tmp_path / "model")
    torch.manual_seed(7)
    prompt = PromptEmbeddings.from_tensors(torch.randn(1, 5, 12), torch.randn(1, pooled))
    prompt.save_pretrained(tmp_path / "prompt")
    loaded = load_pipeline(tmp_path / "model", prompt_embeddings=tmp_path / "prompt", device="cpu")
    loaded.set_progress_bar_config(disable=True)
    expected = make_pipeline("tiny", network, prompt_embeddings=prompt)(picture(8, 8), **SMALL).images
    torch.testing.assert_close(loaded(picture(8, 8), **SMALL).images, expected, atol=1e-5, rtol=0)
    half = load_pipeline(tmp_path / "model", prompt_embeddings=str(tmp_path / "prompt"), device="cpu", dtype="bf16")
    assert half.prompt_embeddings.dtype == torch.bfloat16
    for wrong in (PromptEmbeddings(5, 13, pooled), PromptEmbeddings(5, 12, pooled + 1)):
        wrong.save_pretrained(tmp_path / "prompt")
        with pytest.raises(ValueError, match=f"takes 12 and {pooled}"):
            load_pipeline(tmp_path / "model", prompt_embeddings=tmp_path / "prompt", device="cpu")
    with pytest.raises(ValueError, match="holds no prompt embeddings"):
        load_pipeline(tmp_path / "model", prompt_embeddings=tmp_path / "nowhere", device="cpu")
