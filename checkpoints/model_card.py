"""The README.md of a converted pipeline, and what is known about the licence of its base."""

from pathlib import Path
from typing import Any

import yaml

# (layers, width, query-key norm) of the SD3 transformers that Stability AI released, all under one licence -> its name.
_STABILITY_BASES = {
    (24, 1536, False): "stabilityai/stable-diffusion-3-medium-diffusers",
    (24, 1536, True): "stabilityai/stable-diffusion-3.5-medium",
    (38, 2432, True): "stabilityai/stable-diffusion-3.5-large",
}
_STABILITY_LICENCE = "stabilityai-ai-community"


def read_front_matter(folder: Path) -> dict[str, object]:
    """The YAML block at the top of a folder's README.md; empty where there is none or it cannot be read."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def known_base(transformer_config: dict) -> str | None:
    """The Hub name of the Stability AI model that has a transformer of this size, or None."""
    width = transformer_config.get("num_attention_heads", 0) * transformer_config.get("attention_head_dim", 0)
    size: Any = (transformer_config.get("num_layers"), width, bool(transformer_config.get("qk_norm")))
    return _STABILITY_BASES.get(size)


def licence_of(folder: Path, transformer_config: dict) -> dict[str, str]:
    """Licence fields of a base model under their model-card names; empty where nothing is known.

    What the folder's own README.md states comes first, then the licence known for SD3 transformers of this size.
    """
    stated = read_front_matter(folder)
    fields = {
        key: str(stated[key]) for key in ("license", "license_name", "license_link") if isinstance(stated.get(key), str)
    }
    if fields:
        return fields
    base = known_base(transformer_config)
    if base:
        home = base.removesuffix("-diffusers")
        return {
            "license": "other",
            "license_name": _STABILITY_LICENCE,
            "license_link": f"https://huggingface.co/{home}/blob/main/LICENSE.md",
        }
    return {}


def licence_name(fields: dict[str, str]) -> str:
    """One name for licence fields as `licence_of` returns them: the custom one, the identifier, or "unknown"."""
    return fields.get("license_name") or fields.get("license") or "unknown"


def write_model_card(
    folder: Path, name: str, base: Path, transformer_config: dict, ranks: dict[str, int], keep_lora: bool
) -> None:
    """Write README.md for a converted pipeline into `folder`.

    Args:
        folder: the pipeline folder.
        name: its final name, for the title and the usage snippet.
        base: the SD3 folder it was made from; only its name and licence are mentioned, never its place.
        transformer_config: config.json of the base's transformer.
        ranks: LoRA rank per component.
        keep_lora: whether the LoRA lies beside unmerged weights.
    """
    from huggingface_hub import ModelCard, ModelCardData

    licence = licence_of(base, transformer_config)
    base_name = known_base(transformer_config)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["super-resolution", "image-upscaling", "one-step", "tsd-sr"],
        base_model=base_name,
        **licence,
    )
    rank_text = " and ".join(f"{rank} ({component})" for component, rank in ranks.items())
    lora_text = (
        "kept apart in `pytorch_lora_weights.safetensors`: load it as below, or the base runs bare"
        if keep_lora
        else "merged into the weights in float32"
    )
    load_lora = f'pipe.load_lora_weights("{name}")\n' if keep_lora else ""
    licence_text = (
        f"The base model's licence, **{licence_name(licence)}**, applies to these weights as well."
        if licence
        else "The licence of the base model could not be told from its files; check it before passing these weights on."
    )
    content = f"""---
{data.to_yaml()}
---

# {name}

One-step diffusion upscaler for photographs: TSD-SR ([arXiv 2411.18263](https://arxiv.org/abs/2411.18263), CVPR 2025) as
a diffusers pipeline.

* Base model: {f"[{base_name}](https://huggingface.co/{base_name})" if base_name else f"`{base.name}`"}
* LoRA: rank {rank_text}, {lora_text}
* Prompt: fixed, stored as embeddings in `prompt_embeddings/`; no text encoder is needed

## Use

```python
from PIL import Image
from tsdsr import TSDSRPipeline

pipe = TSDSRPipeline.from_pretrained("{name}")
{load_lora}pipe(Image.open("photo.jpg"), upscale=4).images[0].save("photo_x4.png")
```

## Licence

{licence_text}
"""
    ModelCard(content).save(folder / "README.md")
