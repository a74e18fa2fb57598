"""One file with `transformer.*` or `unet.*`, and `vae.*` adapters."""

import json
import re

import pytest
import torch
from diffusers.utils import logging
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
    with pytest.raises(
        ValueError, match=r"have `lora` in their names, but this file holds 'transformer\.proj_out\.weight'"
    ):
        make_pipeline().load_lora_weights({"transformer.proj_out.weight": torch.zeros(2, 2)})


def test_keys_of_no_network_load_nothing(make_pipeline, caplog):
    pipeline = make_pipeline()
    logging.set_verbosity_warning()
    with caplog.at_level("WARNING"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.get_logger("diffusers"), "propagate", True)
        pipeline.load_lora_weights({"text_encoder.q_proj.lora_A.weight": torch.zeros(2, 2)})
    assert "only ['text_encoder']: nothing was loaded" in caplog.text
    assert pipeline.get_list_adapters() == {}


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
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-5)
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
    torch.testing.assert_close(run(), plain, rtol=0, atol=1e-5)
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
    torch.testing.assert_close(loaded(picture(8, 8), **SMALL).images, expected, rtol=0, atol=3e-5)


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


# --- the published layout --------------------------------------------------------------------------------------------


@pytest.fixture
def published(make_pipeline, tmp_path):
    """A function that writes LoRAs of a seed as the release does: two files, both behind `transformer.`."""
    base = make_pipeline("kl")

    def write(name, seed=5):
        generator, folder = torch.Generator().manual_seed(seed), tmp_path / name
        folder.mkdir()
        for component in ("transformer", "vae"):
            state = {}
            for module in {
                "transformer": ["transformer_blocks.0.attn.to_q", "proj_out"],
                "vae": ["encoder.conv_in", "encoder.mid_block.attentions.0.to_q"],
            }[component]:
                weight = getattr(base, component).get_submodule(module).weight
                up = (weight.shape[0], 2, *(1 for _ in weight.shape[2:]))
                for half, shape in (("A", (2, *weight.shape[1:])), ("B", up)):
                    state[f"transformer.{module}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * 0.4
            save_file(state, folder / f"{component}.safetensors")
        return folder

    return write


def merged(make_pipeline, *weighted):
    """The pipeline with published LoRAs added by hand: `(folder, strength)` each."""
    pipeline = make_pipeline("kl")
    for folder, strength in weighted:
        for component in ("transformer", "vae"):
            halves = load_file(folder / f"{component}.safetensors")
            for key, down in halves.items():
                if key.endswith("lora_A.weight"):
                    up = halves[key.replace("lora_A", "lora_B")]
                    module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
                    weight = getattr(pipeline, component).get_submodule(module).weight
                    weight.data += strength * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    return pipeline


def test_published_files_load_as_they_are(make_pipeline, picture, published):
    folder = published("tsdsr")
    expected = merged(make_pipeline, (folder, 1))(picture(8, 8), **SMALL).images
    as_dict = {**load_file(folder / "transformer.safetensors"), **load_file(folder / "vae.safetensors")}
    for source, arguments in (
        (str(folder), {}),
        (folder, {}),
        (str(folder.parent), {"subfolder": folder.name}),
        (as_dict, {}),
    ):
        pipeline = make_pipeline("kl")
        pipeline.load_lora_weights(source, adapter_name="tsdsr", **arguments)
        assert pipeline.get_list_adapters() == {"transformer": ["tsdsr"], "vae": ["tsdsr"]}
        torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, expected, rtol=0, atol=3e-5)

    one_by_one = make_pipeline("kl")
    for component in ("vae", "transformer"):
        one_by_one.load_lora_weights(str(folder / f"{component}.safetensors"), adapter_name="tsdsr")
        assert "tsdsr" in getattr(one_by_one, component).peft_config
    torch.testing.assert_close(one_by_one(picture(8, 8), **SMALL).images, expected, rtol=0, atol=3e-5)


def test_one_file_of_our_own_goes_before_the_published_ones(make_pipeline, published, lora):
    state, _ = lora
    folder = published("both")
    save_file(state, folder / FILE)
    pipeline = make_pipeline("kl")
    pipeline.load_lora_weights(str(folder))
    assert pipeline.transformer.peft_config["default_0"].target_modules == {MODULES["transformer"]}


