"""A pipeline from one SD3 checkpoint file."""

import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import torch
from huggingface_hub import hf_hub_download
from transformers import CLIPTokenizer, T5TokenizerFast

from ..models.errors import CheckpointError
from ..models.headers import read_header
from ..models.single_file import (
    TEXT_ENCODERS,
    holds,
    load_text_encoder,
    load_transformer,
    load_vae,
    make_scheduler,
)

if TYPE_CHECKING:
    from .pipeline_tsdsr import TSDSRPipeline

_LINK = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)/(?:blob|resolve)/(?P<revision>[^/]+)/(?P<file>[^?]+)"
)
_TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast}


def from_single_file(
    cls: "type[TSDSRPipeline]",
    pretrained_model_link_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    config: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    proxies: dict[str, str] | None = None,
    **components: Any,
) -> "TSDSRPipeline":
    """A pipeline from an SD3 safetensors file, such as sd3_medium.safetensors. Only a link is ever fetched.

    What a config would say is read off the weights, so no other file is needed. The fixed prompt is in none of these
    files: pass `prompt_embeddings`, or call the pipeline with `prompt_embeds` or `prompt`.

    Args:
        cls: the class of the pipeline.
        pretrained_model_link_or_path: a file, or a link such as
            https://huggingface.co/owner/name/blob/main/file.safetensors. Keys are Stability AI's or diffusers', the
            transformer's with or without `model.diffusion_model.`. Weights in 8 bits are cast.
        dtype: of all weights that are loaded, by default float32; or by component, as in
            `{"vae": torch.float32, "default": torch.bfloat16}`.
        torch_dtype: the same under its former name.
        config: a local diffusers folder of SD3, whose tokenizers are used (tokenizer/, tokenizer_2/, tokenizer_3/). A
            text encoder of the file is loaded only where its tokenizer is found there or passed: without one it would
            be gigabytes of no use.
        cache_dir, revision, token, local_files_only, force_download, proxies: of the download, as in diffusers.
        components: a component of the pipeline (`vae`, `transformer`, `scheduler`, `prompt_embeddings`,
            `text_encoder`, `tokenizer`, ...) in place of the file's, None for none; and settings (`use_shift_factor`,
            `timestep`, `grain`, `degrid`).

    Raises:
        CheckpointError: a ValueError; if the file is no whole SD3, or lacks a network that was not passed.
        ValueError: for a link or a `config` that is none.
        TypeError: for arguments it does not know, and a `dtype` that is none.
        OSError: for a link that cannot be fetched.
    """
    known = inspect.signature(cls.__init__).parameters.keys() - {"self", "unet"}
    unknown = [name for name in components if name not in known]
    if unknown:
        raise TypeError(f"from_single_file takes no {', '.join(f'`{name}`' for name in unknown)}.")
    chosen = torch_dtype if dtype is None else dtype
    dtypes = chosen if isinstance(chosen, dict) else {} if chosen is None else {"default": chosen}
    for value in dtypes.values():
        if not isinstance(value, torch.dtype):
            raise TypeError(f"`dtype` must be a torch.dtype or a dictionary of them by component, not {value!r}.")
    if config is not None and not os.path.isdir(config):
        raise ValueError(f"`config` must be a local diffusers folder with tokenizers, but {config} is not a folder.")

    def dtype_of(name: str) -> torch.dtype:
        return dtypes.get(name, dtypes.get("default", torch.float32))

    source = os.fspath(pretrained_model_link_or_path).removesuffix("?download=true")
    if source.lower().endswith(".gguf"):
        raise CheckpointError(
            f"{source} is a GGUF file, which holds a transformer alone; load it with"
            " SD3Transformer2DModel.from_single_file(..., quantization_config=GGUFQuantizationConfig(...)) and pass it"
            " here as transformer= with a safetensors file that holds the VAE."
        )
    if link := _LINK.fullmatch(source):
        # Not passed where there are none, because newer versions of huggingface_hub take none.
        more = {} if proxies is None else {"proxies": proxies}
        source = hf_hub_download(
            link["repo"],
            unquote(link["file"]),
            revision=revision or unquote(link["revision"]),
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            **more,
        )
    elif "://" in source:
        raise ValueError(
            f"{source} is no link to a file on the Hub; use one like"
            " https://huggingface.co/owner/name/blob/main/file.safetensors."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a single file; load it with {cls.__name__}.from_pretrained.")
    held = holds(read_header(path))
    if "transformer" in held and "vae" not in held and "vae" not in components:
        raise CheckpointError(
            f"{path} holds an SD3 transformer but no VAE; pass one, such as vae=AutoencoderKL.from_pretrained("
            '"stabilityai/stable-diffusion-3-medium-diffusers", subfolder="vae").'
        )

    modules: dict[str, Any] = {"scheduler": make_scheduler(), **components}
    for name, tokenizer in zip(TEXT_ENCODERS, _TOKENIZERS, strict=True):
        has_encoder = modules[name] is not None if name in modules else name in held
        if has_encoder and tokenizer not in modules and config is not None and Path(config, tokenizer).is_dir():
            modules[tokenizer] = _TOKENIZERS[tokenizer].from_pretrained(
                config, subfolder=tokenizer, local_files_only=True
            )
        if has_encoder and name not in modules and modules.get(tokenizer) is not None:
            modules[name] = load_text_encoder(path, name, dtype_of(name))
    if "transformer" not in modules:
        modules["transformer"] = load_transformer(path, dtype_of("transformer"))
    if "vae" not in modules:
        modules["vae"] = load_vae(path, dtype_of("vae"))
    return cls(**modules)
