"""Published TSD-SR weights -> one folder for `TSDSRPipeline.from_pretrained`."""

import json
import pickle
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..models.errors import CheckpointError
from ..models.headers import (
    FLOAT_TYPES,
    Header,
    dtypes_of,
    read_component_header,
    read_header,
    read_json,
    require_real_content,
)
from ..models.licences import known_base, licence_of
from ..models.prompt_embeddings import PromptEmbeddings
from ..pipelines import model_card
from ..pipelines.folders import whole_folder
from .layout import (
    EMBEDDING_FILES,
    LORA_FILES,
    SIDE_NAMES,
    LoraFile,
    check_lora,
    find_embedding,
    parse_lora,
)
from .output import check_output

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

_CLASSES = {"transformer": SD3Transformer2DModel, "vae": AutoencoderKL}


@dataclass
class _Component:
    """A network of the base that has passed its checks: the empty model (weights on meta) and where its weights lie."""

    side: str
    folder: Path
    config: dict
    header: Header
    model: torch.nn.Module

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, dtypes_of(self.header.tensors.values())[0])


def convert_tsdsr(
    base: str | Path,
    lora: str | Path,
    embeddings: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    keep_lora: bool = False,
    overwrite: bool = False,
) -> Path:
    """Turn the published TSD-SR layout into a pipeline folder.

    Everything is checked from configs, headers and the (small) LoRA before a weight of the base is read. `output`
    appears whole or not at all.

    Args:
        base: diffusers SD3 folder (transformer/, vae/, scheduler/; one file, fp16 variant or shards). Text encoders in
            it are ignored.
        lora: folder with transformer.safetensors and vae.safetensors, keys `transformer.<module>.lora_{A,B}.weight`.
        embeddings: folder with prompt_embeds.pt (1, tokens, width) and pool_embeds.pt (1, pooled width), or the same
            names as .safetensors.
        output: folder to write.
        dtype: float32, float16 or bfloat16 (fp32, fp16, bf16) for everything saved; None keeps the base's own types.
        keep_lora: leave the base unmerged and write the LoRA beside it as pytorch_lora_weights.safetensors, keys
            `transformer.*` and `vae.*`, for `pipe.load_lora_weights(output)`.
        overwrite: replace a pipeline folder that is there; it goes only once the new one is whole.

    Returns:
        The path of the pipeline folder.

    Raises:
        CheckpointError: one sentence on the first flaw found.

    Source: `Microtreei/TSD-SR`, test/test_tsdsr.py (layout, alpha = rank).
    """
    base, lora, embeddings = (Path(path).expanduser() for path in (base, lora, embeddings))
    # Resolved, so that a link is followed to the folder that is to be replaced.
    output = Path(output).expanduser().resolve()
    if dtype is not None and dtype not in _DTYPES:
        raise CheckpointError(f"dtype {dtype} is not known; use float32, float16 or bfloat16.")
    target = _DTYPES[dtype] if dtype else None
    check_output(output, overwrite, (base, lora, embeddings))
    for folder, role in ((base, "base model"), (lora, "LoRA"), (embeddings, "embeddings")):
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder, but the {role} must be a local one; correct the path.")

    components = _check_base(base)
    ranks, loras = check_loras(lora, {side: component.model for side, component in components.items()})
    prompt = check_embeddings(embeddings, components["transformer"].model.config)
    deltas = {side: load_lora(loras[side]) for side in components}

    # Here, because the pipeline imports transformers: a flaw above is reported without that wait.
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline

    with whole_folder(output) as folder:
        networks = {
            side: _load_network(component, {} if keep_lora else deltas[side], target)
            for side, component in components.items()
        }
        prompt_dtype = target or components["transformer"].dtype
        pipeline = TSDSRPipeline(
            **networks,
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(base / "scheduler", local_files_only=True),
            prompt_embeddings=PromptEmbeddings.from_tensors(*(tensor.to(prompt_dtype) for tensor in prompt)),
        )
        pipeline.save_pretrained(folder)
        if keep_lora:
            _save_lora(folder / LORA_WEIGHT_NAME_SAFE, deltas, ranks, target)
        config = components["transformer"].config
        kept = model_card.LORA_BESIDE if keep_lora else ", merged into the weights in float32"
        model_card.write_card(
            folder,
            output.name,
            f"One-step diffusion upscaler for photographs: TSD-SR ({model_card.PAPER}, CVPR 2025) as\n"
            "a diffusers pipeline.",
            [
                # Of the base's folder only the name, never its place.
                model_card.base_fact(known_base(config), base.name),
                model_card.lora_fact(ranks, kept),
                model_card.PROMPT_FACT,
            ],
            model_card.usage(output.name, lora=keep_lora),
            model_card.front_matter(licence_of(base, config), known_base(config)),
        )
    return output


# --- checks, before any weight of the base is read ------------------------------------------------------------------


