"""The model card (README.md) of a converted, trained or pushed model."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCardData, metadata_load, metadata_save
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..models.licences import licence_name

PAPER = "[arXiv 2411.18263](https://arxiv.org/abs/2411.18263)"
PROMPT_FACT = "Prompt: fixed, stored as embeddings in `prompt_embeddings/`; no text encoder is needed"
BAKED_FACT = "Prompt and timestep: baked into the transformer, which takes no others; LoRAs go into the original"
# For models that come without a fixed prompt.
PROMPT = "a sharp, detailed photograph"

_PICTURE = re.compile(r"!\[[^\]]*\]\(\s*<?([^\s)>]+)|<img[^>]*?\ssrc=[\"']([^\"']+)")
_FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def front_matter(licence: dict[str, str], base_model: str | None = None, lora: bool = False) -> dict[str, Any]:
    """What the YAML block at the top of a card says, under the Hub's names.

    Args:
        licence: fields as `licence_of` returns them.
        base_model: Hub id of the base, where it has one.
        lora: whether the repository holds a LoRA alone.
    """
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["super-resolution", "image-upscaling", "one-step", "tsd-sr", *(["lora"] if lora else [])],
        base_model=base_model,
        **licence,
    ).to_dict()


def base_fact(base_model: str | None, name: str) -> str:
    """One fact: the base by its Hub id, with a link, or by the name of its folder."""
    shown = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{name}`"
    return f"Base model: {shown}"


def lora_fact(ranks: dict[str, int], where: str = "") -> str:
    """One fact: the rank of each component's LoRA."""
    ranks_text = " and ".join(f"{rank} ({component})" for component, rank in ranks.items())
    return f"LoRA: rank {ranks_text}{where}"


LORA_BESIDE = ", kept apart in `pytorch_lora_weights.safetensors`: load it as below, or the base runs bare"


def usage(
    place: str,
    *,
    base: str | None = None,
    subfolder: str = "",
    prompt_embeddings: bool = True,
    lora: bool = False,
    variant: str | None = None,
    scale: int = 4,
    with_code: bool = False,
) -> str:
    """Code that upscales `photo.jpg` with a model, as Markdown.

    Args:
        place: the model's Hub id or folder.
        base: Hub id or folder of the base of a LoRA; None where `place` is a whole pipeline.
        subfolder: of `place`, where a LoRA lies.
        prompt_embeddings: whether the model has them; a LoRA's replace the base's, a pipeline without needs a prompt.
        lora: whether a LoRA lies beside the pipeline's weights.
        variant: which weights, where there are no others.
        scale: the factor.
        with_code: whether the repository carries the pipeline's code, and so runs without `tsdsr`.
    """
    prompt = "" if prompt_embeddings or base else f', prompt="{PROMPT}"'
    of_lora = f', subfolder="{subfolder}"' if subfolder else ""
    of_variant = f', variant="{variant}"' if variant else ""
    load_lora = f'pipe.load_lora_weights("{place}"{of_lora})\n' if lora or base else ""
    run = f'pipe(Image.open("photo.jpg"), upscale={scale}{prompt}).images[0].save("photo_x{scale}.png")'
    imported, load_prompt, of_prompt = "TSDSRPipeline", "", ""
    if base and prompt_embeddings:
        inside = f"{subfolder}/prompt_embeddings".lstrip("/")
        imported = "PromptEmbeddings, TSDSRPipeline"
        load_prompt = f'prompt = PromptEmbeddings.from_pretrained("{place}", subfolder="{inside}")\n'
        of_prompt = ", prompt_embeddings=prompt"
    code = f"""```python
from PIL import Image
from tsdsr import {imported}

{load_prompt}pipe = TSDSRPipeline.from_pretrained("{base or place}"{of_prompt}{of_variant})
{load_lora}{run}
```"""
    if with_code:
        code += f"""

Without `tsdsr`, with the code in this repository (read it before you trust it):

```python
from diffusers import DiffusionPipeline
from PIL import Image

pipe = DiffusionPipeline.from_pretrained("{place}"{of_variant}, trust_remote_code=True)
{load_lora}{run}
```"""
    return code


def results(metrics: dict[str, Any], where: str | None = None) -> str:
    """A Markdown table of a run's metrics, {"student": {name: value}, "bicubic": ..., "start": ...}; "" without any."""
    if not metrics.get("student"):
        return ""
    names = list(metrics["student"])
    rows = [
        f"| {label} | "
        + " | ".join(f"{metrics[row][name]:.4g}" if name in metrics[row] else "" for name in names)
        + " |"
        for label, row in (("bicubic", "bicubic"), ("before training", "start"), ("**this model**", "student"))
        if metrics.get(row)
    ]
    heads = " | ".join(name.upper().replace("_", "-") for name in names)
    table = "\n".join([f"| | {heads} |", "|" + " --- |" * (len(names) + 1), *rows])
    return f"On {where}:\n\n{table}" if where else table


