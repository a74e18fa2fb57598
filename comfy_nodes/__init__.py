"""ComfyUI nodes: each a schema and a few lines that call the pipeline; the host manages memory, progress and files.

Importing this needs ComfyUI (`comfy_api`); diffusers and the pipeline are imported when a node first runs.
"""

from comfy_api.latest import ComfyExtension, io

from .color import TSDSRColorMatch
from .loader import TSDSRLoader
from .upscale import TSDSRTiledUpscale, TSDSRUpscale

__all__ = ["TSDSRColorMatch", "TSDSRExtension", "TSDSRLoader", "TSDSRTiledUpscale", "TSDSRUpscale"]


class TSDSRExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TSDSRLoader, TSDSRUpscale, TSDSRTiledUpscale, TSDSRColorMatch]
