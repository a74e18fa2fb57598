"""Every way of needing less memory gives the picture that its weights stand for."""

import copy

import accelerate
import pytest
import torch
from diffusers import GGUFQuantizationConfig, PipelineQuantizationConfig, SD3Transformer2DModel, TorchAoConfig
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tsdsr import PromptEmbeddings, TSDSRPipeline
from tsdsr.benchmarks.memory import write_gguf

CPU = torch.device("cpu")
BASES = [("kl", "transformer"), ("tiny", "transformer"), ("tiny", "unet")]
# More than one size of tile, and a batch that is not always full.
CALL = {"upscale": 2, "process_size": 0, "tile_size": 32, "tile_overlap": 8, "tile_batch_size": 3, "output_type": "pt"}
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="moves weights between the CPU and an accelerator, which this machine lacks"
)


def need_exact_integer_products():
    """Skip where torch's product of int8 matrices saturates: x86 CPUs without VNNI (docs/memory.md)."""
    highest = torch.full((64, 64), 127, dtype=torch.int8)
    if torch._int_mm(highest, highest)[0, 0] != 64 * 127 * 127:
        pytest.skip("this CPU's kernels add 8-bit products in 16 bits")


@pytest.fixture(params=BASES, ids="-".join)
def pipeline(request, make_pipeline):
    return make_pipeline(*request.param)


@pytest.fixture
def enlarge(picture):
    photograph = picture(32, 24)

    def call(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(photograph, **CALL).images.cpu()

    return call


@pytest.fixture(scope="module")
def folder(make_pipeline, tmp_path_factory):
    """A pipeline whose matrices have rows of 32 numbers, as blocks of quantized weights do."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    prompt = PromptEmbeddings.from_tensors(torch.randn(1, 3, 32), torch.randn(1, 32))
    path = tmp_path_factory.mktemp("model")
    make_pipeline("kl", transformer=transformer, prompt_embeddings=prompt).save_pretrained(path)
    return path


@pytest.fixture
def lora(folder):
    """A LoRA on the transformer's attention and last layer, as `load_lora_weights` takes it."""
    network = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    torch.manual_seed(5)
    targets = ["to_q", "to_v", "add_k_proj", "proj_out"]
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(network).items()}


def quantized_pipeline(folder, config):
    quantization = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(config)})
    return TSDSRPipeline.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)


def of_weights(pipeline, weights):
    """A pipeline in float32 like this one, with these weights of its transformer."""
    modules = {name: copy.deepcopy(module) for name, module in pipeline.components.items()}
    modules["transformer"] = SD3Transformer2DModel.from_config(pipeline.transformer.config).eval()
    modules["transformer"].load_state_dict(weights)
    return TSDSRPipeline(**modules)


# Stored in fewer bits


@pytest.mark.parametrize("name", ["denoiser", "vae"])
def test_layerwise_casting(pipeline, enlarge, name):
    exact = enlarge(pipeline)
    reference = copy.deepcopy(pipeline)
    network = getattr(pipeline, name)
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert network.dtype == torch.float32  # what the pipeline hands it
    stored = dict(network.named_parameters())
    assert any(weight.dtype == torch.float8_e4m3fn for weight in stored.values())
    for key, weight in getattr(reference, name).named_parameters():
        weight.data = stored[key].data.float()
    found = enlarge(pipeline)
    assert torch.equal(found, enlarge(reference))
    assert not torch.equal(found, exact)
    assert any(weight.dtype == torch.float8_e4m3fn for weight in network.parameters())


def test_layerwise_casting_to_compute_in_bfloat16(make_pipeline, enlarge):
    pipeline = make_pipeline("kl").to(torch.bfloat16)
    expected = enlarge(pipeline)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert 0 < (enlarge(pipeline) - expected).abs().max() < 0.1


def test_layerwise_casting_with_a_lora(folder, enlarge, lora, one_sentence):
    pipeline = TSDSRPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(dict(lora))
    expected = enlarge(pipeline)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert 0 < (enlarge(pipeline) - expected).abs().max() < 0.05
    late = TSDSRPipeline.from_pretrained(folder)
    without = enlarge(late)
    assert (without - expected).abs().max() > 0.1
    late.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError) as error:  # peft would round it to 8 bits, which CPUs then cannot compute with
        late.load_lora_weights(dict(lora))
    one_sentence(error.value, "before `enable_layerwise_casting`")


