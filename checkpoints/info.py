"""What a model folder or file is, told from configs and headers alone."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from ..models.errors import CheckpointError
from ..models.headers import (
    Header,
    dtypes_of,
    foreign_content,
    read_component_header,
    read_header,
    read_json,
    require_real_content,
)
from ..models.licences import licence_name, licence_of
from .layout import EMBEDDING_FILES, EMBEDDING_SUFFIXES, LORA_FILES, LoraFile, parse_lora

EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "embedded"

# Written beside an unmerged pipeline by `convert_tsdsr(keep_lora=True)` and by diffusers' save_lora_weights.
_PIPELINE_LORA = "pytorch_lora_weights.safetensors"

_BAKED = "OneStepSD3Transformer2DModel"
_DENOISERS = {"transformer": ("SD3Transformer2DModel", _BAKED), "unet": ("UNet2DConditionModel",)}
_TINY_VAES = ("AutoencoderTiny", "AutoencoderTinySeparable")
_UNET_FAMILY = "TSD-SR on a UNet"

# The sine table of the transformer is stored but is not a parameter.
_CONSTANTS = ("pos_embed.pos_embed", "pos_embed", "column_positions", "row_positions", "positions")

_JOINT_BLOCK = re.compile(r"(?P<prefix>(?:model\.diffusion_model\.)?)joint_blocks\.(?P<index>\d+)\.")


def describe(model: str | Path) -> dict[str, object]:
    """Say what a folder or file is, offline and without loading a weight.

    Args:
        model: a pipeline folder, "embedded", a diffusers SD3 folder, a LoRA folder or file, an embeddings folder or
            file, or an SD3 single-file checkpoint.

    Returns:
        Always the same keys, None where one does not apply: path, kind, family, components (class or shape by name),
        parameters (count by component), dtype (most common first), size_bytes (on disk), latent_channels, vae_scale
        (pixels per latent), layers, width, heads, patch_size (of a transformer), lora_rank (a number, or by component
        where they differ), lora_targets (adapted layers by component), licence (of the base; "unknown" where not told).

    Raises:
        CheckpointError: one sentence on what it is not.
    """
    path = _EMBEDDED_FOLDER if str(model) == EMBEDDED else Path(model).expanduser()
    if path == _EMBEDDED_FOLDER and not (path / "model_index.json").is_file():
        raise CheckpointError("The embedded model is not part of this installation; install the package again.")
    if not path.exists():
        raise CheckpointError(
            f"{model} is not a local folder or file; give the path of one (models on the Hub must be downloaded first)."
        )
    found = _describe_folder(path) if path.is_dir() else _describe_file(path)
    return {
        **dict.fromkeys(
            (
                "path",
                "kind",
                "family",
                "components",
                "parameters",
                "dtype",
                "size_bytes",
                "latent_channels",
                "vae_scale",
                "layers",
                "width",
                "heads",
                "patch_size",
                "lora_rank",
                "lora_targets",
                "licence",
            )
        ),
        "path": str(path),
        "size_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else path.stat().st_size,
        **found,
    }


def _describe_folder(folder: Path) -> dict[str, object]:
    if (folder / "model_index.json").is_file() or (folder / "transformer" / "config.json").is_file():
        return _describe_pipeline(folder)
    if any((folder / name).is_file() for name in LORA_FILES.values()):
        missing = [name for name in LORA_FILES.values() if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} looks like a published TSD-SR LoRA folder but lacks {missing[0]}; download the missing file."
            )
        sides = {side: parse_lora(read_header(folder / name)) for side, name in LORA_FILES.items()}
        for side, lora in sides.items():
            if lora.side != side:
                raise CheckpointError(
                    f"{lora.header.file} does not hold the LoRA that its name promises (found keys of"
                    f" {lora.side or 'no known network'}, expected {side}); check whether the two files are swapped."
                )
        return {"kind": "published TSD-SR LoRA folder", "family": "TSD-SR on SD3", **_lora_fields(sides)}
    if (folder / _PIPELINE_LORA).is_file():
        return _describe_lora(read_header(folder / _PIPELINE_LORA))
    embeddings = {
        stem: file
        for stem in EMBEDDING_FILES.values()
        for suffix in reversed(EMBEDDING_SUFFIXES)
        if (file := folder / f"{stem}{suffix}").is_file()
    }
    if embeddings:
        missing = [stem for stem in EMBEDDING_FILES.values() if stem not in embeddings]
        if missing:
            raise CheckpointError(
                f"{folder} looks like a TSD-SR embeddings folder but lacks {missing[0]}.pt; download the missing file."
            )
        return {"kind": "TSD-SR embeddings folder", **_embedding_fields(embeddings)}
    raise CheckpointError(
        f"{folder} is no model folder (neither a pipeline nor a published LoRA nor embeddings); name the folder that"
        " holds model_index.json, transformer.safetensors or prompt_embeds.pt."
    )


def _describe_file(path: Path) -> dict[str, object]:
    found = foreign_content(path)
    if found:
        raise CheckpointError(f"{path} is {found}, not a model; download it again.")
    if path.suffix == ".pt":
        return {"kind": "TSD-SR embedding file", **_embedding_fields({path.stem: path})}
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is neither a .safetensors file nor a .pt embedding; name a model folder or one of these files."
        )
    header = read_header(path)
    if any(".lora_" in key for key in header.tensors):
        return _describe_lora(header)
    if any(_JOINT_BLOCK.match(key) for key in header.tensors):
        return _describe_single_file(header)
    if len(header.tensors) == 1 and path.stem in EMBEDDING_FILES.values():
        return {"kind": "TSD-SR embedding file", **_embedding_fields({path.stem: path})}
    raise CheckpointError(
        f"{path} is a safetensors file but neither a LoRA of SD3 nor an SD3 single file nor an embedding; name the"
        " folder of the model it belongs to."
    )


def _describe_pipeline(folder: Path) -> dict[str, object]:
    """A TSD-SR pipeline folder or a plain SD3 folder, which may lack model_index.json."""
    index_path = folder / "model_index.json"
    index = read_json(index_path, "the index of a diffusers pipeline") if index_path.is_file() else {}
    pipeline = index.get("_class_name")
    ours = pipeline == "TSDSRPipeline"
    if not ours and pipeline is not None and not str(pipeline).startswith("StableDiffusion3"):
        raise CheckpointError(f"{folder} is a {pipeline}, neither a TSD-SR nor an SD3 pipeline; name one of these.")
    # Components are named in model_index.json as [library, class]; absent optional ones as [null, null].
    classes = {
        name: entry[1]
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    }
    network = "unet" if ours and "unet" in classes else "transformer"
    denoiser = _read_config(folder, network, _DENOISERS[network])
    vae = _read_config(folder, "vae", ("AutoencoderKL", *_TINY_VAES))
    # For figures that only transformers have.
    transformer = denoiser if network == "transformer" else {}
    headers = {name: read_component_header(folder / name) for name in (network, "vae")}
    if ours and "prompt_embeddings" in classes:
        headers["prompt_embeddings"] = read_component_header(folder / "prompt_embeddings")

    fields: dict[str, object] = {
        "kind": "TSD-SR pipeline folder" if ours else "diffusers SD3 folder",
        "family": _family(folder, ours, network, denoiser, vae),
        "components": classes or {network: denoiser["_class_name"], "vae": vae["_class_name"]},
        "parameters": {name: _parameters(header) for name, header in headers.items()},
        "dtype": _dtypes(headers.values()),
        "latent_channels": denoiser.get("in_channels"),
        "vae_scale": _vae_scale(vae),
        "layers": transformer.get("num_layers"),
        "width": transformer.get("num_attention_heads", 0) * transformer.get("attention_head_dim", 0) or None,
        "heads": transformer.get("num_attention_heads"),
        "patch_size": transformer.get("patch_size"),
        "licence": licence_name(licence_of(folder, transformer)),
    }
    if ours and (folder / _PIPELINE_LORA).is_file():
        lora = _lora_fields(_split_sides(read_header(folder / _PIPELINE_LORA)))
        fields["kind"] = "TSD-SR pipeline folder, LoRA kept beside the base"
        fields["lora_rank"], fields["lora_targets"] = lora["lora_rank"], lora["lora_targets"]
    return fields


def _family(folder: Path, ours: bool, network: str, denoiser: dict, vae: dict) -> str:
    if not ours:
        return "SD3"
    if network == "unet":
        return _UNET_FAMILY
    if denoiser.get("text_stream") == "none":
        return "TinySR"
    if folder.resolve() == _EMBEDDED_FOLDER:
        family = "embedded small model"
    else:
        family = "small TSD-SR model" if vae["_class_name"] in _TINY_VAES else "TSD-SR on SD3"
    return family + (", baked" if denoiser["_class_name"] == _BAKED else "")


def _read_config(folder: Path, name: str, expected: tuple[str, ...]) -> dict:
    path = folder / name / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so {folder} is no whole model; download the missing part.")
    config = read_json(path, f"the config of the {name}")
    if config.get("_class_name") not in expected:
        raise CheckpointError(
            f"{path} names a {config.get('_class_name')}, where {' or '.join(expected)} was expected; name a TSD-SR or"
            " an SD3 model."
        )
    return config


def _vae_scale(config: dict) -> int | None:
    """Pixels per latent: AutoencoderKL and AutoencoderTiny both halve the picture once per block after the first."""
    blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels")
    return 2 ** (len(blocks) - 1) if blocks else None


def _parameters(header: Header) -> int:
    return sum(tensor.numel for key, tensor in header.tensors.items() if key not in _CONSTANTS)


def _dtypes(headers: Iterable[Header]) -> str:
    return ", ".join(dtypes_of(tensor for header in headers for tensor in header.tensors.values()))


def _split_sides(header: Header) -> dict[str, LoraFile]:
    """The sides of a LoRA file in diffusers' layout (`transformer.*` or `unet.*`, and `vae.*`)."""
    sides = {side: parse_lora(header, prefix=side) for side in (*_DENOISERS, "vae")}
    return {side: lora for side, lora in sides.items() if lora.halves}


