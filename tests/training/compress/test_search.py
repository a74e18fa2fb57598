"""A mask on a transformer against the pruned one, diffusers' own skipping and the formula; LoRA and gates together."""

import copy

import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from peft import LoraConfig
from torch import nn

from tsdsr import OneStepSD3Transformer2DModel, PromptEmbeddings
from tsdsr.training.compress import (
    DepthSearch,
    Group,
    MaskDistribution,
    even_groups,
    kept_layers,
    layer_mask,
    masked,
    prune,
    pruned_config,
)
from tsdsr.training.config import ConfigError, DistillConfig
from tsdsr.training.families import RectifiedFlow
from tsdsr.training.networks import STUDENT, TEACHER
from tsdsr.training.optimisation import Optimisation

FAMILY = RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0))
# SD3, and SD3.5 with normalised queries and keys and a second attention in some blocks.
KINDS = {"sd3": {}, "sd3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 3, 4)}}
# Blocks that stay of 6: with the last, without it, one alone.
KEPT = [(0, 2, 5), (1, 3, 4), (0, 1, 2, 3), (2,), (5,)]


@torch.no_grad()
def run(transformer, inputs):
    return transformer(**inputs).sample


def watched(transformer, inputs):
    """What each block takes in, (picture, prompt), by its number; and the transformer's result."""
    seen = {}
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: seen.update(
                {index: (kwargs["hidden_states"].clone(), kwargs["encoder_hidden_states"].clone())}
            ),
            with_kwargs=True,
        )
        for index, block in enumerate(transformer.transformer_blocks)
    ]
    result = run(transformer, inputs)
    for hook in hooks:
        hook.remove()
    return seen, result


