"""SD3's transformer with one timestep and one prompt baked in, against the original."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch import nn

from tsdsr import OneStepSD3Transformer2DModel, PromptEmbeddings

# SD3, SD3.5 (normalised queries and keys, a second attention), and the shortest.
KINDS = {
    "sd3": {"num_layers": 3},
    "sd3.5": {"num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "one_block": {"num_layers": 1, "qk_norm": "rms_norm"},
    "two_blocks": {"num_layers": 2},
}


def original(seed=0, **config):
    """A transformer whose every weight counts, and its prompt."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        **config,
    ).eval()
    for weight in transformer.parameters():
        nn.init.normal_(weight, std=0.2)
    return transformer, PromptEmbeddings.from_tensors(torch.randn(1, 7, 24), torch.randn(1, 20))


@torch.no_grad()
def run(transformer, prompt, latents, timestep=1000.0):
    count, dtype = len(latents), latents.dtype
    return transformer(
        latents,
        prompt.prompt_embeds.to(dtype).expand(count, -1, -1),
        prompt.pooled_prompt_embeds.to(dtype).expand(count, -1),
        torch.full((count,), timestep, dtype=dtype),
    ).sample


@torch.no_grad()
def run_baked(baked, latents):
    return baked(latents).sample


def distance(a, b):
    return float((a.double() - b.double()).abs().max() / (b.max() - b.min()))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 4, 20, 14, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_original_computes(kind, latents):
    transformer, prompt = original(**KINDS[kind])
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt)
    exact = run(copy.deepcopy(transformer).double(), prompt, latents.double())
    plain = run(transformer, prompt, latents)
    assert distance(run_baked(baked, latents), exact) < 1.5 * distance(plain, exact) + 1e-6 < 1e-4
    # In whole, not by this picture: another size, batch and seed.
    other = torch.randn(3, 4, 24, 6)
    assert distance(run_baked(baked, other), run(transformer, prompt, other)) < 1e-4


def test_in_bfloat16_it_is_no_farther_from_the_truth_than_the_original():
    ours, originals = [], []
    for seed in range(4):
        transformer, prompt = original(seed, num_layers=4)
        latents = torch.randn(2, 4, 20, 14)
        exact = run(copy.deepcopy(transformer).double(), prompt, latents.double())
        baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt, dtype=torch.bfloat16)
        assert baked.dtype == torch.bfloat16
        ours.append((run_baked(baked, latents.bfloat16()).double() - exact).square().mean())
        plain = run(transformer.bfloat16(), prompt, latents.bfloat16())
        originals.append((plain.double() - exact).square().mean())
    assert sum(ours) <= sum(originals)


@pytest.mark.parametrize("timestep", [1000.0, 250.0])
def test_the_timestep_is_the_one_that_was_asked_for(latents, timestep):
    transformer, prompt = original(num_layers=2)
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt, timestep)
    assert baked.config.timestep == timestep
    assert distance(run_baked(baked, latents), run(transformer, prompt, latents, timestep)) < 1e-4
    assert distance(run_baked(baked, latents), run(transformer, prompt, latents, 500.0)) > 1e-3


def test_the_prompt_is_part_of_it(latents):
    transformer, prompt = original(num_layers=2)
    other = PromptEmbeddings.from_tensors(prompt.prompt_embeds.flip(-1), prompt.pooled_prompt_embeds)
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, other)
    assert distance(run_baked(baked, latents), run(transformer, other, latents)) < 1e-4
    assert distance(run_baked(baked, latents), run(transformer, prompt, latents)) > 1e-3


def test_without_a_text_stream_only_the_picture_attends(latents):
    transformer, prompt = original(num_layers=3)
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt, text_stream="none")
    parts = {part for name, _ in baked.named_parameters() for part in name.split(".")}
    assert not parts & {"prompt", "added_qkv", "to_added_qkv", "to_added_out", "ff_context"}
    changed = copy.deepcopy(transformer)
    for block in changed.transformer_blocks:

        def alone(attn, hidden_states, encoder_hidden_states, **_):
            query, key, value = (
                layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for layer in (attn.to_q, attn.to_k, attn.to_v)
            )
            attended = nn.functional.scaled_dot_product_attention(query, key, value)
            return attn.to_out[0](attended.transpose(1, 2).flatten(2)), torch.zeros_like(encoder_hidden_states)

        block.attn.set_processor(alone)
    assert distance(run_baked(baked, latents), run(changed, prompt, latents)) < 1e-4


