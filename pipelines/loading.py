"""From the name of a model to a pipeline that is ready to run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.prompt_embeddings import PromptEmbeddings
from .pipeline_tsdsr import TSDSRPipeline

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"
LORA_FILE = "pytorch_lora_weights.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(device: str = "auto") -> torch.device:
    """The named device; for "auto" CUDA (and ROCm), else MPS, else the CPU.

    Raises:
        ValueError: if the device is not on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} is not available here; use auto, cpu, cuda or mps.") from error
    return chosen


def load_pipeline(
    model: str | Path = "embedded",
    *,
    prompt_embeddings: str | Path | None = None,
    lora: Sequence[str | Path] = (),
    dtype: str | None = None,
    device: str = "auto",
) -> TSDSRPipeline:
    """A pipeline on its device.

    Args:
        model: "embedded" for the model that ships with the package, a pipeline folder, or a Hub id. A LoRA file
            beside `model_index.json` is loaded too.
        prompt_embeddings: folder of a saved `PromptEmbeddings` (`tsdsr embed` writes one) in place of the model's own.
        lora: local folders or files of LoRAs, in the published layout or ours; of two, the first is for realism, the
            second for fidelity, which the call's `fidelity` mixes.
        dtype: "fp32", "fp16", "bf16", or "auto" (also None): fp32 on a CPU, else bf16 where the device computes in
            it, else fp16.
        device: "auto", or a torch device such as "cpu", "cuda:1", "mps".

    Raises:
        ValueError: for an unknown dtype, an absent device, a folder that is not a pipeline, a prompt that is none or
            of other widths than the model's, or a LoRA that is none.
        OSError: for a Hub id that cannot be found or reached.
    """
    target = choose_device(device)
    if dtype in (None, "auto"):
        if target.type == "cpu":
            chosen = torch.float32
        elif target.type == "cuda":
            chosen = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        else:
            chosen = torch.float16
    elif dtype in DTYPES:
        chosen = DTYPES[dtype]
    else:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}.")

    name, local = find_model(model)
    components = {}
    if prompt_embeddings is not None:
        if not holds_prompt(prompt_embeddings):
            raise ValueError(f"{prompt_embeddings} holds no prompt embeddings; `tsdsr embed` makes such a folder.")
        components["prompt_embeddings"] = PromptEmbeddings.from_pretrained(
            prompt_embeddings, dtype=chosen, local_files_only=True
        )
    pipeline = TSDSRPipeline.from_pretrained(name, dtype=chosen, local_files_only=local, **components)
    if prompt_embeddings is not None:
        _check_widths(pipeline, prompt_embeddings)
    if local and Path(name, LORA_FILE).is_file():
        pipeline.load_lora_weights(name, weight_name=LORA_FILE, local_files_only=True)
    for number, source in enumerate(lora):
        if not Path(source).exists():
            raise ValueError(f"The LoRA {source} does not exist; check the path.")
        name = f"lora_{number}"
        try:
            pipeline.load_lora_weights(str(source), adapter_name=name, local_files_only=True)
            found = any(name in adapters for adapters in pipeline.get_list_adapters().values())
        except (ValueError, RuntimeError):  # other keys, other layers, other shapes
            found = False
        if not found:
            raise ValueError(f"{source} holds no LoRA for this model; name one that was made for its base.")
    # What convolutions are fastest with.
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline.to(target)


def find_model(model: str | Path) -> tuple[str, bool]:
    """A pipeline folder or Hub id for the name of a model, and whether it is a folder.

    Raises:
        ValueError: for a folder that does not exist or holds no pipeline, and for what cannot be a Hub id.
    """
    source = EMBEDDED if model == "embedded" else Path(model)
    if source.exists():
        if not (source / "model_index.json").is_file():
            raise ValueError(
                f"{source} is not a pipeline folder (it has no model_index.json); `tsdsr convert` makes one of"
                " published weights."
            )
        return str(source), True
    if model == "embedded" or Path(model).is_absolute() or str(model).startswith((".", "~")):
        raise ValueError(f"The model folder {source} does not exist; check the path, or name `embedded`.")
    if not _is_hub_id(str(model)):
        raise ValueError(f"{str(model)!r} is neither a folder nor a Hub id of the form owner/name.")
    return str(model), False


def holds_prompt(folder: str | Path) -> bool:
    """Whether a folder is that of a saved `PromptEmbeddings`.

    Raises:
        OSError: if its config.json cannot be read.
    """
    if not Path(folder, PromptEmbeddings.config_name).is_file():
        return False
    return PromptEmbeddings.load_config(folder).get("_class_name") == PromptEmbeddings.__name__


def _check_widths(pipeline: TSDSRPipeline, folder: str | Path) -> None:
    networks: Any = pipeline
    settings, found = networks.denoiser.config, networks.prompt_embeddings.config
    wanted = (
        settings.get("joint_attention_dim") or settings.cross_attention_dim,
        settings.get("pooled_projection_dim", 0),
    )
    if (found.embed_dim, found.pooled_embed_dim) != wanted:
        raise ValueError(
            f"{folder} holds tokens of {found.embed_dim} numbers and pooled ones of {found.pooled_embed_dim}, but"
            f" this model takes {wanted[0]} and {wanted[1]}; embed the prompt with the base that the model was made of."
        )


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and os.sep * 2 not in name
