"""The published TSD-SR checkpoint layout, as facts: file names, key names and which modules carry a LoRA.

Source: the release `Microtreei/TSD-SR` (test/test_tsdsr.py and its weights): two LoRA files without metadata, alpha =
rank, both with keys `transformer.<module>.lora_A.weight` / `.lora_B.weight`, the VAE's too.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..models import lora_targets
from ..models.errors import CheckpointError
from ..models.headers import FLOAT_TYPES, Header, Tensor

LORA_FILES = {"transformer": "transformer.safetensors", "vae": "vae.safetensors"}
EMBEDDING_FILES = {"prompt_embeds": "prompt_embeds", "pooled_prompt_embeds": "pool_embeds"}
EMBEDDING_SUFFIXES = (".pt", ".safetensors")
SIDE_NAMES = {"transformer": "the transformer", "vae": "the VAE"}

_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_TRANSFORMER_MODULE = re.compile(r"(transformer_blocks|pos_embed|norm_out|proj_out|context_embedder|time_text_embed)\b")
_VAE_MODULE = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\b")


def is_target(side: str, module: str) -> bool:
    """Whether the published weights have a LoRA on this convolution or linear layer.

    The transformer's by suffix; of the VAE everything in the encoder (the decoder stays frozen) and `quant_conv`.
    """
    if side == "vae":
        return module.startswith("encoder.") or module == "quant_conv"
    return any(module == target or module.endswith(f".{target}") for target in lora_targets.STUDENT)


def side_of(modules: Iterable[str]) -> str | None:
    """Which network these module names belong to: "transformer", "vae", or None where they fit neither better."""
    names = list(modules)
    votes = {
        "transformer": sum(bool(_TRANSFORMER_MODULE.match(name)) for name in names),
        "vae": sum(bool(_VAE_MODULE.match(name)) for name in names),
    }
    best = max(votes, key=lambda side: votes[side])
    return best if votes[best] > len(names) / 2 else None


@dataclass
class LoraFile:
    """One side of a LoRA, from its header: `halves[module]["A" or "B"]` is the key in the file."""

    header: Header
    side: str | None
    halves: dict[str, dict[str, str]] = field(default_factory=dict)
    stray_keys: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int | None:
        """The rank of the first complete pair: rows of its lora_A."""
        for keys in self.halves.values():
            if "A" in keys:
                return self.header.tensors[keys["A"]].shape[0]
        return None

    def tensor(self, module: str, half: str) -> Tensor:
        return self.header.tensors[self.halves[module][half]]


def parse_lora(header: Header, prefix: str = "transformer") -> LoraFile:
    """Sort the keys of one LoRA file that begin with `prefix` by module; all other keys are `stray_keys`."""
    lora = LoraFile(header, None)
    for key in header.tensors:
        match = _LORA_KEY.fullmatch(key.removeprefix(f"{prefix}.")) if key.startswith(f"{prefix}.") else None
        if match:
            lora.halves.setdefault(match["module"], {})[match["half"]] = key
        else:
            lora.stray_keys.append(key)
    lora.side = side_of(lora.halves)
    return lora


def check_lora(lora: LoraFile, side: str, weights: dict[str, tuple[int, ...]]) -> int:
    """Check one LoRA file against the network it is for; only headers are read.

    Args:
        lora: the parsed file.
        side: "transformer" or "vae".
        weights: shape of the weight of every convolution and linear layer of the network, by module name.

    Returns:
        The rank, the same for all modules.

    Raises:
        CheckpointError: naming the first flaw.
    """
    path, network = lora.header.file, SIDE_NAMES[side]
    if lora.stray_keys:
        key = lora.stray_keys[0]
        raise CheckpointError(
            f"{path} has the key {key}, but every key must read transformer.<module>.lora_A.weight or .lora_B.weight;"
            " use a LoRA in the published TSD-SR layout."
        )
    if not lora.halves:
        raise CheckpointError(f"{path} holds no LoRA weights; use the published {path.name}.")
    for module, keys in lora.halves.items():
        if module not in weights:
            raise CheckpointError(
                f"{path} has {next(iter(keys.values()))}, but {network} of the base has no layer {module};"
                " use the base model that this LoRA was trained on."
            )
        for half, other in (("A", "B"), ("B", "A")):
            if half not in keys:
                raise CheckpointError(
                    f"{path} has {keys[other]} without transformer.{module}.lora_{half}.weight, and both are needed;"
                    " download it again."
                )
    for module in weights:
        if is_target(side, module) and module not in lora.halves:
            raise CheckpointError(
                f"{path} lacks transformer.{module}.lora_A.weight and .lora_B.weight, which the published LoRA of"
                f" {network} has; use the complete file or the base model it was trained on."
            )

    rank = lora.rank
    for module, keys in lora.halves.items():
        down, up, weight = lora.tensor(module, "A"), lora.tensor(module, "B"), weights[module]
        for half, tensor in (("A", down), ("B", up)):
            if tensor.dtype not in FLOAT_TYPES.values():
                raise CheckpointError(
                    f"{path} stores {keys[half]} as {tensor.dtype}, but float32, float16 or bfloat16 is expected;"
                    " use the unquantised LoRA."
                )
            if len(tensor.shape) != len(weight):
                raise CheckpointError(
                    f"{path} has {keys[half]} of shape {tensor.shape}, but the base's weight there has"
                    f" {len(weight)} dimensions {weight}; use the base model that this LoRA was trained on."
                )
        if down.shape[0] != up.shape[1]:
            raise CheckpointError(
                f"{path} has rank {down.shape[0]} in {keys['A']} but rank {up.shape[1]} in {keys['B']}, and the two"
                " must agree; download it again."
            )
        if down.shape[0] != rank:
            raise CheckpointError(
                f"{path} has rank {down.shape[0]} in {keys['A']} but rank {rank} elsewhere, and the published LoRA has"
                " one rank throughout; download it again."
            )
        # A weight (out, in, ...) takes lora_A (rank, in, ...) and lora_B (out, rank, 1...).
        for half, tensor, expected in (
            ("A", down, (rank, *weight[1:])),
            ("B", up, (weight[0], rank, *(1 for _ in weight[2:]))),
        ):
            if tensor.shape != expected:
                raise CheckpointError(
                    f"{path} has {keys[half]} of shape {tensor.shape}, but the base's weight {weight} asks for"
                    f" {expected}; use the base model that this LoRA was trained on."
                )
    if not rank:
        raise CheckpointError(f"{path} has rank 0, which is no LoRA; download it again.")
    _check_alpha(lora, rank)
    return rank


def _check_alpha(lora: LoraFile, rank: int) -> None:
    """Published files state no alpha (it equals the rank); another one would be merged at a wrong strength."""
    try:
        stated = json.loads(lora.header.metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        stated = {}
    for key, value in stated.items() if isinstance(stated, dict) else ():
        if key.split(".")[-1] == "lora_alpha" and value != rank:
            raise CheckpointError(
                f"{lora.header.file} states lora_alpha {value} for rank {rank}, but the published layout has alpha"
                " equal to the rank; load this LoRA with load_lora_weights instead."
            )


def find_embedding(folder: Path, stem: str) -> Path:
    """The file of one embedding, .pt before .safetensors.

    Raises:
        CheckpointError: if neither exists.
    """
    for suffix in EMBEDDING_SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise CheckpointError(
        f"{folder} has no {stem}.pt, but the embeddings folder must hold prompt_embeds.pt and pool_embeds.pt; download"
        " the published embeddings or correct the path."
    )
