"""One-step diffusion super-resolution of real photographs.

The names below are loaded when they are first used, so `import tsdsr` itself loads neither torch nor diffusers. ComfyUI
enters here too, where the repository is a folder in custom_nodes/: by `comfy_entrypoint`.
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoints.convert import convert_tsdsr
    from .checkpoints.info import describe
    from .checkpoints.tinysr import convert_tinysr
    from .models.autoencoder_tiny_separable import AutoencoderTinySeparable
    from .models.one_step_sd3 import OneStepSD3Transformer2DModel
    from .models.prompt_embeddings import PromptEmbeddings
    from .pipelines.loading import load_pipeline
    from .pipelines.lora import TSDSRLoraLoaderMixin
    from .pipelines.modular import TSDSRBlocks, TSDSRModularPipeline
    from .pipelines.pipeline_tsdsr import TSDSRPipeline, TSDSRPipelineOutput
    from .pipelines.text import embed_prompt

__version__ = "0.1.0"

__all__ = [
    "AutoencoderTinySeparable",
    "OneStepSD3Transformer2DModel",
    "PromptEmbeddings",
    "TSDSRBlocks",
    "TSDSRLoraLoaderMixin",
    "TSDSRModularPipeline",
    "TSDSRPipeline",
    "TSDSRPipelineOutput",
    "__version__",
    "convert_tinysr",
    "convert_tsdsr",
    "describe",
    "embed_prompt",
    "load_pipeline",
]

_MODULE_OF = {
    "AutoencoderTinySeparable": ".models.autoencoder_tiny_separable",
    "OneStepSD3Transformer2DModel": ".models.one_step_sd3",
    "PromptEmbeddings": ".models.prompt_embeddings",
    "TSDSRBlocks": ".pipelines.modular",
    "TSDSRLoraLoaderMixin": ".pipelines.lora",
    "TSDSRModularPipeline": ".pipelines.modular",
    "TSDSRPipeline": ".pipelines.pipeline_tsdsr",
    "TSDSRPipelineOutput": ".pipelines.pipeline_tsdsr",
    "convert_tinysr": ".checkpoints.tinysr",
    "convert_tsdsr": ".checkpoints.convert",
    "describe": ".checkpoints.info",
    "embed_prompt": ".pipelines.text",
    "load_pipeline": ".pipelines.loading",
}


# The folder that ComfyUI serves to its front end: the help pages of the nodes.
WEB_DIRECTORY = "./comfy_nodes/web"


async def comfy_entrypoint() -> object:
    """The extension with this package's nodes, for ComfyUI."""
    from .comfy_nodes import TSDSRExtension

    return TSDSRExtension()


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # What is imported stays: the garbage collector would walk through all of it again and again, and find nothing.
    collects = gc.isenabled()
    gc.disable()
    try:
        value = getattr(import_module(_MODULE_OF[name], __name__), name)
    finally:
        if collects:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
