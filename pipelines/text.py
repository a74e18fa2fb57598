"""Prompts to embeddings, with the text encoders of a base."""

import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from torch import Tensor

from ..models.prompt_embeddings import PromptEmbeddings
from .loading import find_model
from .pipeline_tsdsr import TSDSRPipeline

# Embeddings (B or 1, tokens, width), and SD3's pooled ones (B or 1, pooled width).
Prompt = tuple[Tensor, Tensor | None]
TextEncoder = Callable[[list[str]], Prompt]

_PARTS = [
    name
    for name in signature(TSDSRPipeline).parameters
    if name not in ("use_shift_factor", "timestep", "grain", "degrid")
]
# T5 is 19 GB in float32, and overflows in float16.
_DTYPES = {"text_encoder_3": torch.bfloat16, "default": torch.float32}


class TruncatedPromptWarning(UserWarning):
    """A prompt is longer than a text encoder reads."""


class NoTextEncoders(ValueError):
    """A base without the text encoders of SD3 or SD2."""


class _WhileItRuns:
    """A text encoder that is in memory only while it runs. `encode_prompt` calls each once, one after the other."""

    def __init__(self, load: Callable[[], torch.nn.Module], dtype: torch.dtype):
        self.load, self.dtype = load, dtype

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.load()(*inputs, **options)


def load_text_encoder(
    name: str, revision: str | None = None, variant: str | None = None, device: torch.device | str = "cpu"
) -> TextEncoder | None:
    """A function from captions to their embeddings (B, tokens, width) and, for SD3, pooled ones (B, pooled width);
    float32.

    Args:
        name: diffusers folder or Hub id of an SD3 or SD2 base.
        revision, variant: of a Hub id.
        device: where the encoders run. All of them stay in memory for as long as the function does.

    Returns:
        None if the base holds no text encoders.
    """
    try:
        pipeline = _load(name, revision, variant, device)
    except NoTextEncoders:
        return None
    return lambda captions: _encode(pipeline, captions, device)


def embed_prompt(
    prompt: str,
    base: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int = 256,
) -> PromptEmbeddings:
    """Embed one prompt, for `TSDSRPipeline.from_pretrained(..., prompt_embeddings=...)`.

    The same as `encode_prompt` of diffusers' own SD3 and SD2 pipelines, with CLIP in float32 and T5 in bfloat16. The
    text encoders are loaded one at a time: T5-XXL alone takes 9.5 GB.

    Args:
        prompt: may be empty.
        base: diffusers folder or Hub id of an SD3 or SD2 base. Without T5 an SD3 base gives zeros in its place.
        revision, variant: of the base's files; `variant="fp16"` reads the smaller ones where a base has both.
        device: where the encoders run.
        dtype: of the result, which is on the CPU.
        max_sequence_length: how many tokens T5 reads; 256 with CLIP's 77 are the published 333.

    Returns:
        `prompt_embeds` (1, 77 + max_sequence_length, width) and `pooled_prompt_embeds` (1, pooled width); for SD2
        (1, 77, width) and (1, 0).

    Warns:
        TruncatedPromptWarning: for every text encoder that does not read the whole prompt, with what is cut.

    Raises:
        NoTextEncoders: a ValueError that names what the base lacks.
        OSError: if files are missing.
    """
    pipeline = _load(find_model(base)[0], revision, variant, device, one_at_a_time=True)
    for reader, tokenizer, limit in (
        ("CLIP", pipeline.tokenizer, pipeline.tokenizer_max_length),
        ("T5", pipeline.tokenizer_3, max_sequence_length),
    ):
        # The last token is the end's, which stays.
        cut = [] if tokenizer is None else tokenizer(prompt).input_ids[limit - 1 : -1]
        if cut:
            text = tokenizer.decode(cut, skip_special_tokens=True)
            message = f"{reader} reads {limit} tokens and not the end of the prompt: {text}"
            warnings.warn(message, TruncatedPromptWarning, stacklevel=2)
    options = {} if pipeline.text_encoder_2 is None else {"max_sequence_length": max_sequence_length}
    embeds, pooled = _encode(pipeline, [prompt], device, **options)
    return PromptEmbeddings.from_tensors(embeds.to("cpu", dtype), None if pooled is None else pooled.to("cpu", dtype))


@torch.no_grad()
def _encode(pipeline: TSDSRPipeline, prompts: list[str], device: torch.device | str, **options: Any) -> Prompt:
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False, **options)
    return embeds.float(), None if pooled is None else pooled.float()


def _load(
    name: str, revision: str | None, variant: str | None, device: torch.device | str, one_at_a_time: bool = False
) -> TSDSRPipeline:
    """A pipeline of a base's tokenizers and text encoders; `one_at_a_time` loads those when they are called."""
    where: dict[str, Any] = {"revision": revision, "local_files_only": Path(name).exists()}
    index = TSDSRPipeline.load_config(name, **where)
    present = {part: entry[1] for part, entry in index.items() if isinstance(entry, list | tuple) and entry[0]}
    suffixes = {""}
    if present.get("transformer") == "SD3Transformer2DModel":
        suffixes |= {"_2", *(["_3"] if {"text_encoder_3", "tokenizer_3"} & present.keys() else [])}
    elif present.get("transformer") == "OneStepSD3Transformer2DModel":
        raise NoTextEncoders(f"{name} is baked, so it reads no prompts: name the model that it was made of.")
    elif "unet" not in present or "text_encoder_2" in present:
        raise NoTextEncoders(f"{name} is neither an SD3 nor an SD2 model, whose text encoders are needed.")
    encoders, tokenizers = (
        [f"{kind}{suffix}" for suffix in sorted(suffixes)] for kind in ("text_encoder", "tokenizer")
    )
    absent = [part for part in (*encoders, *tokenizers) if part not in present]
    if absent:
        raise NoTextEncoders(f"{name} has no {absent[0]}, so it embeds no prompts: name a base with text encoders.")

    def load(*wanted: str, **given: Any) -> TSDSRPipeline:
        others = dict.fromkeys(part for part in _PARTS if part not in wanted)
        return TSDSRPipeline.from_pretrained(name, variant=variant, dtype=_DTYPES, **{**others, **given}, **where)

    def load_one(part: str) -> torch.nn.Module:
        return getattr(load(part), part).to(device)

    transformer = None
    if "unet" not in present and "text_encoder_3" not in present:
        # Without T5 its tokens are zeros as wide as the transformer asks for; of that only the config is needed.
        with init_empty_weights():
            settings = SD3Transformer2DModel.load_config(name, subfolder="transformer", **where)
            transformer = SD3Transformer2DModel.from_config(settings)
    later = encoders if one_at_a_time and len(encoders) > 1 else []
    pipeline = load(*tokenizers, *(set(encoders) - set(later)), transformer=transformer)
    for part in encoders:
        if part in later:
            setattr(pipeline, part, _WhileItRuns(partial(load_one, part), _DTYPES.get(part, _DTYPES["default"])))
        else:
            getattr(pipeline, part).to(device)
    return pipeline
