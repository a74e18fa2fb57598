"""What the schemas of the nodes share."""

import ast
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from comfy_api.latest import io

CATEGORY = "image/upscaling/TSD-SR"

# What the loader hands to the other nodes, a `hosting.HostedModel`.
Model = io.Custom("TSDSR_MODEL")

_PIPELINE = Path(__file__).resolve().parent.parent / "pipelines" / "pipeline_tsdsr.py"
_Input = TypeVar("_Input", bound=io.Input)


@cache
def pipeline_defaults() -> dict[str, Any]:
    """The defaults of `TSDSRPipeline.__call__`, read from its source: importing it would cost seconds at start-up."""
    tree = ast.parse(_PIPELINE.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    methods = {node.name: node for node in classes["TSDSRPipeline"].body if isinstance(node, ast.FunctionDef)}
    arguments = methods["__call__"].args
    named = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    return {
        argument.arg: ast.literal_eval(default) for argument, default in zip(named, arguments.defaults, strict=True)
    }


def advanced(widget: _Input) -> _Input:
    """Mark an input as advanced: the front end hides it until it is asked for."""
    # The argument `advanced=` is younger than the oldest ComfyUI that is supported; this dictionary reaches both.
    widget.extra_dict["advanced"] = True
    return widget
