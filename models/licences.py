"""Whose licence a base's weights are under, as its model card says it or as its size gives it away."""

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
    if "num_layers" not in transformer_config:  # a UNet
        return None
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
