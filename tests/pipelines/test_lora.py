"""One file with `transformer.*` and `vae.*` adapters."""

import json

import pytest
import torch
from safetensors.torch import save_file

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
    with pytest.raises(ValueError, match="no keys `transformer"):
        make_pipeline().load_lora_weights({"unet.lora_A.weight": torch.zeros(2, 2)})