def _check_base(base: Path) -> dict[str, _Component]:
    """Configs and weight headers of the base, against the networks those configs describe."""
    if (base / "model_index.json").is_file():
        found = read_json(base / "model_index.json", "the index of a diffusers pipeline").get("_class_name")
        if found == "TSDSRPipeline":
            raise CheckpointError(
                f"{base} is already a TSD-SR pipeline, but the base must be a plain SD3 model; use it as it is."
            )
        if not str(found).startswith("StableDiffusion3"):
            raise CheckpointError(
                f"{base / 'model_index.json'} names a {found}, but the base must be a StableDiffusion3Pipeline; use an"
                " SD3-medium folder in diffusers format."
            )
    components = {}
    for side, model_class in _CLASSES.items():
        config = _read_config(base / side / "config.json", model_class.__name__)
        components[side] = _check_network(side, base / side, config, read_component_header(base / side))
    _read_config(base / "scheduler" / "scheduler_config.json", FlowMatchEulerDiscreteScheduler.__name__)

    channels = {
        "vae": components["vae"].model.config.latent_channels,
        "transformer": components["transformer"].model.config.in_channels,
    }
    if channels["vae"] != channels["transformer"]:
        raise CheckpointError(
            f"{base} has a VAE with {channels['vae']} latent channels and a transformer with"
            f" {channels['transformer']}, but the two must agree; use both folders of one SD3 model."
        )
    return components


def _read_config(path: Path, class_name: str) -> dict:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, but the base must be a diffusers SD3 folder with transformer/, vae/ and scheduler/;"
            " correct the path or download the whole model."
        )
    config = read_json(path, f"the config of a {class_name}")
    if config.get("_class_name") != class_name:
        raise CheckpointError(
            f"{path} names a {config.get('_class_name')}, but the base must have a {class_name}; use an SD3-medium"
            " folder in diffusers format."
        )
    return config


def _check_network(side: str, folder: Path, config: dict, header: Header) -> _Component:
    try:
        # Parameters on the meta device cost nothing; buffers stay real, as not all of them are in the file.
        with init_empty_weights(include_buffers=False):
            model = _CLASSES[side].from_config(config)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a usable {_CLASSES[side].__name__}; restore the original file."
        ) from error
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key, shape in expected.items():
        if key not in header.tensors:
            raise CheckpointError(
                f"{header.file} lacks {key}, which its config.json asks for; download the base again."
            )
        tensor = header.tensors[key]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file} has {key} of shape {tensor.shape}, but its config.json asks for {shape}; download the"
                " base again."
            )
        if tensor.dtype not in FLOAT_TYPES.values():
            raise CheckpointError(
                f"{tensor.file} stores {key} as {tensor.dtype}, but float32, float16 or bfloat16 is expected; use the"
                " unquantised base."
            )
    for key, tensor in header.tensors.items():
        if key not in expected:
            raise CheckpointError(
                f"{tensor.file} has {key}, for which its config.json has no place; download the base again."
            )
    return _Component(side, folder, config, header, model)


def check_loras(folder: Path, networks: dict[str, Any]) -> tuple[dict[str, int], dict[str, LoraFile]]:
    """Both published LoRA files against the networks they are for: the rank and the parsed header of each side.

    Raises:
        CheckpointError: one sentence on the first flaw found.
    """
    paths = {side: folder / name for side, name in LORA_FILES.items()}
    for path in paths.values():
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, but the LoRA folder must hold transformer.safetensors and vae.safetensors;"
                " download the published files or correct the path."
            )
    loras = {side: parse_lora(read_header(path)) for side, path in paths.items()}
    found = {side: lora.side for side, lora in loras.items()}
    if found == {"transformer": "vae", "vae": "transformer"}:
        raise CheckpointError(
            f"{paths['transformer']} and {paths['vae'].name} are swapped (the first has the VAE's keys, the second the"
            " transformer's); exchange their names."
        )
    for side, other in found.items():
        if other not in (None, side):
            raise CheckpointError(
                f"{paths[side]} holds the LoRA of {SIDE_NAMES[other]}, but that of {SIDE_NAMES[side]} was expected; put"
                f" the published {LORA_FILES[side]} there."
            )
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {
        side: {name: tuple(m.weight.shape) for name, m in network.named_modules() if isinstance(m, kinds)}
        for side, network in networks.items()
    }
    return {side: check_lora(lora, side, layers[side]) for side, lora in loras.items()}, loras


