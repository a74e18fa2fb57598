"""Published TinySR weights -> one folder for `TSDSRPipeline.from_pretrained`."""

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from safetensors import SafetensorError, safe_open

from ..models.autoencoder_tiny_separable import AutoencoderTinySeparable
from ..models.errors import CheckpointError
from ..models.headers import (
    FLOAT_TYPES,
    Header,
    Tensor,
    dtypes_of,
    read_component_header,
    read_header,
    read_json,
)
from ..models.licences import known_base, licence_of
from ..models.one_step_sd3 import OneStepSD3Transformer2DModel
from ..models.single_file import make_scheduler
from ..pipelines import model_card
from ..pipelines.folders import whole_folder
from ..pipelines.loading import DTYPES
from ..pipelines.pipeline_tsdsr import TSDSRPipeline
from .convert import load_embedding, load_lora, lora_delta
from .layout import EMBEDDING_FILES, LoraFile, check_lora, find_embedding, parse_lora
from .output import check_output

PAPER = "[arXiv 2508.17434](https://arxiv.org/abs/2508.17434)"

# Below checkpoint/, and below the folder that holds it.
BACKBONE = "tinybackbone/prune-12-merge-tinysr/transformer"
VAE = "vae/separable"
LORA = "tinysr/transformer.safetensors"
EMBEDDINGS = "dataset/default"
POSITIONS = "dataset/cache/pos_embed.pt"

# Layers with a LoRA, by the last parts of their names (test/test_tinysr.py).
TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "proj", "linear", "linear_1", "linear_2", "net.2")

# Of SD3's transformer and not of this one: the prompt's side.
_CONTEXT = re.compile(r"context_embedder|.*\.(attn\.(add_[qkv]_proj|to_add_out)|norm1_context|ff_context)\b")
# What the first run of the published code leaves in place of the layers that it then deletes.
_DROPPED = re.compile(r"time_text_embed\.|norm_out\.|.*\.norm1\.")
_PARTS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")  # as `norm1.linear` orders them
_CACHED = re.compile(rf"(transformer_blocks\.\d+\.({'|'.join(_PARTS)})|scale|shift)")

_SIZES = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "patch_size",
    "in_channels",
    "out_channels",
    "pooled_projection_dim",
)
# What TinySR was pruned from, as `known_base` recognises it.
_SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64}
# Patches of SD3-medium's table of positions, and of the 1024-pixel pictures it was made for.
_TABLE_SIDE, _PICTURE_SIDE = 192, 64


