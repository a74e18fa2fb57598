"""The pipeline as blocks of modular diffusers, to run on its own or within a larger pipeline."""

import inspect
import re
from collections.abc import Callable
from typing import Any, get_args

import diffusers
import torch
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING

from .lora import TSDSRLoraLoaderMixin
from .pipeline_tsdsr import TSDSRPipeline


def _documented(function: Callable) -> dict[str, tuple[inspect.Parameter, str]]:
    """Parameters by name, each with what the docstring says of it."""
    said: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.+(?:\n {8}.+)*)", inspect.getdoc(function) or "", re.MULTILINE):
        said |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return {name: (each, said.get(name, "")) for name, each in inspect.signature(function).parameters.items()}


_MADE_OF, _CALLED_WITH = _documented(TSDSRPipeline), _documented(TSDSRPipeline.__call__)
_CONFIGS = ["use_shift_factor", "timestep", "grain", "degrid"]
_ENCODERS = [name for name in _MADE_OF if name.startswith(("text_encoder", "tokenizer"))]
_NETWORKS = [name for name in _MADE_OF if name not in (*_CONFIGS, *_ENCODERS)]
_EMBEDS = ["prompt_embeds", "pooled_prompt_embeds"]


def _inputs(names: list[str]) -> list[InputParam]:
    """Inputs of the pipeline's call, with its defaults and its words."""
    found = []
    for name in names:
        parameter, text = _CALLED_WITH[name]
        required = parameter.default is inspect.Parameter.empty
        found.append(InputParam(name, parameter.annotation, None if required else parameter.default, required, text))
    return found


def _components(names: list[str]) -> list[ComponentSpec]:
    # The type of one is a class: the first, where there are several.
    return [ComponentSpec(name, get_args(_MADE_OF[name][0].annotation)[0], _MADE_OF[name][1]) for name in names]


def _pipeline(components: ModularPipeline) -> TSDSRPipeline:
    """The pipeline that shares the components of a modular one."""
    parts: dict[str, Any] = {name: getattr(components, name, None) for name in (*_NETWORKS, *_ENCODERS)}
    return TSDSRPipeline(**parts, **{name: components.config[name] for name in _CONFIGS if name in components.config})


class TSDSRTextEncoderStep(ModularPipelineBlocks):
    """Embeds `prompt`, where one is given."""

    model_name = "tsdsr"
    description = "Embeds `prompt`; without one, the embeddings that are given or the model's own are used."
    expected_components = _components([*_ENCODERS, "transformer"])  # its width, for the zeros in place of T5
    inputs = _inputs(["prompt", *_EMBEDS])
    intermediate_outputs = [OutputParam(name, torch.Tensor, _CALLED_WITH[name][1]) for name in _EMBEDS]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        """Sets `prompt_embeds` and `pooled_prompt_embeds`.

        Raises:
            ValueError: for a prompt beside `prompt_embeds`, or without text encoders.
        """
        block_state = self.get_block_state(state)
        if block_state.prompt is not None:
            if block_state.prompt_embeds is not None:
                raise ValueError("Pass either `prompt` or `prompt_embeds`, not both.")
            block_state.prompt_embeds, _, block_state.pooled_prompt_embeds, _ = _pipeline(components).encode_prompt(
                block_state.prompt, device=components._execution_device, do_classifier_free_guidance=False
            )
        self.set_block_state(state, block_state)
        return components, state


class TSDSRUpscaleStep(ModularPipelineBlocks):
    """Runs `TSDSRPipeline` with all its arguments but `prompt`."""

    model_name = "tsdsr"
    description = "Enlarges `image` with one step of a diffusion model."
    expected_components = _components(_NETWORKS)
    expected_configs = [ConfigSpec(name, _MADE_OF[name][0].default, _MADE_OF[name][1]) for name in _CONFIGS]
    inputs = _inputs([name for name in _CALLED_WITH if name not in ("self", "prompt", "return_dict")])
    intermediate_outputs = [OutputParam("images", description="The results, as `output_type` says.")]
    progress_bar_config: dict[str, Any] = {}

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """As `DiffusionPipeline.set_progress_bar_config`."""
        self.progress_bar_config = kwargs

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        """Sets `images`; raises what `TSDSRPipeline.__call__` raises."""
        block_state = self.get_block_state(state)
        pipeline = _pipeline(components)
        pipeline.set_progress_bar_config(**self.progress_bar_config)
        block_state.images = pipeline(**{each.name: block_state[each.name] for each in self.inputs}).images
        self.set_block_state(state, block_state)
        return components, state


class TSDSRBlocks(SequentialPipelineBlocks):
    """`TSDSRPipeline` in two blocks: the prompt, which may be taken out, and the picture.

    `TSDSRBlocks().init_pipeline(name)` makes a `TSDSRModularPipeline` for a pipeline folder or Hub id, and its
    `load_components()` loads it.
    """

    block_classes = [TSDSRTextEncoderStep, TSDSRUpscaleStep]
    block_names = ["text_encoder", "upscale"]
    description = "One-step super-resolution of photographs (TSD-SR)."


class TSDSRModularPipeline(ModularPipeline, TSDSRLoraLoaderMixin):
    """The modular pipeline that `TSDSRBlocks` are run by."""

    default_blocks_name = "TSDSRBlocks"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for spec in self._component_specs.values():
            if spec.type_hint is None:  # model_index.json says that there is none
                spec.pretrained_model_name_or_path = None


# diffusers looks its modular classes up by name, among its own.
diffusers.TSDSRBlocks, diffusers.TSDSRModularPipeline = TSDSRBlocks, TSDSRModularPipeline
MODULAR_PIPELINE_MAPPING["tsdsr"] = lambda config=None: "TSDSRModularPipeline"
