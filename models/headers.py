"""Safetensors headers, read without torch and without touching a weight.

The format: 8 bytes (little-endian length n), n bytes of JSON, then the tensors
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

# Longest header the safetensors library itself accepts, in bytes.
_LONGEST_HEADER = 100_000_000

# Safetensors names of floating-point types -> torch's names.
FLOAT_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Tensor:
    """One entry of a header: the torch name of its type, its shape and the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What one safetensors file (or one sharded set of them) holds."""

    file: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def dtypes_of(tensors: Iterable[Tensor]) -> list[str]:
    """Types by the number of elements stored in them, most first."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return sorted(counts, key=lambda name: -counts[name])


def foreign_content(path: Path) -> str | None:
    """A phrase for what a failed download left in a file, or None where the first bytes look like none of it."""
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "an empty file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML page"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer"
    if text.startswith((b'{"error', b'{ "error')):
        return "a server's error message"
    return None


def require_real_content(path: Path, expected: str) -> None:
    """Refuse what failed downloads leave behind.

    Raises:
        CheckpointError: if the file is missing, empty, an HTML page, a git-lfs pointer or an error message.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing where {expected} was expected; download it or correct the path.")
    found = foreign_content(path)
    if found:
        mend = "run `git lfs pull` or download it again" if "git-lfs" in found else "download it again"
        raise CheckpointError(f"{path} is {found}, not {expected}; {mend}.")


def read_header(path: Path) -> Header:
    """Read the header of one safetensors file.

    Raises:
        CheckpointError: if the file is missing, truncated, or something else under this name.
    """
    require_real_content(path, "a safetensors file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _LONGEST_HEADER:
            # Only here: the length of a true header may begin with these bytes too.
            if prefix[:2] == b"PK" or prefix[:1] == b"\x80":
                raise CheckpointError(
                    f"{path} is a PyTorch pickle, not a safetensors file; get the file in safetensors format."
                )
            raise CheckpointError(f"{path} does not begin with a safetensors header; download it again.")
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file ({size} bytes where its header alone needs {8 + length});"
                " download it again."
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = dict(entries.pop("__metadata__", None) or {})
        tensors = {
            key: Tensor(FLOAT_TYPES.get(entry["dtype"], entry["dtype"]), tuple(map(int, entry["shape"])), path)
            for key, entry in entries.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has an unreadable safetensors header; download it again.") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is truncated or damaged ({size} bytes where its header promises {8 + length + end});"
            " download it again."
        )
    return Header(path, tensors, metadata)


def read_json(path: Path, expected: str) -> dict:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is missing or holds anything else.
    """
    require_real_content(path, expected)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON, but {expected} was expected; restore it.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not {expected}; restore it.")
    return content


# The layouts diffusers writes, in the order they are looked for: full precision first, then the fp16 variant.
_SINGLE = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_INDEX = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json")


def read_component_header(folder: Path) -> Header:
    """The header of a diffusers component folder: one file, its fp16 variant, or shards with an index.

    Raises:
        CheckpointError: if the folder has no safetensors weights, a shard is missing, or a file is flawed.
    """
    for single, index in zip(_SINGLE, _INDEX, strict=True):
        if (folder / single).is_file():
            return read_header(folder / single)
        if (folder / index).is_file():
            weight_map = read_json(folder / index, "the index of a sharded model").get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"{folder / index} has no weight_map that names the shards; download it again.")
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(names)):
                tensors.update(read_header(folder / shard).tensors)
            return Header(folder / index, tensors, {})
    raise CheckpointError(
        f"{folder} has no {_SINGLE[0]} (nor its fp16 variant, nor shards with an index); download the model in"
        " safetensors format."
    )