def convert_tinysr(
    folder: str | Path,
    output: str | Path,
    *,
    embeddings: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn the published TinySR weights into a pipeline folder.

    The LoRA is merged in float32 and the modulation worked out in float64 before anything is rounded. Everything is
    checked from configs and headers before a layer of the backbone is read. `output` appears whole or not at all.
    Pictures may have any size where the table of positions is the middle of SD3's, as the published one is said to be;
    otherwise the network's tiles are no larger than it.

    Args:
        folder: the release's repository with `checkpoint/` and `dataset/`, or its `checkpoint/` with `dataset/` beside.
        output: folder to write.
        embeddings: folder with pool_embeds.pt or .safetensors, where it is not `dataset/default/`.
        dtype: fp32, fp16 or bf16 for everything saved; None keeps the release's own types.
        overwrite: replace a pipeline folder that is there; it goes only once the new one is whole.

    Returns:
        The path of the pipeline folder.

    Raises:
        CheckpointError: one sentence on the first flaw found.

    Source: `Microtreei/TinySR`, test/test_tinysr.py (layout, alpha = rank).
    """
    folder = Path(folder).expanduser().absolute()
    output = Path(output).expanduser().resolve()
    checkpoint = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    chosen = Path(embeddings).expanduser() if embeddings is not None else checkpoint.parent / EMBEDDINGS
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype} is not known; use {', '.join(DTYPES)}.")
    check_output(output, overwrite, (folder, chosen))
    backbone, tiny, lora_file = (checkpoint / name for name in (BACKBONE, VAE, LORA))
    for path in (backbone, tiny):
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path / 'config.json'} is missing, but TinySR's release has it; name the folder that holds its"
                " checkpoint/, or download the missing part."
            )

    header = read_component_header(backbone)
    config = _read_sizes(backbone / "config.json")
    cached = not any(_DROPPED.match(key) for key in header.tensors)
    layers = _layers(config)
    if cached:
        layers = {name: shape for name, shape in layers.items() if not _DROPPED.match(name)}
    entries = _check_backbone(header, config, layers, cached)
    lora, rank = _check_lora(lora_file, layers, cached)
    pooled = torch.zeros(1, 1) if cached else _pooled(chosen, config["pooled_projection_dim"])
    table = _positions(header, checkpoint.parent / POSITIONS, config)
    vae, vae_entries = _check_vae(tiny)
    if vae.config.latent_channels != config["in_channels"]:
        raise CheckpointError(
            f"{tiny} has {vae.config.latent_channels} latent channels and {backbone} {config['in_channels']}, but the"
            " two must agree; use both of one release."
        )
    deltas = {} if lora is None else load_lora(lora)

    with whole_folder(output) as partial:
        state = _read(entries)
        for module in layers:
            if module in deltas:
                state[f"{module}.weight"] = state[f"{module}.weight"].float() + lora_delta(*deltas[module])
        if cached:
            state |= _as_layers(state, config["num_layers"])
        side = math.isqrt(table.shape[1])
        transformer = OneStepSD3Transformer2DModel.from_sd3_state_dict(
            {**state, "pos_embed.pos_embed": table},
            {**config, "pos_embed_max_size": side},
            pooled,
            dtype=_type_of(entries, dtype),
        )
        weights = {key: tensor.to(_type_of(vae_entries, dtype)) for key, tensor in _read(vae_entries).items()}
        vae.load_state_dict(weights, assign=True)
        for network, source in ((transformer, backbone), (vae, tiny)):
            for key, tensor in network.state_dict().items():
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(
                        f"{source} gives numbers in {key} beyond the range of"
                        f" {str(tensor.dtype).removeprefix('torch.')}; use fp32 or bf16."
                    )
        TSDSRPipeline(vae=vae.eval(), transformer=transformer, scheduler=make_scheduler()).save_pretrained(partial)
        halves = [half for half in ("encoder", "decoder") if vae.config.get(f"separable_{half}")]
        facts = [
            model_card.base_fact(known_base(_SD3_MEDIUM), ""),
            "Prompt: none, the network has no text stream; timestep 1000 is part of its weights",
            f"VAE: a tiny autoencoder, {' and '.join(halves) or 'nothing of it'} with separable convolutions",
            f"Positions: a table of {side}x{side} patches, for the network's tiles of at most"
            f" {side * config['patch_size'] * 2 ** (len(vae.config.encoder_block_out_channels) - 1)} pixels",
            'Colour: the authors correct it with `color_fix="adain"`',
        ]
        if lora is not None:
            facts.insert(1, model_card.lora_fact({"transformer": rank}, ", merged into the weights in float32"))
        model_card.write_card(
            partial,
            output.name,
            f"One-step diffusion upscaler for photographs: TinySR ({PAPER}), pruned from TSD-SR\n"
            f"({model_card.PAPER}), as a diffusers pipeline.",
            facts,
            model_card.usage(output.name),
            model_card.front_matter(licence_of(partial, _SD3_MEDIUM), known_base(_SD3_MEDIUM)),
        )
    return output


# --- checks, before any weight of the backbone is read --------------------------------------------------------------


def _read_sizes(path: Path) -> dict[str, Any]:
    config = read_json(path, "the config of TinySR's transformer")
    kinds = ("TinySD3Transformer2DModel", "SD3Transformer2DModel")
    if config.get("_class_name") not in kinds:
        raise CheckpointError(
            f"{path} names a {config.get('_class_name')}, but the backbone is a {kinds[0]}; use TinySR's release."
        )
    sizes = {name: config.get(name) for name in _SIZES}
    # None is what diffusers' networks have for as many as go in.
    sizes["out_channels"] = sizes["out_channels"] or sizes["in_channels"]
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise CheckpointError(f"{path} has {size!r} for {name}; restore the original file.")
    return sizes


def _layers(config: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all layers without the prompt's side, by name; each has a bias of the first number."""
    dim, patch = config["num_attention_heads"] * config["attention_head_dim"], config["patch_size"]
    block = {
        "norm1.linear": (6 * dim, dim),
        **{f"attn.{name}": (dim, dim) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        "ff.net.0.proj": (4 * dim, dim),
        "ff.net.2": (dim, 4 * dim),
    }
    return {
        "pos_embed.proj": (dim, config["in_channels"], patch, patch),
        "time_text_embed.timestep_embedder.linear_1": (dim, 256),
        "time_text_embed.timestep_embedder.linear_2": (dim, dim),
        "time_text_embed.text_embedder.linear_1": (dim, config["pooled_projection_dim"]),
        "time_text_embed.text_embedder.linear_2": (dim, dim),
        **{
            f"transformer_blocks.{index}.{name}": shape
            for index in range(config["num_layers"])
            for name, shape in block.items()
        },
        "norm_out.linear": (2 * dim, dim),
        "proj_out": (patch * patch * config["out_channels"], dim),
    }


def _check_backbone(
    header: Header, config: Mapping[str, int], layers: Mapping[str, tuple[int, ...]], cached: bool
) -> dict[str, Tensor]:
    """What is to be read of the backbone: all but the prompt's side, the positions and, where its layers are, what is
    cached of the modulation.
    """
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    if cached:
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        names = [f"transformer_blocks.{index}.{part}" for index in range(config["num_layers"]) for part in _PARTS]
        for name in (*names, "scale", "shift"):
            if name not in header.tensors or header.tensors[name].numel != dim:
                raise CheckpointError(
                    f"{header.file} has neither adaLN layers nor {dim} numbers in {name} that were cached of them; use"
                    " TinySR's published backbone."
                )
            expected[name] = header.tensors[name].shape
    found = {
        key: entry
        for key, entry in header.tensors.items()
        if key in expected or not (key == "pos_embed.pos_embed" or _CONTEXT.match(key) or _CACHED.fullmatch(key))
    }
    _check_weights(header, found, expected)
    return found


def _check_weights(header: Header, found: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]]) -> None:
    for key, shape in expected.items():
        if key not in found:
            raise CheckpointError(f"{header.file} lacks {key}, which its config.json asks for; download it again.")
        if found[key].shape != tuple(shape):
            raise CheckpointError(
                f"{found[key].file} has {key} of shape {found[key].shape}, but its config.json asks for"
                f" {tuple(shape)}; download it again."
            )
        if found[key].dtype not in FLOAT_TYPES.values():
            raise CheckpointError(
                f"{found[key].file} stores {key} as {found[key].dtype}, but float32, float16 or bfloat16 is expected;"
                " use the unquantised weights."
            )
    for key, entry in found.items():
        if key not in expected:
            raise CheckpointError(f"{entry.file} has {key}, for which its config.json has no place; download it again.")


