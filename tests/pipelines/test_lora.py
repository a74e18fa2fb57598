"""One file with `transformer.*` or `unet.*`, and `vae.*` adapters."""

import json

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdsr import TSDSRPipeline
from tsdsr.models import lora_targets
from tsdsr.pipelines.loading import load_pipeline

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "pt"}
MODULES = {"transformer": "transformer_blocks.0.attn.to_q", "vae": "encoder.conv_in"}


@pytest.fixture
def lora(make_pipeline):
    """State dict of rank 2 and the weights it should lead to."""
    pipeline = make_pipeline("kl")
    generator = torch.Generator().manual_seed(5)
    state, merged = {}, {}
    for component, module in MODULES.items():
        weight = getattr(pipeline, component).get_submodule(module).weight.data
        down = torch.randn(2, *weight.shape[1:], generator=generator) * 0.3
        up = torch.randn(weight.shape[0], 2, *(1 for _ in weight.shape[2:]), generator=generator) * 0.3
        state[f"{component}.{module}.lora_A.weight"], state[f"{component}.{module}.lora_B.weight"] = down, up
        merged[component] = weight + (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return state, merged


def test_both_networks_take_the_adapter(make_pipeline, picture, lora, tmp_path):
    state, merged = lora
    metadata = {f"{component}.{key}": 2 for component in MODULES for key in ("r", "lora_alpha")}
    metadata |= {f"{component}.target_modules": [module] for component, module in MODULES.items()}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})

    by_hand = make_pipeline("kl")
    for component, module in MODULES.items():
        getattr(by_hand, component).get_submodule(module).weight.data = merged[component]
    expected = by_hand(picture(8, 8), **SMALL).images

    for source in (str(tmp_path), dict(state)):
        pipeline = make_pipeline("kl")
        plain = pipeline(picture(8, 8), **SMALL).images
        pipeline.load_lora_weights(source)
        torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, expected, atol=1e-5, rtol=0)
        assert set(pipeline.get_list_adapters()) == {"transformer", "vae"}
        pipeline.unload_lora_weights()
        torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, plain)


def test_a_second_adapter_gets_its_own_name(make_pipeline, lora):
    state, _ = lora
    pipeline = make_pipeline("kl")
    pipeline.load_lora_weights({key: value for key, value in state.items() if key.startswith("transformer.")})
    pipeline.load_lora_weights(dict(state))
    adapters = pipeline.get_list_adapters()
    assert adapters["vae"] == ["default_1"] and sorted(adapters["transformer"]) == ["default_0", "default_1"]


def test_other_keys_are_refused(make_pipeline):
    with pytest.raises(ValueError, match=r"takes LoRA keys `transformer\.\*` and .* holds \['unet'\]"):
        make_pipeline().load_lora_weights({"unet.lora_A.weight": torch.zeros(2, 2)})


# --- both kinds of denoiser ------------------------------------------------------------------------------------------

NETWORKS = ["transformer", "unet"]
FILE = "pytorch_lora_weights.safetensors"
SETTINGS = {
    "transformer": LoraConfig(r=4, lora_alpha=8, target_modules=list(lora_targets.STUDENT)),
    "unet": LoraConfig(r=4, lora_alpha=8, target_modules=list(lora_targets.UNET_STUDENT)),
    "vae": LoraConfig(r=2, lora_alpha=1, target_modules=["encoder.conv_in", "encoder.mid_block.resnets.0.conv1"]),
}


def trained(make_pipeline, network):
    """A pipeline with random adapters, and the arguments that save them."""
    pipeline, arguments = make_pipeline("kl", network=network), {}
    generator = torch.Generator().manual_seed(7)
    for name in (network, "vae"):
        module = getattr(pipeline, name)
        module.add_adapter(SETTINGS[name], adapter_name="student")
        for key, weight in module.named_parameters():
            if "lora_" in key:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.1
        layers = get_peft_model_state_dict(module, adapter_name="student")
        arguments[f"{name}_lora_layers"] = {key: tensor.contiguous() for key, tensor in layers.items()}
        arguments[f"{name}_lora_adapter_metadata"] = module.peft_config["student"].to_dict()
    return pipeline, arguments


@pytest.mark.parametrize("network", NETWORKS)
def test_saved_and_loaded_with_the_settings(make_pipeline, picture, tmp_path, network):
    pipeline, arguments = trained(make_pipeline, network)
    expected = pipeline(picture(8, 8), **SMALL).images
    TSDSRPipeline.save_lora_weights(tmp_path / "new" / "lora", **arguments)
    folder = tmp_path / "new" / "lora"
    assert [path.name for path in folder.iterdir()] == [FILE]
    assert {key.split(".")[0] for key in load_file(folder / FILE)} == {network, "vae"}
    with safe_open(folder / FILE, "pt") as file:
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (stated[f"{network}.r"], stated[f"{network}.lora_alpha"], stated["vae.r"]) == (4, 8, 2)

    loaded = make_pipeline("kl", network=network)
    plain = loaded(picture(8, 8), **SMALL).images
    loaded.load_lora_weights(str(folder))
    result = loaded(picture(8, 8), **SMALL).images
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert (result - plain).abs().max() > 1e-2
    for name in (network, "vae"):
        found = getattr(loaded, name).peft_config["default_0"]
        assert (found.r, found.lora_alpha) == (SETTINGS[name].r, SETTINGS[name].lora_alpha)
        assert set(found.target_modules) == set(SETTINGS[name].target_modules)