def test_published_files_become_one(make_pipeline, picture, published, tmp_path):
    pipeline = make_pipeline("kl")
    for name, seed in (("first", 5), ("second", 6)):
        pipeline.load_lora_weights(str(published(name, seed)), adapter_name=name)
    with pytest.raises(ValueError, match=re.escape("one of the loaded LoRAs (['first', 'second']), not None")):
        pipeline.save_lora_adapter(tmp_path / "one")
    pipeline.save_lora_adapter(tmp_path / "one", "second")
    assert [path.name for path in (tmp_path / "one").iterdir()] == [FILE]
    with safe_open(tmp_path / "one" / FILE, "pt") as file:
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
        keys = set(file.keys())
    for component in ("transformer", "vae"):
        assert stated[f"{component}.r"] == stated[f"{component}.lora_alpha"] == 2
        modules = {key.split(".lora_")[0] for key in keys if key.startswith(f"{component}.")}
        assert modules == {f"{component}.{module}" for module in stated[f"{component}.target_modules"]} != set()

    loaded = make_pipeline("kl")
    loaded.load_lora_weights(str(tmp_path / "one"))
    pipeline.set_adapters("second")
    torch.testing.assert_close(
        loaded(picture(8, 8), **SMALL).images, pipeline(picture(8, 8), **SMALL).images, rtol=0, atol=3e-5
    )
    loaded.save_lora_adapter(tmp_path / "again")  # the only one
    first, second = load_file(tmp_path / "one" / FILE), load_file(tmp_path / "again" / FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with safe_open(tmp_path / "again" / FILE, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"]) == stated


# --- two LoRAs, mixed ------------------------------------------------------------------------------------------------


def settings_of(pipeline):
    """All that a call must leave as it is: weights, activity, strengths, what is trained."""
    layers = {
        f"{component}.{name}": (layer.active_adapters, layer.disable_adapters, dict(layer.scaling))
        for component in ("transformer", "vae")
        for name, layer in getattr(pipeline, component).named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "scaling")
    }
    weights = {
        f"{component}.{name}": (tensor.detach().clone(), tensor.requires_grad)
        for component in ("transformer", "vae")
        for name, tensor in getattr(pipeline, component).named_parameters()
    }
    return layers, weights


def assert_same_settings(before, after):
    assert before[0] == after[0] and len(before[0]) == 4 and before[1].keys() == after[1].keys()
    for name, (tensor, trained) in before[1].items():
        assert torch.equal(tensor, after[1][name][0]) and trained == after[1][name][1], name


def both(make_pipeline, published, names=("tsdsr", "tsdsr-mse")):
    folders = [published(name, seed) for name, seed in (("first", 5), ("second", 6))]
    pipeline = make_pipeline("kl")
    for folder, name in zip(folders, names, strict=True):
        pipeline.load_lora_weights(str(folder), adapter_name=name)
    return pipeline, folders


@pytest.mark.parametrize("names", [("tsdsr", "tsdsr-mse"), ("sharp", "faithful")], ids=str)
def test_fidelity_mixes_the_two(make_pipeline, picture, published, names):
    pipeline, (realism, faithful) = both(make_pipeline, published, names)
    pipeline.set_adapters(list(names), [0.9, 0.2])
    before, own = settings_of(pipeline), pipeline(picture(8, 8), **SMALL).images
    results = []
    for fidelity in (0, 0.25, 1):
        results.append(pipeline(picture(8, 8), fidelity=fidelity, **SMALL).images)
        expected = merged(make_pipeline, (realism, 1 - fidelity), (faithful, fidelity))(picture(8, 8), **SMALL).images
        torch.testing.assert_close(results[-1], expected, rtol=0, atol=3e-5)
        assert_same_settings(before, settings_of(pipeline))
    assert (results[0] - results[2]).abs().max() > 1e-2
    torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, own, rtol=0, atol=0)


def test_the_published_names_count_before_the_order(make_pipeline, picture, published):
    pipeline, (faithful, realism) = both(make_pipeline, published, ("tsdsr-mse", "tsdsr"))
    pipeline.load_lora_weights(str(published("third", 9)), adapter_name="third")
    for fidelity, folder in ((0, realism), (1, faithful)):
        expected = merged(make_pipeline, (folder, 1))(picture(8, 8), **SMALL).images
        torch.testing.assert_close(
            pipeline(picture(8, 8), fidelity=fidelity, **SMALL).images, expected, rtol=0, atol=3e-5
        )