def training(
    settings: dict[str, Any],
    recipe: str = "recipe.yaml",
    module: str = "tsdsr.training.distill",
    more: Iterable[str] = (),
) -> str:
    """The command of a run and its settings as a recipe, as Markdown; `more` are arguments that no recipe holds."""
    command = ["accelerate", "launch", "-m", module, "--config", recipe, *more]
    if settings.get("train_data_dir"):
        command += ["--train_data_dir", "PHOTOGRAPHS"]
    return f"""```sh
{shlex.join(command)} --output_dir OUTPUT
```

The settings, as a recipe:

```yaml
{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```"""


def write_card(
    folder: Path,
    title: str,
    about: str,
    facts: Iterable[str],
    use: str,
    data: dict[str, Any],
    unlicensed: str = "The licence of the base model could not be told from its files; check it before passing these "
    "weights on.",
    pictures: str = "",
    results: str = "",
    training: str = "",
) -> None:
    """Write a whole README.md into `folder`. Sections without content are left out.

    Args:
        folder: where it is written.
        title: the first heading.
        about: what the model is, one paragraph.
        facts: one line each.
        use, pictures, results, training: Markdown.
        data: the front matter; the section on the licence follows from its licence fields.
        unlicensed: what that section says where there are none.
    """
    licence = {key: value for key, value in data.items() if key.startswith("license")}
    if licence:
        unlicensed = f"The base model's licence, **{licence_name(licence)}**, applies to these weights as well."
    sections = {"Use": use, "Results": results, "Training": training, "Licence": unlicensed}
    blocks = [f"# {title}", about, pictures, "\n".join(f"* {fact}" for fact in facts)]
    blocks += [f"## {heading}\n\n{content}" for heading, content in sections.items() if content]
    path = folder / "README.md"
    path.write_text("\n" + "\n\n".join(block for block in blocks if block) + "\n", encoding="utf-8")
    metadata_save(path, data)


def complete_card(path: Path, place: str, data: dict[str, Any], use: str, pictures: str = "") -> None:
    """Add to a card what it lacks; whatever its author says stays, except for a "Use" section that leads elsewhere.

    Args:
        path: the README.md, changed in place.
        place: the Hub id the model gets. A section "Use" whose code names it in quotes is kept.
        data: front matter for the fields that the card does not state.
        use: content of the section "Use".
        pictures: Markdown that goes below the title.

    Raises:
        ValueError: if its front matter is no YAML mapping.
    """
    try:
        stated = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The front matter of {path.name} is not a YAML mapping; correct it.") from error
    text = path.read_text(encoding="utf-8-sig").rstrip("\n") + "\n"
    start = match.end() if (match := REGEX_YAML_BLOCK.search(text)) else 0
    lines = text[start:].splitlines(keepends=True)
    heads = _headings(lines)
    begin = next((line for line in heads if re.fullmatch(r"## Us(e|age)\s*", lines[line], re.IGNORECASE)), None)
    if begin is None:
        # Before the first section, so that it is found where the title and the first paragraph end.
        begin = end = next((line for line in heads if lines[line].startswith("## ")), len(lines))
    else:
        end = next((line for line in heads if line > begin), len(lines))
    section = "".join(lines[begin:end])
    if not re.search(rf"[\"'`]{re.escape(place)}[\"'`]", section):
        before = "" if begin == 0 or not lines[begin - 1].strip() else "\n"
        lines[begin:end] = [f"{before}## Use\n\n{use}\n" + ("\n" if end < len(lines) else "")]
    if pictures:
        title = next((line for line in heads if line < begin and lines[line].startswith("# ")), -1)
        follows = "" if not "".join(lines[title + 1 : title + 2]).strip() else "\n"
        lines.insert(title + 1, f"\n{pictures}\n{follows}")
    path.write_text(text[:start] + "".join(lines), encoding="utf-8")
    if missing := {key: value for key, value in data.items() if key not in stated}:
        metadata_save(path, {**stated, **missing})


def shown_pictures(card: Path) -> list[str]:
    """The pictures that a card shows, as it names them: paths in the repository and addresses, badges left out."""
    found = [unquote(first or second) for first, second in _PICTURE.findall(card.read_text(encoding="utf-8-sig"))]
    return [name for name in found if name.split("?")[0].lower().endswith(_FORMATS)]


def _headings(lines: list[str]) -> list[int]:
    """Numbers of the lines that are headings of the first two levels, those in code left out."""
    found, fence = [], ""
    for number, line in enumerate(lines):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if fence:
            if mark and mark[1].startswith(fence):
                fence = ""
        elif mark:
            fence = mark[1]
        elif re.match(r"##? ", line):
            found.append(number)
    return found
