"""A model with everything worked out that does not depend on the picture, as a pipeline folder."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..models.errors import CheckpointError
from ..models.headers import dtypes_of, read_component_header
from ..models.licences import known_base, licence_of
from ..pipelines import model_card
from ..pipelines.folders import whole_folder
from .output import check_output


def bake_model(
    model: str | Path,
    output: str | Path,
    *,
    lora: Sequence[str | Path] = (),
    fidelity: float | None = None,
    prompt_embeddings: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `TSDSRPipeline.bake` makes of a model as a pipeline folder of its own.

    LoRAs are added and everything is worked out in float32 or more before it is rounded to `dtype`. `output` appears
    whole or not at all. A model that is baked already is written again, which changes its number format at most.

    Args:
        model: "embedded", a pipeline folder, or a Hub id.
        output: folder to write.
        lora: local folders or files of LoRAs that are added to the weights.
        fidelity: the mix of two LoRAs, 0..1.
        prompt_embeddings: folder of a saved `PromptEmbeddings` in place of the model's own.
        dtype: fp32, fp16 or bf16 for everything that is saved; None for the transformer's own.
        overwrite: replace a pipeline folder that is there.

    Returns:
        The path of the pipeline folder.

    Raises:
        CheckpointError: one sentence on what cannot be baked, read or written.
        ValueError: for what the model cannot be loaded with.
        OSError: for a Hub id that cannot be found or reached.
    """
    from ..pipelines.loading import DTYPES, find_model, load_pipeline
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline

    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype} is not known; use {', '.join(DTYPES)}.")
    output = Path(output).expanduser().resolve()
    name, local = find_model(model)
    source = Path(name if local else TSDSRPipeline.download(name))
    check_output(output, overwrite, [Path(path) for path in (source, prompt_embeddings, *lora) if path is not None])
    if not (source / "transformer").is_dir():
        raise CheckpointError(f"{model} has no transformer, and nothing else can be baked; name a model on SD3.")
    stored = dtypes_of(read_component_header(source / "transformer").tensors.values())[0]
    target = DTYPES[dtype] if dtype else getattr(torch, stored)
    pipeline = load_pipeline(source, lora=lora, prompt_embeddings=prompt_embeddings, dtype="fp32", device="cpu")
    if fidelity is not None:
        pipeline.mix_adapters(fidelity)
    config = dict(pipeline.transformer.config)
    if not pipeline.is_baked:
        pipeline.bake(dtype=target)
    pipeline.to(dtype=target)
    with whole_folder(output) as folder:
        pipeline.save_pretrained(folder)
        model_card.write_card(
            folder,
            output.name,
            f"One-step diffusion upscaler for photographs, of TSD-SR's family ({model_card.PAPER}), with everything\n"
            "worked out that does not depend on the picture.",
            [model_card.base_fact(known_base(config), source.name), model_card.BAKED_FACT],
            model_card.usage(output.name),
            model_card.front_matter(licence_of(source, config), known_base(config)),
        )
    return output
