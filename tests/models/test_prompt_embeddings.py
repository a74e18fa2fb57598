"""The fixed prompt as a component."""

import pytest
import torch

from tsdsr import PromptEmbeddings


def test_saved_and_loaded(tmp_path):
    prompt, pooled = torch.randn(1, 3, 12), torch.randn(1, 10)
    PromptEmbeddings.from_tensors(prompt, pooled).save_pretrained(tmp_path)
    loaded = PromptEmbeddings.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(loaded.prompt_embeds, prompt) and torch.equal(loaded.pooled_prompt_embeds, pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_pooled_embeddings(tmp_path, dtype):
    prompt = torch.randn(1, 77, 12, dtype=dtype)
    PromptEmbeddings.from_tensors(prompt, None).save_pretrained(tmp_path)
    loaded = PromptEmbeddings.from_pretrained(tmp_path, torch_dtype=dtype, local_files_only=True)
    assert torch.equal(loaded.prompt_embeds, prompt) and loaded.config.pooled_embed_dim == 0
    assert loaded.pooled_prompt_embeds.dtype == dtype and loaded.pooled_prompt_embeds.device.type == "cpu"
    assert [tuple(embeds.shape) for embeds in loaded(3)] == [(3, 77, 12), (3, 0)]


def test_batch_repeats_the_prompt():
    module = PromptEmbeddings.from_tensors(torch.randn(1, 3, 12), torch.randn(1, 10))
    prompt, pooled = module(4)
    assert prompt.shape == (4, 3, 12) and pooled.shape == (4, 10)
    assert torch.equal(prompt[3], module.prompt_embeds[0]) and torch.equal(pooled[3], module.pooled_prompt_embeds[0])


@pytest.mark.parametrize(
    ("prompt", "pooled", "named"),
    [((2, 3, 12), (1, 10), "prompt_embeds"), ((1, 3, 12), (10,), "pooled_prompt_embeds"), ((3, 12), (1, 10), "prompt")],
)
def test_wrong_shapes_are_named(prompt, pooled, named):
    with pytest.raises(ValueError, match=named):
        PromptEmbeddings.from_tensors(torch.zeros(prompt), torch.zeros(pooled))