@pytest.mark.parametrize("separable", [True, False])
def test_positions_of_any_table(latents, separable):
    transformer, prompt = original(num_layers=2)
    if not separable:
        nn.init.normal_(transformer.pos_embed.pos_embed)
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt)
    assert baked.config.separable_positions == separable
    assert distance(run_baked(baked, latents), run(transformer, prompt, latents)) < 1e-4
    with pytest.raises(ValueError, match="13x5 patches"):
        run_baked(baked, torch.zeros(1, 4, 26, 10))


def test_sizes_of_sd3_medium():
    with torch.device("meta"):
        full = OneStepSD3Transformer2DModel()
        image_only = OneStepSD3Transformer2DModel(num_layers=12, text_stream="none", prompt_tokens=0)

    def count(model):
        return sum(weight.numel() for weight in model.parameters())

    block = 4 * (1536 * 1536 + 1536) + 2 * 1536 * 6144 + 6144 + 1536
    # The prompt's side: not asked for in the last block beyond its keys and values, and known in the first.
    prompt = 23 * block + 2 * (1536 * 1536 + 1536) - 3 * (1536 * 1536 + 1536) + 4 * 333 * 1536
    ends = 16 * 4 * 1536 + 1536 + 1536 * 64 + 64
    assert count(full) == 24 * block + prompt + ends <= 1345e6
    assert count(image_only) == 12 * block + ends
    assert round(count(image_only) / 1e6, 1) == 340.1


def test_saved_and_loaded(latents, tmp_path):
    transformer, prompt = original(**KINDS["sd3.5"])
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt)
    baked.save_pretrained(tmp_path)
    again = OneStepSD3Transformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run_baked(again, latents), run_baked(baked, latents))
    # Slices of larger tensors would be saved with what they are cut from.
    size = sum(tensor.numel() for tensor in baked.state_dict().values()) * 4
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size < size + 10_000


def test_gradients_with_and_without_checkpointing(latents):
    transformer, prompt = original(num_layers=3)
    found = []
    for checkpointing in (False, True):
        baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt)
        if checkpointing:
            baked.enable_gradient_checkpointing()
        baked.train()(latents, return_dict=False)[0].square().mean().backward()
        found.append({name: weight.grad for name, weight in baked.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], gradient)


def test_compiled_without_a_break(latents):
    transformer, prompt = original(**KINDS["sd3.5"])
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt)
    compiled = torch.compile(baked, fullgraph=True, backend="eager")
    torch.testing.assert_close(run_baked(compiled, latents), run_baked(baked, latents))


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_goes_through_the_dispatcher(latents, backend):
    transformer, prompt = original(num_layers=2)
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt)
    expected = run_baked(baked, latents)
    with attention_backend("native"):  # else it stays the default of everything after this test
        baked.set_attention_backend(backend)
    assert {block.attn.processor._attention_backend.value for block in baked.transformer_blocks} == {backend}
    torch.testing.assert_close(run_baked(baked, latents), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_baked(one_sentence):
    transformer, prompt = original(num_layers=2)
    for tokens, pooled in ((23, 20), (24, 19)):
        other = PromptEmbeddings.from_tensors(torch.randn(1, 7, tokens), torch.randn(1, pooled))
        with pytest.raises(ValueError) as error:
            OneStepSD3Transformer2DModel.from_sd3(transformer, other)
        one_sentence(error.value, tokens, pooled, "24", "20")
    with pytest.raises(ValueError, match="text_stream"):
        OneStepSD3Transformer2DModel(text_stream="half")
    with pytest.raises(ValueError, match="prompt_tokens"):
        OneStepSD3Transformer2DModel(text_stream="none", prompt_tokens=3)
    with pytest.raises(ValueError, match="qk_norm"):
        OneStepSD3Transformer2DModel(qk_norm="layer_norm")
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="LoRAs") as error:
        OneStepSD3Transformer2DModel.from_sd3(transformer, prompt)
    one_sentence(error.value, "fuse_lora()")


def test_lora_of_its_own(latents):
    transformer, prompt = original(num_layers=2)
    baked = OneStepSD3Transformer2DModel.from_sd3(transformer, prompt)
    expected = run_baked(baked, latents)
    baked.add_adapter(LoraConfig(r=2, target_modules=["to_qkv", "to_out"], init_lora_weights=False))
    assert distance(run_baked(baked, latents), expected) > 1e-3
    with torch.no_grad():
        scaled = baked(latents, joint_attention_kwargs={"scale": 0.0}).sample
    torch.testing.assert_close(scaled, expected)
