"""From the name of a model to a pipeline that is ready to run."""

import os
from pathlib import Path

import torch

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


def load_pipeline(model: str | Path = "embedded", *, dtype: str | None = None, device: str = "auto") -> TSDSRPipeline:
    """A pipeline on its device.

    Args:
        model: "embedded" for the model that ships with the package, a pipeline folder, or a Hub id. A LoRA file
            beside `model_index.json` is loaded too.
        dtype: "fp32", "fp16", "bf16", or "auto" (also None): fp32 on a CPU, else bf16 where the device computes in
            it, else fp16.
        device: "auto", or a torch device such as "cpu", "cuda:1", "mps".

    Raises:
        ValueError: for an unknown dtype, an absent device, or a folder that is not a pipeline.
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

    source = EMBEDDED if model == "embedded" else Path(model)
    local = source.exists()
    if local and not (source / "model_index.json").is_file():
        raise ValueError(
            f"{source} is not a pipeline folder (it has no model_index.json); `tsdsr convert` makes one of published"
            " weights."
        )
    if not local and (model == "embedded" or Path(model).is_absolute() or str(model).startswith((".", "~"))):
        raise ValueError(f"The model folder {source} does not exist; check the path or use --model embedded.")
    if not local and not _is_hub_id(str(model)):
        raise ValueError(f"{str(model)!r} is neither a folder nor a Hub id of the form owner/name.")
    pipeline = TSDSRPipeline.from_pretrained(str(source) if local else str(model), dtype=chosen, local_files_only=local)
    if local and (source / LORA_FILE).is_file():
        pipeline.load_lora_weights(str(source), weight_name=LORA_FILE, local_files_only=True)
    prefer_channels_last(pipeline.vae, target)
    return pipeline.to(target)


def prefer_channels_last(vae: torch.nn.Module, device: torch.device) -> None:
    """Lay the weights of a VAE out for faster convolutions, where that costs no accuracy.

    The CPU's group normalisation sums naively over channels-last pictures: at 512x512 its error is about 1e-4 of the
    range, a hundred times that of the other layout. A VAE without group normalisation has nothing to lose there.
    """
    grouped = any(isinstance(module, torch.nn.GroupNorm) for module in vae.modules())
    if device.type != "cpu" or (not grouped and next(vae.parameters()).dtype == torch.float32):
        vae.to(memory_format=torch.channels_last)


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and os.sep * 2 not in name