def _describe_lora(header: Header) -> dict[str, object]:
    """One LoRA file: published (its keys all begin with `transformer.`) or diffusers' own."""
    sides = _split_sides(header)
    if "vae" in sides:
        family = _UNET_FAMILY if "unet" in sides else "TSD-SR on SD3"
        return {"kind": "TSD-SR LoRA file, diffusers layout", "family": family, **_lora_fields(sides)}
    lora = sides.get("transformer")
    if lora is None or lora.side is None:
        raise CheckpointError(
            f"{header.file} is a LoRA, but not of an SD3 transformer or VAE (first key {next(iter(header.tensors))});"
            " name a TSD-SR LoRA."
        )
    network = "transformer" if lora.side == "transformer" else "VAE"
    return {
        "kind": f"published TSD-SR LoRA file, {network} side",
        "family": "TSD-SR on SD3",
        **_lora_fields({lora.side: lora}),
    }


def _lora_fields(sides: dict[str, LoraFile]) -> dict[str, object]:
    ranks = {side: lora.rank for side, lora in sides.items()}
    used = {
        side: [lora.header.tensors[key] for keys in lora.halves.values() for key in keys.values()]
        for side, lora in sides.items()
    }
    return {
        "components": dict.fromkeys(sides, "LoRA"),
        "parameters": {side: sum(tensor.numel for tensor in tensors) for side, tensors in used.items()},
        "dtype": _dtypes({lora.header.file: lora.header for lora in sides.values()}.values()),
        "lora_rank": next(iter(ranks.values())) if len(set(ranks.values())) == 1 else ranks,
        "lora_targets": {side: len(lora.halves) for side, lora in sides.items()},
        "licence": "unknown",
    }


