"""Our attention processors compute what diffusers' own do, and heed the backend that theirs ignore."""

import copy
from importlib.util import find_spec

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from peft import LoraConfig

from tsdsr.models import attention

SMALL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}
CLOSE = {"rtol": 0, "atol": 1e-6}


def sd3() -> tuple[torch.nn.Module, dict]:
    return SD3Transformer2DModel(**SMALL), inputs_of_sd3()


def sd35() -> tuple[torch.nn.Module, dict]:
    """With normalised queries and keys, and a second attention in some blocks."""
    model = SD3Transformer2DModel(**SMALL, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    for name, weight in model.named_parameters():  # which begin as ones, with no effect
        if "norm_" in name and "attn" in name:
            torch.nn.init.uniform_(weight, 0.5, 2)
    return model, inputs_of_sd3()


def inputs_of_sd3() -> dict:
    return {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([1000.0, 500.0]),
    }


def unet() -> tuple[torch.nn.Module, dict]:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    states = {"sample": torch.randn(2, 4, 8, 6), "encoder_hidden_states": torch.randn(2, 5, 12)}
    return model, {**states, "timestep": 999, "encoder_attention_mask": mask}


def vae() -> tuple[torch.nn.Module, dict]:
    return AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    ), {"sample": torch.randn(2, 3, 16, 12)}


MODELS = [sd3, sd35, unet, vae]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def case(request):
    torch.manual_seed(0)
    model, inputs = request.param()
    # Every attention must matter to the result: as initialised some of them hardly do.
    for module in model.modules():
        if isinstance(module, Attention):
            for projection in module.children():
                if isinstance(projection, torch.nn.Linear):
                    projection.weight.data *= 2
    return model.eval(), inputs


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def processors(model) -> list:
    return [module.processor for module in model.modules() if isinstance(module, Attention)]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_same_result_as_diffusers(case, fused):
    model, inputs = case
    expected = run(model, inputs)
    if fused:
        model.fuse_qkv_projections()
        # diffusers' own fused processor leaves out the norms of SD3.5 and fails in its second attention.
        expected = expected if model.config.get("qk_norm") else run(model, inputs)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention.use_dispatcher(model)
    ours = processors(model)
    assert ours and all(isinstance(each, attention.JointAttention | attention.SelfOrCrossAttention) for each in ours)
    assert all(each.fused == fused for each in ours)
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    attention.use_dispatcher(model)
    assert all(one is other for one, other in zip(ours, processors(model), strict=True))


def test_masks_of_every_shape_are_added_to_the_scores():
    torch.manual_seed(0)
    theirs = Attention(query_dim=8, heads=2, dim_head=4, cross_attention_dim=6).eval()
    ours = copy.deepcopy(theirs)
    attention.use_dispatcher(ours)
    tokens, context = torch.randn(2, 7, 8), torch.randn(2, 5, 6)
    for mask in (torch.randn(2, 1, 5), torch.randn(2, 7, 5)):
        arguments = {"encoder_hidden_states": context, "attention_mask": mask}
        torch.testing.assert_close(ours(tokens, **arguments), theirs(tokens, **arguments), **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_num_groups": 2, "residual_connection": True, "rescale_output_factor": 1.5, "qk_norm": "layer_norm"},
        {"spatial_norm_dim": 3, "residual_connection": True},
        {"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"},
    ],
    ids=["group norm", "spatial norm", "cross norm"],
)
def test_every_option_of_the_layer_is_heeded(options):
    torch.manual_seed(0)
    theirs = Attention(query_dim=32, heads=2, dim_head=4, **options).eval()
    ours = copy.deepcopy(theirs)
    attention.use_dispatcher(ours)
    for weight in (*theirs.parameters(), *ours.parameters()):
        weight.data.add_(0.1)  # the norms' begin without effect
    tokens = torch.randn(2, 7, 32) if "cross_attention_dim" in options else torch.randn(2, 32, 4, 6)
    context = torch.randn(2, 5, 6) if "cross_attention_dim" in options else None
    arguments = {"encoder_hidden_states": context}
    if "spatial_norm_dim" in options:
        arguments["temb"] = torch.randn(2, 3, 2, 3)
    torch.testing.assert_close(ours(tokens, **arguments), theirs(tokens, **arguments), **CLOSE)


# The others need a GPU or a package: they cannot run here.
@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex"])
def test_backends_that_run_on_a_cpu_agree(case, backend):
    model, inputs = case
    expected = run(model, inputs)
    if backend == "_native_flash" and "encoder_attention_mask" in inputs:
        inputs["encoder_attention_mask"] = None
        expected = run(model, inputs)
    attention.set_attention_backend(model, backend)
    assert {each._attention_backend for each in processors(model)} == {AttentionBackendName(backend)}
    torch.testing.assert_close(run(model, inputs), expected, rtol=0, atol=2e-5)


