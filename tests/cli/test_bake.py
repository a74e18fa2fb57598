"""`tsdsr bake`, and upscaling with what it writes."""

import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tsdsr import PromptEmbeddings, TSDSRPipeline


def test_the_folder_upscales_as_the_model_does(tsdsr, kl_model, photo, small_tiles, tmp_path):
    picture = photo(tmp_path / "in.png")
    result = tsdsr("bake", kl_model, "-o", tmp_path / "baked")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"Wrote {tmp_path / 'baked'}"
    for name, model in (("plain", kl_model), ("baked", tmp_path / "baked")):
        done = tsdsr("upscale", picture, "-o", tmp_path / f"{name}.png", "--model", model, *small_tiles)
        assert done.exit_code == 0, done.output
    one, other = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("plain", "baked"))
    assert np.abs(one - other).max() <= 1
    said = json.loads(tsdsr("info", tmp_path / "baked", "--json").stdout)
    assert said["family"].endswith("baked") and said["components"]["transformer"] == "OneStepSD3Transformer2DModel"
    card = (tmp_path / "baked" / "README.md").read_text()
    assert "baked into the transformer" in card and 'from_pretrained("baked")' in card


def test_another_prompt_and_another_dtype(tsdsr, kl_model, tmp_path):
    torch.manual_seed(9)
    PromptEmbeddings.from_tensors(torch.randn(1, 5, 12), torch.randn(1, 10)).save_pretrained(tmp_path / "prompt")
    result = tsdsr(
        "bake", kl_model, "-o", tmp_path / "baked", "--prompt-embeddings", tmp_path / "prompt", "--dtype", "bf16"
    )
    assert result.exit_code == 0, result.output
    pipeline = TSDSRPipeline.from_pretrained(tmp_path / "baked", dtype=torch.bfloat16)
    assert pipeline.transformer.config.prompt_tokens == 5
    assert json.loads(tsdsr("info", tmp_path / "baked", "--json").stdout)["dtype"] == "bfloat16"


def test_refusals(tsdsr, kl_model, files, assert_refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert_refused(tsdsr("bake", kl_model, "-o", tmp_path / "full"), "full", "not empty")
    assert_refused(tsdsr("bake", kl_model, "-o", tmp_path / "full", "--overwrite"), "model_index.json")
    assert_refused(tsdsr("bake", tmp_path / "absent", "-o", tmp_path / "out"), "absent")
    assert_refused(tsdsr("bake", kl_model, "-o", kl_model, "--overwrite"), "input")
    assert_refused(tsdsr("bake", kl_model, "-o", tmp_path / "out", "--fidelity", "0.5"), "LoRA")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_baked_model_is_written_again(tsdsr, kl_model, tmp_path):
    assert tsdsr("bake", kl_model, "-o", tmp_path / "baked").exit_code == 0
    for dtype, same in (("fp32", True), ("bf16", False)):
        done = tsdsr("bake", tmp_path / "baked", "-o", tmp_path / dtype, "--dtype", dtype)
        assert done.exit_code == 0, done.output
        once, again = (
            load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
            for name in ("baked", dtype)
        )
        assert once.keys() == again.keys()
        assert all(torch.equal(weight, again[name]) for name, weight in once.items()) is same
        assert all(torch.equal(weight.to(again[name].dtype), again[name]) for name, weight in once.items())
    PromptEmbeddings.from_tensors(torch.randn(1, 5, 12), torch.randn(1, 10)).save_pretrained(tmp_path / "prompt")
    refused = tsdsr("bake", tmp_path / "baked", "-o", tmp_path / "b", "--prompt-embeddings", tmp_path / "prompt")
    assert refused.exit_code == 2 and "bake the original" in refused.stderr and not (tmp_path / "b").exists()
    assert tsdsr("bake", kl_model, "-o", tmp_path / "baked", "--overwrite").exit_code == 0


def test_it_goes_to_the_hub_like_any_other(tsdsr, kl_model, tmp_path):
    """The folder that would be uploaded upscales as the model does, with its code beside it."""
    assert tsdsr("bake", kl_model, "-o", tmp_path / "baked").exit_code == 0
    result = tsdsr(
        "push", tmp_path / "baked", "someone/test", "--dry-run", "--no-sample", "--include-code", "-o", tmp_path / "hub"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "hub" / "transformer" / "tsdsr.py").is_file()
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "baked into the transformer" in card and 'from_pretrained("someone/test"' in card
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    small = {"process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "pt"}
    one, other = (TSDSRPipeline.from_pretrained(tmp_path / name)(picture, **small).images for name in ("baked", "hub"))
    assert torch.equal(one, other)