def _check_lora(path: Path, layers: Mapping[str, tuple[int, ...]], cached: bool) -> tuple[LoraFile | None, int]:
    """The LoRA, checked against the layers it is for, and its rank; a cached backbone may come without."""
    if cached and not path.exists():
        return None, 0
    lora = parse_lora(read_header(path))
    # What is on the prompt's side goes with it.
    lora.halves = {module: keys for module, keys in lora.halves.items() if not _CONTEXT.match(module)}
    if lora.side == "vae":
        raise CheckpointError(f"{path} holds the LoRA of a VAE, but TinySR's is of its transformer; use TinySR's.")
    dropped = next((module for module in lora.halves if cached and _DROPPED.match(module)), None)
    if dropped is not None:
        raise CheckpointError(
            f"{path} changes {dropped}, of which the backbone holds only what was cached in a run; use TinySR's"
            " published backbone, where that layer still is."
        )
    # TSD-SR's has one on `proj_out`, TinySR's need not.
    rank = check_lora(
        lora,
        "transformer",
        {name: shape for name, shape in layers.items() if name != "proj_out" or name in lora.halves},
    )
    for module in layers:
        if module.endswith(tuple(f".{target}" for target in TARGETS)) and module not in lora.halves:
            raise CheckpointError(
                f"{path} lacks transformer.{module}.lora_A.weight and .lora_B.weight, which TinySR's has; download it"
                " again."
            )
    return lora, rank


