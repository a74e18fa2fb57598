"""Weights from one layout to another: the published TSD-SR and TinySR into a folder or a pipeline, a pipeline baked,
and a look at what a file is.

Names are resolved on first use, so that importing this package loads neither torch nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models.errors import CheckpointError
    from ..models.headers import read_header
    from ..models.single_file import holds
    from .assemble import assemble_tsdsr
    from .bake import bake_model
    from .convert import convert_tsdsr
    from .info import describe
    from .tinysr import convert_tinysr

__all__ = [
    "CheckpointError",
    "assemble_tsdsr",
    "bake_model",
    "convert_tinysr",
    "convert_tsdsr",
    "describe",
    "holds",
    "read_header",
]

_HOMES = {
    "CheckpointError": "..models.errors",
    "assemble_tsdsr": ".assemble",
    "bake_model": ".bake",
    "convert_tinysr": ".tinysr",
    "convert_tsdsr": ".convert",
    "describe": ".info",
    "holds": "..models.single_file",
    "read_header": "..models.headers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
