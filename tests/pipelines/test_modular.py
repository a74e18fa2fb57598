"""The pipeline as blocks of modular diffusers: the same pictures, the same defaults."""

import inspect

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import (
    InputParam,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tsdsr import OneStepSD3Transformer2DModel, TSDSRPipeline
from tsdsr.pipelines.loading import EMBEDDED
from tsdsr.pipelines.modular import TSDSRBlocks, TSDSRModularPipeline, TSDSRUpscaleStep

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "pt"}


def over(pipeline, blocks=None):
    """A modular pipeline over the components of a pipeline."""
    modular = (blocks or TSDSRBlocks()).init_pipeline()
    modular.update_components(
        **pipeline.components,
        **{name: pipeline.config[name] for name in ("use_shift_factor", "timestep", "grain", "degrid")},
    )
    modular.set_progress_bar_config(disable=True)
    return modular


@pytest.fixture
def with_encoders(make_pipeline, clip):
    """A pipeline with text encoders, of either network."""

    def make(network):
        if network == "unet":
            encoder, tokenizer = clip(CLIPTextModel, 12)
            return make_pipeline("kl", network, text_encoder=encoder, tokenizer=tokenizer)
        encoder, tokenizer = clip(CLIPTextModelWithProjection, 6)
        parts = {"text_encoder": encoder, "text_encoder_2": encoder, "tokenizer": tokenizer, "tokenizer_2": tokenizer}
        transformer = make_pipeline().transformer
        return make_pipeline("kl", transformer=transformer, **parts)

    return make


def test_the_embedded_model(picture, caplog):
    """From its folder, as it comes: nothing that the model has not is looked for."""
    expected = TSDSRPipeline.from_pretrained(EMBEDDED)(picture(20, 26), **SMALL).images
    modular = TSDSRBlocks().init_pipeline(str(EMBEDDED))
    assert type(modular) is TSDSRModularPipeline and modular.config.timestep == 250
    modular.load_components()
    assert "Failed" not in caplog.text
    assert modular.text_encoder is None and modular.unet is None
    modular.set_progress_bar_config(disable=True)
    assert torch.equal(modular(image=picture(20, 26), **SMALL, output="images"), expected)


def test_the_class_knows_its_blocks(picture, capfd):
    """And its progress bar can be switched off and on."""
    modular = TSDSRModularPipeline(pretrained_model_name_or_path=str(EMBEDDED))
    modular.load_components()
    capfd.readouterr()
    for disable in (True, False):
        modular.set_progress_bar_config(disable=disable)
        modular(image=picture(8, 8), **SMALL)
        assert (capfd.readouterr().err == "") == disable


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_components_and_settings_of_a_pipeline(make_pipeline, picture, network):
    """Settings of the config count, and what is passed reaches the call."""
    more = {"use_shift_factor": True, "timestep": 640 if network == "unet" else 640.0}
    pipeline = make_pipeline("kl", network, **more)
    modular = over(pipeline)
    arguments = {"upscale": 2.5, "color_fix": "none", "tile_batch_size": 2, **SMALL}
    for image in (picture(24, 30), [picture(8, 8), picture(9, 12)]):
        expected = pipeline(image, **arguments).images
        found = modular(image=image, **arguments, output="images")
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(found[0], make_pipeline("kl", network)(picture(8, 8), **arguments).images[0])
    assert all(getattr(modular, name) is part for name, part in pipeline.components.items())


def test_a_pipeline_folder_and_its_configs(make_pipeline, picture, tmp_path):
    pipeline = make_pipeline("kl", use_shift_factor=True, timestep=900.0, grain=3.0, degrid=2.0)
    pipeline.save_pretrained(tmp_path)
    modular = TSDSRBlocks().init_pipeline(str(tmp_path))
    modular.load_components(dtype=torch.float32)
    modular.set_progress_bar_config(disable=True)
    expected = TSDSRPipeline.from_pretrained(tmp_path)(picture(8, 8), **SMALL).images
    assert torch.equal(modular(image=picture(8, 8), **SMALL).images, expected)


def test_a_baked_model(make_pipeline, picture, tmp_path):
    """From its folder, whose transformer is not of the class that the blocks name."""
    pipeline = make_pipeline("kl")
    pipeline.bake()
    pipeline.save_pretrained(tmp_path)
    modular = TSDSRBlocks().init_pipeline(str(tmp_path))
    modular.load_components(dtype=torch.float32)
    modular.set_progress_bar_config(disable=True)
    assert type(modular.transformer) is OneStepSD3Transformer2DModel
    expected = TSDSRPipeline.from_pretrained(tmp_path)(picture(8, 8), **SMALL).images
    assert torch.equal(modular(image=picture(8, 8), **SMALL).images, expected)


@pytest.mark.filterwarnings("ignore:The default of `overwrite_modular_index`:FutureWarning")
def test_saved_and_loaded_as_a_modular_pipeline(make_pipeline, picture, tmp_path):
    pipeline = make_pipeline("kl", timestep=900.0)
    over(pipeline).save_pretrained(str(tmp_path))
    modular = ModularPipeline.from_pretrained(str(tmp_path))
    assert type(modular) is TSDSRModularPipeline and type(modular.blocks) is TSDSRBlocks
    modular.load_components()
    modular.set_progress_bar_config(disable=True)
    torch.testing.assert_close(modular(image=picture(8, 8), **SMALL).images, pipeline(picture(8, 8), **SMALL).images)