def _describe_single_file(header: Header) -> dict[str, object]:
    """An SD3 checkpoint in Stability AI's own layout: MMDiT, and VAE and text encoders where they are packed in."""
    blocks = [match for key in header.tensors if (match := _JOINT_BLOCK.match(key))]
    prefix = blocks[0]["prefix"]
    patch = header.tensors.get(f"{prefix}x_embedder.proj.weight")
    if patch is None or len(patch.shape) != 4:
        raise CheckpointError(
            f"{header.file} has SD3 blocks but no {prefix}x_embedder.proj.weight; download the whole checkpoint again."
        )
    width, channels, patch_size = patch.shape[0], patch.shape[1], patch.shape[2]
    # The transformer last: without a prefix of its own it takes every key that is left.
    packed = {"vae": "first_stage_model.", "text_encoders": "text_encoders.", "transformer": prefix}
    parameters: dict[str, int] = {}
    for key, tensor in header.tensors.items():
        for name, start in packed.items():
            if key.startswith(start) and key.removeprefix(start) not in _CONSTANTS:
                parameters[name] = parameters.get(name, 0) + tensor.numel
                break
    config = {
        "num_layers": 1 + max(int(match["index"]) for match in blocks),
        # SD3 heads are 64 wide in all released sizes.
        "num_attention_heads": width // 64,
        "attention_head_dim": 64,
        "qk_norm": any(".attn.ln_q." in key for key in header.tensors) or None,
    }
    classes = {"transformer": "MMDiT", "vae": "AutoencoderKL", "text_encoders": "CLIP-L, CLIP-G, T5"}
    return {
        "kind": "SD3 single-file checkpoint",
        "family": "SD3",
        "components": {name: classes[name] for name in parameters},
        "parameters": parameters,
        "dtype": _dtypes([header]),
        "latent_channels": channels,
        "vae_scale": 8 if "vae" in parameters else None,
        "layers": config["num_layers"],
        "width": width,
        "heads": config["num_attention_heads"],
        "patch_size": patch_size,
        "licence": licence_name(licence_of(header.file.parent, config)),
    }


