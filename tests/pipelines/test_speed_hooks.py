"""What makes the networks faster gives the same picture."""

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tsdsr import TSDSRPipeline

BASES = [("kl", "transformer"), ("tiny", "unet")]
# More than one size of tile, and a batch that is not always full.
CALL = {"upscale": 2, "process_size": 0, "tile_size": 32, "tile_overlap": 8, "tile_batch_size": 3, "output_type": "pt"}


@pytest.fixture(params=BASES, ids=lambda base: base[1])
def pipeline(request, make_pipeline):
    return make_pipeline(*request.param)


@pytest.fixture
def enlarge(picture):
    photograph = picture(32, 24)
    return lambda pipeline: pipeline(photograph, **CALL).images


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attentions(network):
    return [module for module in network.modules() if isinstance(module, Attention)]


@pytest.fixture
def lora(make_pipeline):
    """A LoRA on every projection of the transformer's attention, and on its last layer."""
    network = copy.deepcopy(make_pipeline().transformer)
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "proj_out"]
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(network).items()}


# "flex", "flash", "sage" and others are for GPUs, or too slow without a compiler; tests/models/test_attention.py has
# all that run on a CPU.
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(pipeline, enlarge, backend):
    expected = enlarge(pipeline)
    pipeline.set_attention_backend(backend)
    assert {each.processor._attention_backend for each in attentions(pipeline.denoiser)} == {
        AttentionBackendName(backend)
    }
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)


NEEDS_A_GPU = "_native_cudnn"  # so that a network that heeds it fails here


def test_the_backend_is_that_of_the_denoiser_alone(pipeline, enlarge, make_pipeline):
    other = make_pipeline("kl")
    pipeline.set_attention_backend(NEEDS_A_GPU)
    with pytest.raises((RuntimeError, ValueError)):
        enlarge(pipeline)
    enlarge(other)
    for layer in attentions(pipeline.vae):
        assert layer.processor._attention_backend is None
    pipeline.set_attention_backend("native")
    enlarge(pipeline)


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_the_networks_own_switch_of_backends_works(make_pipeline, enlarge, name):
    pipeline = make_pipeline("kl")
    with attention_backend("native"):  # else it stays the default of everything after this test
        getattr(pipeline, name).set_attention_backend(NEEDS_A_GPU)
    with pytest.raises((RuntimeError, ValueError)):
        enlarge(pipeline)


def test_repeated_blocks_are_compiled(pipeline, enlarge, compiler):
    expected = enlarge(pipeline)
    pipeline.denoiser.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    blocks = [module for module in pipeline.denoiser.modules() if type(module).__name__.endswith("TransformerBlock")]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("in_place", [True, False], ids=["compile()", "torch.compile"])
def test_a_compiled_transformer(make_pipeline, enlarge, compiler, tmp_path, in_place):
    pipeline = make_pipeline("kl")
    expected = enlarge(pipeline)
    if in_place:
        pipeline.transformer.compile(backend="eager", fullgraph=True)
    else:
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager", fullgraph=True)
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
    pipeline.save_pretrained(tmp_path)
    saved = TSDSRPipeline.from_pretrained(tmp_path)
    assert saved.transformer.state_dict().keys() == make_pipeline().transformer.state_dict().keys()
    torch.testing.assert_close(enlarge(saved), expected, rtol=0, atol=2e-5)


def test_compiled_blocks_with_a_lora(make_pipeline, enlarge, lora, compiler):
    pipeline = make_pipeline("kl")
    pipeline.load_lora_weights(dict(lora))
    expected = enlarge(pipeline)
    pipeline.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)


def test_fused_projections(pipeline, enlarge):
    expected = enlarge(pipeline)
    networks = (pipeline.denoiser, pipeline.vae)
    names = [list(network.state_dict()) for network in networks]
    pipeline.fuse_qkv_projections()
    for layer in (layer for network in networks for layer in attentions(network)):
        assert hasattr(layer, "to_kv" if layer.is_cross_attention else "to_qkv")
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
    pipeline.set_attention_backend("_native_math")
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
    pipeline.unfuse_qkv_projections()
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
    assert [list(network.state_dict()) for network in networks] == names


def test_diffusers_own_fusing(pipeline, enlarge):
    expected = enlarge(pipeline)
    pipeline.denoiser.fuse_qkv_projections()
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
    pipeline.denoiser.unfuse_qkv_projections()
    assert torch.equal(enlarge(pipeline), expected)


def test_loras_and_fused_projections(make_pipeline, enlarge, lora, one_sentence):
    pipeline = make_pipeline("kl")
    plain = enlarge(pipeline)
    pipeline.load_lora_weights(dict(lora))
    expected = enlarge(pipeline)
    assert (expected - plain).abs().max() > 0.1
    with pytest.raises(ValueError) as error:
        pipeline.fuse_qkv_projections()
    one_sentence(error.value, "fuse_lora()", "unload_lora_weights()")
    # diffusers' own fusing copies the base's weights alone: without a check the LoRA would be lost in silence.
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError) as error:
        enlarge(pipeline)
    one_sentence(error.value, "unfuse_qkv_projections()")
    pipeline.unfuse_qkv_projections()
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
    # What the errors recommend.
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.fuse_qkv_projections()
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)


def test_no_lora_is_loaded_onto_fused_projections(make_pipeline, lora, one_sentence):
    pipeline = make_pipeline("kl")
    pipeline.fuse_qkv_projections()
    with pytest.raises(ValueError) as error:
        pipeline.load_lora_weights(dict(lora))
    one_sentence(error.value, "unfuse_qkv_projections()")
    assert not pipeline.get_list_adapters()
    pipeline.unfuse_qkv_projections()
    pipeline.load_lora_weights(dict(lora))


def test_channels_last(pipeline, enlarge):
    expected = enlarge(pipeline)
    pipeline.vae.to(memory_format=torch.channels_last)
    convolutions = [weight for weight in pipeline.vae.parameters() if weight.ndim == 4 and weight.shape[1] > 1]
    assert any(weight.stride(1) == 1 and weight.shape[-1] > 1 for weight in convolutions)
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=3e-5)