@pytest.mark.parametrize("network", ["transformer", "unet"])
@pytest.mark.parametrize("prompt", ["a b c", ["a b c", "d"]], ids=["one", "each its own"])
def test_prompts(with_encoders, picture, network, prompt):
    pipeline = with_encoders(network)
    pipeline.set_progress_bar_config(disable=True)
    modular, images = over(pipeline), [picture(8, 8), picture(8, 8, seed=1)]
    expected = pipeline(images, prompt=prompt, **SMALL).images
    assert torch.equal(modular(image=images, prompt=prompt, **SMALL).images, expected)
    assert torch.equal(modular(image=images, **SMALL).images, pipeline(images, **SMALL).images)
    # The text block alone, whose state the rest goes on with.
    text = over(pipeline, TSDSRBlocks().sub_blocks["text_encoder"])
    assert type(text) is TSDSRModularPipeline
    assert not {"vae", "scheduler", "unet"} & set(text.components)
    state = text(prompt=prompt)
    embeds = {name: state.get(name) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    assert torch.equal(modular(image=images, **embeds, **SMALL).images, expected)
    rest = TSDSRBlocks()
    rest.sub_blocks.pop("text_encoder")
    assert torch.equal(over(pipeline, rest)(image=images, **embeds, **SMALL).images, expected)


def test_what_cannot_be_used_is_said_as_the_pipeline_says_it(make_pipeline, with_encoders, picture):
    modular = over(make_pipeline())
    for arguments, named in (
        ({"prompt": "a"}, "text encoders"),
        ({"upscale": 0.5}, "`upscale`"),
        ({"color_fix": "sepia"}, "`color_fix`"),
        ({"tile_size": 3}, "`tile_size`"),
    ):
        with pytest.raises(ValueError, match=named):
            modular(image=picture(8, 8), **{**SMALL, **arguments})
    with pytest.raises(ValueError, match="image"):
        modular(**SMALL)
    with pytest.raises(ValueError, match="not both"):
        over(with_encoders("transformer"))(
            image=picture(8, 8), prompt="a", prompt_embeds=torch.zeros(1, 3, 12), **SMALL
        )


def test_inputs_are_those_of_the_call(make_pipeline):
    """Every argument, its default and a description; no second copy of either."""
    parameters = dict(inspect.signature(TSDSRPipeline.__call__).parameters)
    for name in ("self", "return_dict"):
        parameters.pop(name)
    blocks = TSDSRBlocks()
    assert {each.name for each in blocks.inputs} == set(parameters) and blocks.required_inputs == ["image"]
    for each in blocks.inputs:
        assert each.description and each.description in " ".join(TSDSRPipeline.__call__.__doc__.split())
        assert each.required or each.default == parameters[each.name].default
    for component in blocks.expected_components:
        assert component.description and isinstance(component.type_hint, type)
    assert "upscale" in blocks.doc and "`float`" in blocks.doc


class Gradient(ModularPipelineBlocks):
    """Makes a picture."""

    inputs = [InputParam("side", default=8)]
    intermediate_outputs = [OutputParam("image")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.image = np.linspace(0, 1, block_state.side**2 * 3, dtype=np.float32).reshape(
            -1, block_state.side, 3
        )
        self.set_block_state(state, block_state)
        return components, state


@pytest.mark.parametrize("last", [TSDSRBlocks, TSDSRUpscaleStep], ids=["nested", "one block"])
def test_within_a_larger_pipeline(make_pipeline, last):
    """After a block that makes the picture, run by diffusers' own pipeline class."""
    pipeline = make_pipeline()
    blocks = SequentialPipelineBlocks.from_blocks_dict({"make": Gradient(), "upscale": last()})
    assert "image" not in [each.name for each in blocks.inputs]
    modular = ModularPipeline(blocks=blocks)
    modular.update_components(**pipeline.components)
    image = np.linspace(0, 1, 300, dtype=np.float32).reshape(10, 10, 3)
    expected = pipeline(image, **SMALL).images
    assert torch.equal(modular(side=10, **SMALL).images, expected)


def test_loras_are_loaded_as_into_the_pipeline(make_pipeline, picture):
    generator = torch.Generator().manual_seed(5)
    layer = "transformer.transformer_blocks.0.attn.to_q.lora_"
    lora = {
        f"{layer}A.weight": torch.randn(2, 16, generator=generator),
        f"{layer}B.weight": torch.randn(16, 2, generator=generator),
    }
    pipeline, modular = make_pipeline(), over(make_pipeline())
    plain = modular(image=picture(8, 8), **SMALL).images
    for each in (pipeline, modular):
        each.load_lora_weights(dict(lora))
    found = modular(image=picture(8, 8), **SMALL).images
    assert torch.equal(found, pipeline(picture(8, 8), **SMALL).images) and not torch.equal(found, plain)