def test_torchao_weights_of_8_bits(folder, enlarge, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    exact = enlarge(TSDSRPipeline.from_pretrained(folder))
    pipeline = quantized_pipeline(folder, quantization.Int8WeightOnlyConfig())
    assert pipeline.transformer.dtype == torch.float32
    weights = {
        key: weight.dequantize() if type(weight.data) is not torch.Tensor else weight
        for key, weight in pipeline.transformer.state_dict().items()
    }
    found = enlarge(pipeline)
    assert (found - exact).abs().max() > 1e-4
    torch.testing.assert_close(found, enlarge(of_weights(pipeline, weights)), rtol=0, atol=2e-5)
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(enlarge(TSDSRPipeline.from_pretrained(tmp_path, dtype=torch.float32)), found)


def test_torchao_weights_and_activations_of_8_bits(folder, enlarge):
    quantization = pytest.importorskip("torchao.quantization")
    need_exact_integer_products()
    exact = enlarge(TSDSRPipeline.from_pretrained(folder))
    pipeline = quantized_pipeline(folder, quantization.Int8DynamicActivationInt8WeightConfig())
    assert 1e-4 < (enlarge(pipeline) - exact).abs().max() < 0.05


def test_torchao_weights_of_4_bits(folder, enlarge):
    # The other packings of torchao 0.18 are for GPUs: "plain" needs the package mslk, "tile_packed_to_4d" CUDA.
    prototypes = pytest.importorskip("torchao.prototype.quantization.int4")
    exact = enlarge(TSDSRPipeline.from_pretrained(folder))
    config = prototypes.PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    assert 1e-3 < (enlarge(quantized_pipeline(folder, config)) - exact).abs().max() < 0.15


@pytest.mark.parametrize("bits", ["8", "8 dynamic"])
def test_a_lora_on_torchao_weights(folder, enlarge, lora, bits):
    quantization = pytest.importorskip("torchao.quantization")
    if bits == "8 dynamic":
        need_exact_integer_products()
    plain = TSDSRPipeline.from_pretrained(folder)
    without = enlarge(plain)
    plain.load_lora_weights(dict(lora))
    expected = enlarge(plain)
    configs = {
        "8": quantization.Int8WeightOnlyConfig(),
        "8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
    }
    pipeline = quantized_pipeline(folder, configs[bits])
    pipeline.load_lora_weights(dict(lora))
    assert (enlarge(pipeline) - expected).abs().max() < 0.05 < (expected - without).abs().max()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("lora_too", [False, True], ids=["", "lora"])
def test_gguf(folder, enlarge, tmp_path, lora, kind, lora_too):
    gguf = pytest.importorskip("gguf")
    plain = TSDSRPipeline.from_pretrained(folder)
    exact = enlarge(plain)
    file = tmp_path / "model.gguf"
    write_gguf(plain.transformer, file, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    transformer = SD3Transformer2DModel.from_single_file(
        str(file),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(folder),
        subfolder="transformer",
    )
    assert transformer.dtype == torch.float32  # what the pipeline hands it, though most weights are bytes
    pipeline = TSDSRPipeline.from_pretrained(folder, transformer=transformer)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert tensors["transformer_blocks.0.attn.to_q.weight"].tensor_type.name == kind
    weights = {}
    for key, weight in plain.transformer.state_dict().items():
        array = gguf.dequantize(tensors[key].data, tensors[key].tensor_type)
        if tensors[key].tensor_type.name == kind:
            array = array.astype("float16")  # as diffusers has them before they are cast to the compute dtype
        weights[key] = torch.from_numpy(array.astype("float32")).view_as(weight)
    reference = of_weights(plain, weights)
    if lora_too:
        for each in (pipeline, reference):
            each.load_lora_weights(dict(lora))
    found = enlarge(pipeline)
    torch.testing.assert_close(found, enlarge(reference), rtol=0, atol=2e-5)
    assert (found - exact).abs().max() > 1e-3


# The VAE in parts


def test_vae_slicing(pipeline, enlarge):
    expected = enlarge(pipeline)
    pipeline.vae.enable_slicing()
    assert torch.equal(enlarge(pipeline), expected)


def test_vae_tiling_of_diffusers(make_pipeline, picture):
    # AutoencoderTiny's own is written for a factor of 8 between pixels and latents; `vae_tile_size` serves every VAE.
    pipeline, arguments = make_pipeline("kl"), {"upscale": 2, "process_size": 0, "color_fix": "none"}
    untiled = pipeline(picture(32, 24), output_type="pt", **arguments).images
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 32, 16
    found = pipeline(picture(32, 24), output_type="pt", **arguments).images
    latents = pipeline(picture(32, 24), output_type="latent", **arguments).images
    with torch.no_grad():
        decoded = pipeline.vae.tiled_decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.equal(found, decoded.clamp(-1, 1) / 2 + 0.5)
    assert not torch.equal(found, untiled) and pipeline.vae.use_tiling


# Elsewhere while they are not needed


def test_model_offload(pipeline, enlarge):
    expected = enlarge(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")  # the hooks run, though all of it is one memory
    for _ in range(2):
        assert torch.equal(enlarge(pipeline), expected)
    assert all(hasattr(network, "_hf_hook") for network in (pipeline.vae, pipeline.denoiser))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_sequential_offload(pipeline, enlarge, tmp_path, where):
    expected = enlarge(pipeline)
    # `enable_sequential_cpu_offload` asks for an accelerator; these are the hooks that it sets.
    for name in ("vae", "denoiser"):
        network = getattr(pipeline, name)
        if where == "disk":
            accelerate.disk_offload(network, str(tmp_path / name), execution_device=CPU)
        else:
            accelerate.cpu_offload(network, execution_device=CPU, offload_buffers=True)
    if where == "memory":
        accelerate.cpu_offload(pipeline.prompt_embeddings, execution_device=CPU)
    for _ in range(2):
        torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
    assert all(weight.device.type == "meta" for weight in pipeline.denoiser.parameters())


@needs_gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_from_a_gpu(pipeline, enlarge, method):
    expected = enlarge(pipeline.to("cuda"))
    getattr(pipeline.to("cpu"), method)()
    for _ in range(2):
        torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=1e-4)
    assert not any(weight.is_cuda for weight in pipeline.denoiser.parameters())


def group_offload(pipeline, kind, disk=None, device=CPU, **arguments):
    blocks = 1 if kind == "block_level" else None
    pipeline.enable_group_offload(
        onload_device=device,
        offload_type=kind,
        num_blocks_per_group=blocks,
        offload_to_disk_path=disk and str(disk),
        **arguments,
    )


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_group_offload(pipeline, enlarge, tmp_path, kind, on_disk):
    expected = enlarge(pipeline)
    group_offload(pipeline, kind, tmp_path / "offload" if on_disk else None)
    for _ in range(2):
        torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
    assert bool(list(tmp_path.rglob("*.safetensors"))) == on_disk


@needs_gpu
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_from_a_gpu(pipeline, enlarge, kind):
    expected = enlarge(pipeline.to("cuda"))
    group_offload(pipeline.to("cpu"), kind, device=torch.device("cuda"), use_stream=True)
    for _ in range(2):
        torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=1e-4)
    assert not any(weight.is_cuda for weight in pipeline.denoiser.parameters())


def test_pipelines_may_share_a_folder_for_offloading(make_pipeline, enlarge, tmp_path):
    for factor in (1.0, 1.5):
        pipeline = make_pipeline("kl")
        for weight in pipeline.transformer.parameters():
            weight.data *= factor
        expected = enlarge(pipeline)
        group_offload(pipeline, "leaf_level", tmp_path)
        torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_with_a_lora(folder, enlarge, lora, tmp_path, one_sentence, kind):
    before, after, late = (TSDSRPipeline.from_pretrained(folder) for _ in range(3))
    without = enlarge(before)
    before.load_lora_weights(dict(lora))
    expected = enlarge(before)
    assert (expected - without).abs().max() > 0.1
    group_offload(before, kind, tmp_path)
    torch.testing.assert_close(enlarge(before), expected, rtol=0, atol=2e-5)
    group_offload(after, kind)
    after.load_lora_weights(dict(lora))
    torch.testing.assert_close(enlarge(after), expected, rtol=0, atol=2e-5)
    group_offload(late, kind, tmp_path)
    with pytest.raises(ValueError) as error:
        late.load_lora_weights(dict(lora))
    one_sentence(error.value, "disk")


def test_modes_add_up(folder, enlarge, tmp_path):
    """8 bits for the transformer, the rest on disk."""
    pipeline = TSDSRPipeline.from_pretrained(folder)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = enlarge(pipeline)
    group_offload(pipeline, "leaf_level", tmp_path)
    torch.testing.assert_close(enlarge(pipeline), expected, rtol=0, atol=2e-5)
