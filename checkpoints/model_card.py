"""The README.md of a converted pipeline."""

from pathlib import Path

from ..models.licences import known_base, licence_name, licence_of


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