def check_embeddings(folder: Path, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt's embeddings, (1, tokens, joint_attention_dim) and (1, pooled_projection_dim).

    Raises:
        CheckpointError: one sentence on the first flaw found.
    """
    paths = {name: find_embedding(folder, stem) for name, stem in EMBEDDING_FILES.items()}
    tensors = {name: load_embedding(path) for name, path in paths.items()}
    prompt_path, pooled_path = paths["prompt_embeds"], paths["pooled_prompt_embeds"]
    prompt, pooled = tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]
    if prompt.ndim == 2 and pooled.ndim == 3:
        raise CheckpointError(
            f"{prompt_path} and {pooled_path.name} are swapped (shapes {tuple(prompt.shape)} and"
            f" {tuple(pooled.shape)}); exchange their names."
        )
    joint, pooled_width = config["joint_attention_dim"], config["pooled_projection_dim"]
    for path, tensor, rank, width, shape in (
        (prompt_path, prompt, 3, joint, f"(1, tokens, {joint})"),
        (pooled_path, pooled, 2, pooled_width, f"(1, {pooled_width})"),
    ):
        if tensor.ndim != rank or tensor.shape[0] != 1 or tensor.shape[-1] != width or not tensor.numel():
            raise CheckpointError(
                f"{path} has shape {tuple(tensor.shape)}, but the base's transformer asks for {shape}; use the"
                " embeddings made for this base."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} contains NaN or infinite values; download it again.")
    return prompt, pooled


def load_embedding(path: Path) -> torch.Tensor:
    if path.suffix == ".safetensors":
        header = read_header(path)
        if len(header.tensors) != 1:
            raise CheckpointError(
                f"{path} holds {len(header.tensors)} tensors, but one embedding was expected; use the published file."
            )
        try:
            tensor = next(iter(load_file(path).values()))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged ({error}); download it again.") from error
    else:
        require_real_content(path, "a tensor saved by torch.save")
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch reports garbage and forbidden code alike; only real pickles can ask for code.
            code = path.read_bytes()[:2] in (b"PK", b"\x80\x02")
            found = "needs pickle code to load, which is never run" if code else "is no file of torch.save"
            raise CheckpointError(
                f"{path} {found}, but a plain tensor was expected; use the published file."
            ) from error
        except Exception as error:  # broken bytes lead to errors of any kind, from IndexError to struct.error
            raise CheckpointError(f"{path} is damaged or no file of torch.save; download it again.") from error
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{path} holds a {type(tensor).__name__}, but a tensor was expected; use the published file."
        )
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{path} holds {str(tensor.dtype).removeprefix('torch.')} values, but floating-point ones were expected;"
            " use the published file."
        )
    return tensor


# --- the work -------------------------------------------------------------------------------------------------------


def load_lora(lora: LoraFile) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(lora_A, lora_B) by module, in the file's type.

    Raises:
        CheckpointError: if a value is NaN or infinite, or the file cannot be read after all.
    """
    path = lora.header.file
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again.") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path} contains NaN or infinite values in {key}; download it again.")
    return {module: (tensors[keys["A"]], tensors[keys["B"]]) for module, keys in lora.halves.items()}


def lora_delta(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What a LoRA adds to a weight, in float32: B A at strength alpha / rank = 1.

    For a convolution lora_B is 1x1, so its kernel is B A for every kernel position as well:
    (out, rank, 1, 1) and (rank, in, kh, kw) -> (out, in, kh, kw).
    """
    return (up.flatten(1).float() @ down.flatten(1).float()).reshape(up.shape[0], *down.shape[1:])


def _load_network(
    component: _Component, lora: dict[str, tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype | None
) -> torch.nn.Module:
    """Fill the empty network from its files, merging and casting each weight as it comes: no second copy is held.

    Raises:
        CheckpointError: if a merged weight does not fit the type it is saved in.
    """
    state: dict[str, torch.Tensor] = {}
    # One type for the whole network, as diffusers has it, even where a file mixes them.
    dtype = dtype or component.dtype
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for key, entry in component.header.tensors.items():
            try:
                if entry.file not in files:
                    files[entry.file] = stack.enter_context(safe_open(entry.file, framework="pt", device="cpu"))
                weight = files[entry.file].get_tensor(key)
            except SafetensorError as error:
                raise CheckpointError(f"{entry.file} is damaged ({error}); download it again.") from error
            module = key.removesuffix(".weight")
            if module in lora and module != key:
                weight = weight.float() + lora_delta(*lora[module])
            weight = weight.to(dtype)
            if not torch.isfinite(weight).all():
                name = str(dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"{entry.file} has a weight {key} that is NaN or infinite in {name}; use float32 or bfloat16, or"
                    " download the base again."
                )
            state[key] = weight
    model = component.model
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _save_lora(
    path: Path,
    loras: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]],
    ranks: dict[str, int],
    dtype: torch.dtype | None,
) -> None:
    """Write both LoRAs as diffusers does: keys `<component>.<module>.lora_A.weight`, the peft config in the header."""
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, object] = {}
    for component, lora in loras.items():
        for module, pair in lora.items():
            for half, tensor in zip("AB", pair, strict=True):
                tensors[f"{component}.{module}.lora_{half}.weight"] = tensor.to(dtype or tensor.dtype)
        config[f"{component}.r"] = ranks[component]
        config[f"{component}.lora_alpha"] = ranks[component]
        # Full names: "conv1" alone would reach the frozen decoder too.
        config[f"{component}.target_modules"] = sorted(lora)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    save_file(tensors, path, metadata=metadata)