def by_formula(transformer, inputs, mask):
    """x_{i+1} = m_i * phi_i(x_i) + (1 - m_i) * x_i, block by block; `mask` (depth,)."""
    picture = transformer.pos_embed(inputs["hidden_states"])
    embedding = transformer.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
    prompt = transformer.context_embedder(inputs["encoder_hidden_states"])
    for share, block in zip(mask, transformer.transformer_blocks, strict=True):
        new_prompt, new_picture = block(picture, prompt, embedding)
        picture = share * new_picture + (1 - share) * picture
        if new_prompt is not None:
            prompt = share * new_prompt + (1 - share) * prompt
    patches = transformer.proj_out(transformer.norm_out(picture, embedding))
    height, width = (length // 2 for length in inputs["hidden_states"].shape[-2:])
    patches = patches.reshape(len(patches), height, width, 2, 2, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, 2 * height, 2 * width)


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hard_mask_is_the_network_without_those_blocks(make_transformer, inputs, kind, kept):
    transformer = make_transformer(6, **KINDS[kind])
    whole, mask = run(transformer, inputs), layer_mask(kept, 6)
    with masked(transformer, mask):
        streams, result = watched(transformer, inputs)
    pruned = prune(transformer, mask)
    pruned_streams, pruned_result = watched(pruned, inputs)
    assert len(pruned.transformer_blocks) == len(kept)
    for new, old in enumerate(kept):
        for wanted, found in zip(pruned_streams[new], streams[old], strict=True):
            assert torch.equal(found, wanted)
    torch.testing.assert_close(result, pruned_result, rtol=0, atol=3e-5)
    dropped = [index for index in range(6) if index not in kept]
    with torch.no_grad():
        skipped = transformer(**inputs, skip_layers=dropped).sample
    torch.testing.assert_close(result, skipped, rtol=0, atol=3e-5)
    assert (result - whole).abs().max() > 0.1 and torch.equal(run(transformer, inputs), whole)
    assert not any(block._forward_hooks for block in transformer.transformer_blocks)


def test_pruned_blocks_are_numbered_anew(make_transformer):
    transformer = make_transformer(6, **KINDS["sd3.5"])
    pruned = prune(transformer, layer_mask((1, 2, 4), 6))
    assert pruned.config.num_layers == 3 and tuple(pruned.config.dual_attention_layers) == (0, 2)
    assert [block.use_dual_attention for block in pruned.transformer_blocks] == [True, False, True]
    assert [block.context_pre_only for block in pruned.transformer_blocks] == [False, False, True]
    assert pruned_config(transformer.config, (0, 5))["dual_attention_layers"] == (0,)
    assert transformer.config.num_layers == 6


def test_half_of_sd3_medium_has_the_published_size():
    """TinySR's backbone before its prompt and modulation are taken out: 1008.6 of 2028.3 million parameters."""
    medium = {
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    }
    counts = []
    with torch.device("meta"):
        for config in (medium, pruned_config(medium, tuple(range(0, 24, 2)))):
            weights = SD3Transformer2DModel(**config).parameters()
            counts.append(sum(weight.numel() for weight in weights) / 1e6)
    assert counts == pytest.approx([2028.3, 1008.6], abs=0.1)


def test_a_pruned_transformer_stands_alone(make_transformer, inputs, tmp_path):
    transformer = make_transformer(4).to(torch.bfloat16)
    inputs = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    pruned = prune(transformer, layer_mask((0, 2), 4))
    assert pruned.dtype == torch.bfloat16 and not pruned.training
    result, whole = run(pruned, inputs), run(transformer, inputs)
    pruned.save_pretrained(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(run(loaded, inputs), result)
    for weight in pruned.parameters():
        weight.data.zero_()
    assert torch.equal(run(transformer, inputs), whole)


@pytest.mark.parametrize("text_stream", ["full", "none"])
def test_a_pruned_transformer_is_baked_like_any_other(make_transformer, inputs, text_stream):
    pruned = prune(make_transformer(5), layer_mask((0, 1, 3), 5))
    prompt = PromptEmbeddings.from_tensors(inputs["encoder_hidden_states"][:1], inputs["pooled_projections"][:1])
    baked = OneStepSD3Transformer2DModel.from_sd3(pruned, prompt, text_stream=text_stream)
    assert baked.config.num_layers == 3
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    with torch.no_grad():
        result = baked(one["hidden_states"]).sample
    close = torch.allclose(result, run(pruned, one), rtol=0, atol=1e-3)
    assert close == (text_stream == "full")


def test_a_soft_mask_mixes_both_streams(make_transformer, inputs):
    transformer = make_transformer(4)
    mask = torch.tensor([0.9, 0.25, 0.6, 0.7])
    with torch.no_grad(), masked(transformer, mask):
        result = transformer(**inputs).sample
    with torch.no_grad():
        wanted = by_formula(transformer, inputs, mask)
    torch.testing.assert_close(result, wanted, rtol=0, atol=3e-5)
    assert (wanted - by_formula(transformer, inputs, 1 - mask)).abs().max() > 0.1


def test_each_picture_may_have_its_own_mask(make_transformer, inputs):
    transformer = make_transformer(4)
    masks = torch.stack([layer_mask((0, 2), 4), layer_mask((1, 3), 4)])
    with masked(transformer, masks):
        both = run(transformer, inputs)
    for index, mask in enumerate(masks):
        with masked(transformer, mask):
            alone = run(transformer, inputs)
        torch.testing.assert_close(both[index], alone[index], rtol=0, atol=3e-5)
    assert (both[0] - alone[0]).abs().max() > 0.1


def test_the_gradient_of_a_mask_is_its_derivative(make_transformer, inputs):
    transformer = make_transformer(3).double()
    inputs = {name: tensor.double() for name, tensor in inputs.items()}
    mask = torch.tensor([1.0, 0.0, 0.7], dtype=torch.float64, requires_grad=True)

    def loss(mask):
        with masked(transformer, mask):
            return transformer(**inputs).sample.square().mean()

    (gradient,) = torch.autograd.grad(loss(mask), mask)
    for index in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[index] = 1e-5
        with torch.no_grad():
            slope = (loss(mask + step) - loss(mask - step)) / 2e-5
        assert gradient[index].item() == pytest.approx(slope.item(), rel=1e-4) and abs(slope) > 1e-4


def make_search(transformer, seed=0, **settings) -> DepthSearch:
    """Over groups of 2 blocks that keep 1, its LoRA away from 0."""
    torch.manual_seed(seed)
    depth = len(transformer.transformer_blocks)
    search = DepthSearch(FAMILY, transformer, MaskDistribution(even_groups(depth, 2, 1)), **{"rank": 2, **settings})
    for name, weight in search.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(weight, std=0.1)
    return search


def one_step_of(search, inputs):
    return search(inputs["hidden_states"], (inputs["encoder_hidden_states"][:1], inputs["pooled_projections"][:1]))


def test_student_and_teacher_share_one_transformer(make_transformer, inputs):
    transformer = make_transformer(4)
    prompt = (inputs["encoder_hidden_states"][:1], inputs["pooled_projections"][:1])
    with torch.no_grad():
        wanted = FAMILY.one_step(transformer, inputs["hidden_states"], prompt)
    search = make_search(transformer)
    mask = layer_mask((0, 3), 4)
    with torch.no_grad(), search.role(STUDENT, mask):
        student = one_step_of(search, inputs)
        with search.role(TEACHER):
            teacher = one_step_of(search, inputs)
        again = one_step_of(search, inputs)
    torch.testing.assert_close(teacher, wanted, rtol=0, atol=1e-5)
    assert torch.equal(student, again) and (student - teacher).abs().max() > 0.1
    with torch.no_grad(), search.role(STUDENT):
        assert (one_step_of(search, inputs) - student).abs().max() > 0.1


@pytest.mark.parametrize("with_lora", [True, False])
def test_the_pruned_student_is_the_student_under_its_mask(make_transformer, inputs, with_lora):
    transformer = make_transformer(4)
    plain = copy.deepcopy(transformer)
    search = make_search(transformer)
    mask = layer_mask((1, 2), 4)  # block 2 becomes the last, with its LoRA on the modulation of the prompt
    pruned = search.pruned(mask, with_lora=with_lora)
    prompt = (inputs["encoder_hidden_states"][:1], inputs["pooled_projections"][:1])
    with torch.no_grad():
        result = FAMILY.one_step(pruned, inputs["hidden_states"], prompt)
        with search.role(STUDENT, mask):
            student = one_step_of(search, inputs)
        base = FAMILY.one_step(prune(plain, mask), inputs["hidden_states"], prompt)
    torch.testing.assert_close(result, student if with_lora else base, rtol=0, atol=3e-5)
    assert (student - base).abs().max() > 0.1 and not getattr(pruned, "peft_config", None)


def gradients_of(search, inputs) -> dict[str, torch.Tensor]:
    """Of a student with a sampled mask, the teacher run between its forward and its backward pass."""
    mask = search.masks.sample(1.0, 10.0, 2, torch.Generator().manual_seed(0))
    with search.role(STUDENT, mask):
        z = one_step_of(search, inputs)
        with torch.no_grad(), search.role(TEACHER):
            wanted = one_step_of(search, inputs)
        (z - wanted).abs().mean().backward()
    return {name: weight.grad for name, weight in search.named_parameters() if weight.grad is not None}


def test_lora_and_gates_learn_and_nothing_else(make_transformer, inputs):
    search = make_search(make_transformer(4))
    trained = search.trained()
    gates = {name for name in trained if name.startswith("masks.")}
    assert len(gates) == 3 and all(name in gates or ".lora_" in name for name in trained)
    assert {id(w) for w in search.parameters_of(STUDENT)} == {id(w) for w in trained.values()}
    assert not search.parameters_of(TEACHER)
    gradients = gradients_of(search, inputs)
    assert gates < gradients.keys() <= trained.keys()
    assert all(gradients[name].abs().min() > 0 for name in gates)
    assert sum(bool(gradients[name].abs().max() > 0) for name in gradients if ".lora_A." in name) > 20


def test_gradient_checkpointing_changes_no_gradient(make_transformer, inputs):
    search = make_search(make_transformer(4))
    wanted = gradients_of(search, inputs)
    again = make_search(make_transformer(4))
    again.network.enable_gradient_checkpointing()
    found = gradients_of(again, inputs)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_search_finds_the_blocks_that_do_nothing(make_transformer, inputs):
    """Blocks whose gates of attention and feed-forward are 0 change nothing: the search takes them out."""
    transformer = make_transformer(4)
    idle = (1, 3)
    for index in idle:
        for norm in (transformer.transformer_blocks[index].norm1, transformer.transformer_blocks[index].norm1_context):
            norm.linear.weight.data.zero_()
            norm.linear.bias.data.zero_()
    torch.manual_seed(0)
    search = DepthSearch(FAMILY, transformer, MaskDistribution([Group(2, 1)] * 2), rank=0)
    optimizer = torch.optim.Adam(search.parameters_of(STUDENT), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), search.role(TEACHER):
        wanted = one_step_of(search, inputs)
    for _ in range(12):
        mask = search.masks.sample(1.0, 100.0, 2, generator)
        with search.role(STUDENT, mask):
            (one_step_of(search, inputs) - wanted).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kept_layers(search.masks.final()) == (0, 2)
    result = FAMILY.one_step(
        search.pruned(search.masks.final()),
        inputs["hidden_states"],
        (inputs["encoder_hidden_states"][:1], inputs["pooled_projections"][:1]),
    )
    torch.testing.assert_close(result, wanted, rtol=0, atol=3e-5)


def test_the_trainer_takes_a_search_as_networks(make_transformer, inputs):
    """`Optimisation`: AdamW, schedule, clipping, and the average that the decision is made of."""
    config = DistillConfig(
        pretrained_model_name_or_path="base",
        train_data_dir="photographs",
        learning_rate=1e-2,
        lr_scheduler="constant",
        ema_decay=0.9,
        max_train_steps=2,
    )
    search = make_search(make_transformer(4))
    optimisation = Optimisation(config, search, Accelerator(cpu=True))
    before = {name: weight.detach().clone() for name, weight in search.trained().items()}
    for seed in range(2):
        mask = search.masks.sample(1.0, 10.0, 2, torch.Generator().manual_seed(seed))
        with search.role(STUDENT, mask):
            one_step_of(optimisation.model, inputs).square().mean().backward()
        optimisation.step(STUDENT)
    moved = {name for name, weight in search.trained().items() if not torch.equal(weight, before[name])}
    assert {"masks.option_gates.0", "masks.option_gates.1", "masks.pair_gates.0"} <= moved
    assert any(".lora_A." in name for name in moved)
    gate = search.masks.pair_gates[0].detach().clone()
    with optimisation.averaged():
        assert not torch.equal(search.masks.pair_gates[0], gate)
        assert search.masks.final().sum() == 2


def test_what_does_not_fit_is_said(make_transformer, make_pipeline):
    transformer = make_transformer(4)
    with pytest.raises(ConfigError, match="hold 6 blocks, but the transformer has 4"):
        DepthSearch(FAMILY, transformer, MaskDistribution(even_groups(6)))
    with (
        pytest.raises(ConfigError, match="for 3 blocks, but the transformer has 4"),
        masked(transformer, torch.ones(3)),
    ):
        pass
    with pytest.raises(ConfigError, match="for 5 blocks"):
        prune(transformer, torch.ones(5))
    with pytest.raises(ConfigError, match="decided mask"):
        prune(transformer, torch.full((4,), 0.5))
    with pytest.raises(ConfigError, match="not a UNet2DConditionModel"):
        prune(make_pipeline(network="unet").unet, torch.ones(4))
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ConfigError, match="LoRAs lie beside"):
        prune(transformer, torch.ones(4))
    with pytest.raises(ConfigError, match="LoRAs lie beside"):
        DepthSearch(FAMILY, transformer, MaskDistribution(even_groups(4)))