def _embedding_fields(files: dict[str, Path]) -> dict[str, object]:
    shapes: dict[str, tuple[int, ...]] = {}
    types: list[str] = []
    for name, path in files.items():
        if path.suffix == ".safetensors":
            header = read_header(path)
            if len(header.tensors) != 1:
                raise CheckpointError(
                    f"{path} holds {len(header.tensors)} tensors, but one embedding was expected; use the published"
                    " file."
                )
            tensor = next(iter(header.tensors.values()))
            shapes[name], dtype = tensor.shape, tensor.dtype
        else:
            shapes[name], dtype = _pt_header(path)
        if dtype not in types:
            types.append(dtype)
    return {
        "family": "TSD-SR on SD3",
        "components": {name: f"embedding {shape}" for name, shape in shapes.items()},
        "parameters": {name: math.prod(shape) for name, shape in shapes.items()},
        "dtype": ", ".join(types),
        "licence": "unknown",
    }


def _pt_header(path: Path) -> tuple[tuple[int, ...], str]:
    """Shape and type of a tensor saved by torch.save; torch is loaded for these alone."""
    import torch

    require_real_content(path, "a tensor saved by torch.save")
    try:
        tensor = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # broken bytes lead to errors of any kind, from IndexError to struct.error
        raise CheckpointError(
            f"{path} is no tensor saved by torch.save, which an embedding is; download it again."
        ) from error
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{path} holds a {type(tensor).__name__}, but an embedding is one tensor; use the published file."
        )
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