def test_disabled_loras_are_mixed_and_a_call_that_fails_leaves_them_disabled(make_pipeline, picture, published):
    pipeline, _ = both(make_pipeline, published)
    active = pipeline(picture(8, 8), fidelity=0.5, **SMALL).images
    pipeline.disable_lora()
    before = settings_of(pipeline)
    torch.testing.assert_close(pipeline(picture(8, 8), fidelity=0.5, **SMALL).images, active, rtol=0, atol=0)

    def breaks_off(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(picture(8, 8), fidelity=0.5, tile_callback=breaks_off, **SMALL)
    assert_same_settings(before, settings_of(pipeline))


def test_adapters_of_one_network_are_mixed_there(make_pipeline, picture, published):
    folders = [published(name, seed) for name, seed in (("first", 5), ("second", 6))]
    pipeline = make_pipeline("kl")
    pipeline.load_lora_weights(str(folders[0]), adapter_name="tsdsr")
    pipeline.load_lora_weights(str(folders[1] / "transformer.safetensors"), adapter_name="tsdsr-mse")
    only = make_pipeline("kl")
    only.load_lora_weights(str(folders[1] / "transformer.safetensors"))
    torch.testing.assert_close(
        pipeline(picture(8, 8), fidelity=1, **SMALL).images, only(picture(8, 8), **SMALL).images, rtol=0, atol=3e-5
    )


@pytest.mark.parametrize("fidelity", [-0.1, 1.5, "high", float("nan")])
def test_fidelity_outside_its_range_is_refused(make_pipeline, picture, fidelity):
    with pytest.raises(ValueError, match="`fidelity` must be a number from 0 to 1, not"):
        make_pipeline("kl")(picture(8, 8), fidelity=fidelity, **SMALL)


def test_fidelity_needs_two_that_are_not_fused(make_pipeline, picture, published):
    pipeline = make_pipeline("kl")
    with pytest.raises(ValueError, match=r"mixes two LoRAs.*loaded: none"):
        pipeline(picture(8, 8), fidelity=0.5, **SMALL)
    pipeline.load_lora_weights(str(published("one")), adapter_name="one")
    with pytest.raises(ValueError, match=re.escape("loaded: ['one']")):
        pipeline(picture(8, 8), fidelity=0.5, **SMALL)
    pipeline.load_lora_weights(str(published("two", 6)), adapter_name="two")
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"):
        pipeline(picture(8, 8), fidelity=0.5, **SMALL)
    pipeline.unfuse_lora()
    pipeline(picture(8, 8), fidelity=0.5, **SMALL)


# --- strength, swapping, deleting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_strength_of_one_call_is_that_of_set_adapters(make_pipeline, picture, tmp_path, network, scale):
    TSDSRPipeline.save_lora_weights(tmp_path, **trained(make_pipeline, network)[1])
    pipeline = make_pipeline("kl", network=network)
    pipeline.load_lora_weights(str(tmp_path), adapter_name="mine")
    whole = pipeline(picture(40, 8), **SMALL).images  # in tiles
    weaker = pipeline(picture(40, 8), joint_attention_kwargs={"scale": scale}, **SMALL).images
    torch.testing.assert_close(pipeline(picture(40, 8), **SMALL).images, whole, rtol=0, atol=0)
    pipeline.set_adapters("mine", scale)
    torch.testing.assert_close(pipeline(picture(40, 8), **SMALL).images, weaker, rtol=0, atol=3e-5)
    assert (weaker - whole).abs().max() > 1e-2


def test_an_adapter_can_be_swapped_in_place(make_pipeline, picture, published):
    first, second = published("first", 5), published("second", 6)
    pipeline = make_pipeline("kl")
    pipeline.load_lora_weights(str(first), adapter_name="mine")
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    held = layer.lora_A["mine"].weight
    pipeline.load_lora_weights(str(second), adapter_name="mine", hotswap=True)
    assert pipeline.get_list_adapters() == {"transformer": ["mine"], "vae": ["mine"]}
    assert layer.lora_A["mine"].weight is held
    expected = merged(make_pipeline, (second, 1))(picture(8, 8), **SMALL).images
    torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, expected, rtol=0, atol=3e-5)


def test_an_adapter_of_another_rank_can_be_swapped_in_once_prepared(make_pipeline, picture, published, tmp_path):
    pipeline = make_pipeline("kl")
    pipeline.enable_lora_hotswap(target_rank=6)
    pipeline.load_lora_weights(str(published("first", 5)), adapter_name="mine")
    pipeline(picture(8, 8), **SMALL)
    generator = torch.Generator().manual_seed(8)
    state = {
        "transformer.proj_out.lora_A.weight": torch.randn(5, 16, generator=generator) * 0.3,
        "transformer.proj_out.lora_B.weight": torch.randn(16, 5, generator=generator) * 0.3,
    }
    pipeline.load_lora_weights(dict(state), adapter_name="mine", hotswap=True)
    down, up = state.values()
    weight = pipeline.transformer.proj_out.get_delta_weight("mine")
    torch.testing.assert_close(weight, up @ down)
    pipeline(picture(8, 8), joint_attention_kwargs={"scale": 0.5}, **SMALL)
    torch.testing.assert_close(pipeline.transformer.proj_out.get_delta_weight("mine"), up @ down)


def test_deleting_one_leaves_the_other(make_pipeline, picture, published):
    pipeline, (first, second) = both(make_pipeline, published)
    pipeline.set_adapters(["tsdsr", "tsdsr-mse"], [1.0, 0.5])
    torch.testing.assert_close(
        pipeline(picture(8, 8), **SMALL).images,
        merged(make_pipeline, (first, 1), (second, 0.5))(picture(8, 8), **SMALL).images,
        rtol=0,
        atol=1e-5,
    )
    pipeline.delete_adapters("tsdsr-mse")
    assert pipeline.get_list_adapters() == {"transformer": ["tsdsr"], "vae": ["tsdsr"]}
    expected = merged(make_pipeline, (first, 1))(picture(8, 8), **SMALL).images
    torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, expected, rtol=0, atol=3e-5)


def test_loaded_loras_are_not_saved_with_the_weights(make_pipeline, picture, published, tmp_path):
    pipeline = make_pipeline("kl")
    pipeline.load_lora_weights(str(published("first")))
    expected = pipeline(picture(8, 8), **SMALL).images
    with pytest.raises(ValueError, match=r"`fuse_lora\(\)` and `unload_lora_weights\(\)` first"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = TSDSRPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(loaded(picture(8, 8), **SMALL).images, expected, rtol=0, atol=1e-4)