def _pooled(folder: Path, width: int) -> torch.Tensor:
    """The pooled embedding of the one prompt, (1, width)."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is missing, but TinySR needs its pool_embeds.pt; download TinySR's dataset/default, or name a"
            " folder that holds it as embeddings."
        )
    path = find_embedding(folder, EMBEDDING_FILES["pooled_prompt_embeds"])
    pooled = load_embedding(path)
    if tuple(pooled.shape) != (1, width):
        raise CheckpointError(
            f"{path} has shape {tuple(pooled.shape)}, but the backbone asks for {(1, width)}; use TinySR's."
        )
    if not torch.isfinite(pooled).all():
        raise CheckpointError(f"{path} contains NaN or infinite values; download it again.")
    return pooled


def _positions(header: Header, file: Path, config: Mapping[str, int]) -> torch.Tensor:
    """A table of positions, (1, side * side, dim): SD3's whole one where the stored one is the middle of that.

    The release holds 32x32 patches, which only pictures of 512x512 fit.
    """
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    key = "pos_embed.pos_embed"
    if key in header.tensors:
        stored, source = _read({key: header.tensors[key]})[key], f"{header.tensors[key].file} has {key}"
    elif file.is_file():
        stored, source = load_embedding(file), f"{file} is"
    else:
        raise CheckpointError(
            f"{header.file} has no {key} and {file} is missing, but one of them must hold the table of positions;"
            " download TinySR's dataset/cache."
        )
    side = math.isqrt(stored.numel() // dim)
    if tuple(stored.shape) != (1, side * side, dim) or not side or not torch.isfinite(stored).all():
        raise CheckpointError(
            f"{source} of shape {tuple(stored.shape)}, but a table of positions is finite and (1, side * side, {dim});"
            " download it again."
        )
    if side >= _TABLE_SIDE:
        return stored
    # arXiv 2403.03206, section 5.3.2: patches of a 1024-pixel picture stand at 0 to 16, those around it beyond.
    places = (torch.arange(_TABLE_SIDE) - (_TABLE_SIDE - _PICTURE_SIDE) / 2) * (16 / _PICTURE_SIDE)
    line = get_1d_sincos_pos_embed_from_grid(dim // 2, places, output_type="pt").float()
    whole = torch.cat([line[None].expand(_TABLE_SIDE, -1, -1), line[:, None].expand(-1, _TABLE_SIDE, -1)], dim=-1)
    first = (_TABLE_SIDE - side) // 2
    middle = whole[first : first + side, first : first + side].flatten(0, 1)
    # What float16 rounds off is half of this.
    return whole.flatten(0, 1)[None] if (middle - stored[0].float()).abs().max() < 2**-10 else stored


def _check_vae(folder: Path) -> tuple[AutoencoderTiny, dict[str, Tensor]]:
    """The VAE without weights, its halves as their keys tell, and where its weights lie."""
    path = folder / "config.json"
    config = read_json(path, "the config of an AutoencoderTiny")
    if config.get("_class_name") != AutoencoderTiny.__name__:
        raise CheckpointError(
            f"{path} names a {config.get('_class_name')}, but TinySR's VAE is an AutoencoderTiny; use TinySR's release."
        )
    header = read_component_header(folder)
    settings = {name: config[name] for name in inspect.signature(AutoencoderTiny).parameters if name in config}
    separable = {
        f"separable_{half}": any(
            key.startswith(f"{half}.") and key.endswith(".depthwise.weight") for key in header.tensors
        )
        for half in ("encoder", "decoder")
    }
    try:
        with torch.device("meta"):
            vae = (
                AutoencoderTinySeparable(**settings, **separable)
                if any(separable.values())
                else AutoencoderTiny(**settings)
            )
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{path} does not describe a usable AutoencoderTiny; restore it.") from error
    _check_weights(header, header.tensors, {key: tensor.shape for key, tensor in vae.state_dict().items()})
    return vae, header.tensors


# --- the work -------------------------------------------------------------------------------------------------------


def _read(entries: Mapping[str, Tensor]) -> dict[str, torch.Tensor]:
    """Weights in the files' types."""
    found: dict[str, torch.Tensor] = {}
    for file in {entry.file for entry in entries.values()}:
        try:
            with safe_open(file, framework="pt", device="cpu") as weights:
                found |= {key: weights.get_tensor(key) for key, entry in entries.items() if entry.file == file}
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}); download it again.") from error
    for key, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{entries[key].file} contains NaN or infinite values in {key}; download it again.")
    return found


def _type_of(entries: Mapping[str, Tensor], dtype: str | None) -> torch.dtype:
    """What is asked for, or what most of the weights have."""
    return DTYPES[dtype] if dtype else getattr(torch, dtypes_of(entries.values())[0])


def _as_layers(state: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The cached modulation as layers of SD3 that give it whatever they read."""

    def constant(name: str, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        bias = torch.cat([state[key].flatten() for key in keys])
        return {f"{name}.weight": bias.new_zeros(len(bias), 1), f"{name}.bias": bias}

    made = constant("norm_out.linear", ("scale", "shift"))
    for index in range(count):
        block = f"transformer_blocks.{index}"
        made |= constant(f"{block}.norm1.linear", [f"{block}.{part}" for part in _PARTS])
    for name, width in (("timestep_embedder", 256), ("text_embedder", 1)):
        for layer, shape in (("linear_1", (1, width)), ("linear_2", (1, 1))):
            made[f"time_text_embed.{name}.{layer}.weight"] = torch.zeros(shape)
            made[f"time_text_embed.{name}.{layer}.bias"] = torch.zeros(1)
    return made
