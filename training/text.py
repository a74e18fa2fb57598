"""Captions to embeddings, with the text encoders of a base."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModel, CLIPTokenizer

from .families import Prompt

TextEncoder = Callable[[list[str]], Prompt]


def load_text_encoder(
    name: str, revision: str | None = None, variant: str | None = None, device: torch.device | str = "cpu"
) -> TextEncoder | None:
    """A function from captions to their embeddings (B, tokens, width) and, for SD3, pooled ones (B, pooled width);
    float32.

    Args:
        name: diffusers folder or Hub id of an SD3 or SD2 base.
        revision, variant: of a Hub id.
        device: where the encoders run.

    Returns:
        None if the base holds no text encoders.
    """
    index = DiffusionPipeline.load_config(name, revision=revision)
    present = {part for part, entry in index.items() if isinstance(entry, list | tuple) and entry[0]}
    if {"text_encoder", "tokenizer"} - present:
        return None
    where: dict[str, Any] = {"revision": revision}
    if "unet" in present:
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **where)
        encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", variant=variant, **where)
        encoder.to(device, torch.float32)

        @torch.no_grad()
        def encode_sd2(captions: list[str]) -> Prompt:
            tokens = tokenizer(
                captions,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            return encoder(tokens.to(device))[0], None

        return encode_sd2
    parts = {f"{kind}{suffix}" for kind in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")}
    absent: dict[str, Any] = dict.fromkeys(parts - present)
    # Without T5 its tokens are zeros as wide as the transformer asks for; of that only the config is needed.
    transformer = None
    if "text_encoder_3" not in present:
        with init_empty_weights():
            settings = SD3Transformer2DModel.load_config(name, subfolder="transformer", **where)
            transformer = SD3Transformer2DModel.from_config(settings)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        name,
        transformer=transformer,
        vae=None,
        variant=variant,
        # T5 is 19 GB in float32, and overflows in float16.
        dtype={"text_encoder_3": torch.bfloat16, "default": torch.float32},
        **absent,
        **where,
    )
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        if encoder is not None:
            encoder.to(device)

    @torch.no_grad()
    def encode_sd3(captions: list[str]) -> Prompt:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=captions, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, device=device
        )
        return embeds.float(), pooled.float()

    return encode_sd3