def test_the_backend_is_really_used(case):
    model, inputs = case
    attention.set_attention_backend(model, "_native_cudnn")  # for Nvidia's GPUs alone
    with pytest.raises((RuntimeError, ValueError)):
        run(model, inputs)
    # diffusers' own switch, and its context manager, work once the processors are ours.
    model.reset_attention_backend()
    run(model, inputs)
    with attention_backend("_native_cudnn"), pytest.raises((RuntimeError, ValueError)):
        run(model, inputs)
    with attention_backend("native"):
        model.set_attention_backend("_native_cudnn")
    with pytest.raises((RuntimeError, ValueError)):
        run(model, inputs)


def test_the_backend_of_one_model_is_not_that_of_others():
    torch.manual_seed(0)
    (one, _), (other, inputs) = sd3(), sd3()
    attention.use_dispatcher(other)
    attention.set_attention_backend(one, "_native_cudnn")
    run(other, inputs)


def test_heads_too_wide_for_most_kernels_stay_with_torch():
    layer = Attention(query_dim=8, heads=1, dim_head=attention.WIDEST_HEAD + 8)
    attention.use_dispatcher(layer)
    with attention_backend("_native_cudnn"), torch.no_grad():
        layer(torch.randn(1, 7, 8))


def test_backends_that_cannot_be_used_are_refused(one_sentence):
    model, _ = sd3()
    with pytest.raises(ValueError) as error:
        attention.set_attention_backend(model, "flashy")
    one_sentence(error.value, "'flashy'", "native", "flash_hub")
    if find_spec("kernels"):
        pytest.skip("the package `kernels` is installed, so that its backends are not missing")
    with pytest.raises(ValueError) as error:
        attention.set_attention_backend(model, "flash_hub")
    one_sentence(error.value, "'flash_hub'", "pip install kernels")


def test_other_processors_stay():
    model, _ = unet()
    model.set_attn_processor(SlicedAttnProcessor(1))
    attention.use_dispatcher(model)
    assert all(isinstance(each, SlicedAttnProcessor) for each in processors(model))


def test_fused_projections_and_back(case):
    model, inputs = case
    expected, names = run(model, inputs), set(model.state_dict())
    attention.fuse_qkv_projections(model)
    fused = run(model, inputs)
    torch.testing.assert_close(fused, expected, rtol=0, atol=2e-5)
    for name, weight in model.named_parameters():  # what is called now are the fused ones alone
        if name.rpartition(".")[0].endswith(("to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")):
            weight.data.zero_()
    assert torch.equal(run(model, inputs), fused)
    attention.fuse_qkv_projections(model)  # a second time is no copy of what is unused now
    assert torch.equal(run(model, inputs), fused)
    attention.unfuse_qkv_projections(model)
    assert set(model.state_dict()) == names
    assert not torch.equal(run(model, inputs), fused)


def test_unfused_weights_are_those_of_before(case):
    model, inputs = case
    expected = run(model, inputs)
    attention.use_dispatcher(model)
    attention.fuse_qkv_projections(model)
    attention.unfuse_qkv_projections(model)
    attention.unfuse_qkv_projections(model)
    torch.testing.assert_close(run(model, inputs), expected, **CLOSE)


def test_loras_are_not_lost_in_fused_projections():
    torch.manual_seed(0)
    model, _ = sd3()
    attention.fuse_qkv_projections(model)
    attention.check_fused_projections(model)
    model.add_adapter(LoraConfig(target_modules=["proj_out"]))
    attention.check_fused_projections(model)
    model.add_adapter(LoraConfig(target_modules=["to_q"]), "other")
    with pytest.raises(ValueError, match="LoRA has no effect on fused"):
        attention.check_fused_projections(model)
    attention.unfuse_qkv_projections(model)
    attention.check_fused_projections(model)
    with pytest.raises(ValueError, match="plain weights"):
        attention.fuse_qkv_projections(model)


def test_only_plain_weights_are_fused():
    cast, hooked = sd3()[0], sd3()[0]
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    hooked.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    for model in (cast, hooked):
        with pytest.raises(ValueError, match="before quantizing, casting or offloading"):
            attention.fuse_qkv_projections(model)


def test_a_model_without_attention_stays_as_it_is():
    model = torch.nn.Conv2d(3, 3, 3)
    for change in (attention.use_dispatcher, attention.fuse_qkv_projections, attention.unfuse_qkv_projections):
        change(model)
    attention.check_fused_projections(model)