@pytest.mark.parametrize("network", NETWORKS)
def test_strength_fusing_and_unloading(make_pipeline, picture, tmp_path, network):
    TSDSRPipeline.save_lora_weights(tmp_path, **trained(make_pipeline, network)[1])
    pipeline = make_pipeline("kl", network=network)

    def run():
        return pipeline(picture(8, 8), **SMALL).images

    plain = run()
    pipeline.load_lora_weights(str(tmp_path), adapter_name="mine")
    whole = run()
    assert pipeline.get_list_adapters() == {network: ["mine"], "vae": ["mine"]}
    pipeline.set_adapters(["mine"], [0.0])
    torch.testing.assert_close(run(), plain, rtol=0, atol=1e-6)
    pipeline.set_adapters(["mine"], [1.0])

    pipeline.fuse_lora()
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-4)
    pipeline.unfuse_lora()
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-4)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    # What is fused stays, in both networks.
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-4)
    assert pipeline.get_list_adapters() == {}


@pytest.mark.parametrize("network", NETWORKS)
def test_unloading_leaves_the_base(make_pipeline, picture, tmp_path, network):
    TSDSRPipeline.save_lora_weights(tmp_path, **trained(make_pipeline, network)[1])
    pipeline = make_pipeline("kl", network=network)
    plain = pipeline(picture(8, 8), **SMALL).images
    pipeline.load_lora_weights(str(tmp_path))
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, plain)


@pytest.mark.parametrize("network", NETWORKS)
def test_settings_of_one_network_are_not_taken_for_the_others(make_pipeline, tmp_path, network):
    _, arguments = trained(make_pipeline, network)
    TSDSRPipeline.save_lora_weights(tmp_path, **{**arguments, "vae_lora_adapter_metadata": None})
    pipeline = make_pipeline("kl", network=network)
    pipeline.load_lora_weights(str(tmp_path))
    assert getattr(pipeline, network).peft_config["default_0"].lora_alpha == 8
    assert pipeline.vae.peft_config["default_0"].r == pipeline.vae.peft_config["default_0"].lora_alpha == 2


def test_a_lora_beside_a_unet_pipeline_is_loaded(make_pipeline, picture, tmp_path):
    pipeline, arguments = trained(make_pipeline, "unet")
    expected = pipeline(picture(8, 8), **SMALL).images
    make_pipeline("kl", network="unet").save_pretrained(tmp_path)
    TSDSRPipeline.save_lora_weights(tmp_path, **arguments)
    loaded = load_pipeline(tmp_path, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(loaded(picture(8, 8), **SMALL).images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_lora_of_the_other_kind_is_refused_whole(make_pipeline, tmp_path, network):
    (other,) = set(NETWORKS) - {network}
    TSDSRPipeline.save_lora_weights(tmp_path, **trained(make_pipeline, other)[1])
    pipeline = make_pipeline("kl", network=network)
    with pytest.raises(ValueError, match=rf"takes LoRA keys `{network}\.\*` and `vae\.\*`, but .*'{other}', 'vae'"):
        pipeline.load_lora_weights(str(tmp_path))
    assert pipeline.get_list_adapters() == {}


def test_an_interrupted_save_leaves_what_was_there(make_pipeline, tmp_path):
    _, arguments = trained(make_pipeline, "unet")

    def breaks_off(weights, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TSDSRPipeline.save_lora_weights(tmp_path, save_function=breaks_off, **arguments)
    assert list(tmp_path.iterdir()) == []
    TSDSRPipeline.save_lora_weights(tmp_path, **arguments)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        TSDSRPipeline.save_lora_weights(tmp_path, save_function=breaks_off, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == [FILE] and (tmp_path / FILE).read_bytes() == before


def test_who_writes_what_under_which_name(make_pipeline, tmp_path):
    _, arguments = trained(make_pipeline, "unet")
    TSDSRPipeline.save_lora_weights(tmp_path / "other", is_main_process=False, **arguments)
    assert not (tmp_path / "other").exists()
    TSDSRPipeline.save_lora_weights(tmp_path, weight_name="mine.safetensors", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
    with pytest.raises(ValueError, match="`unet_lora_layers`"):
        TSDSRPipeline.save_lora_weights(tmp_path, unet_lora_adapter_metadata={"r": 4})


def test_every_target_is_a_layer_of_the_unet(make_pipeline):
    unet = make_pipeline(network="unet").unet
    names = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    for target in lora_targets.UNET_STUDENT:
        assert any(name == target or name.endswith(f".{target}") for name in names), target
    assert set(lora_targets.UNET_FAKE_SCORE) < set(lora_targets.UNET_STUDENT)
