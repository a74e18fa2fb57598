"""The published TSD-SR weights over an SD3 base, as a pipeline in memory: nothing is written.

`convert_tsdsr` makes a folder of the same parts once and for all; here they stay the files a user already has.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel

from ..models import single_file
from ..models.errors import CheckpointError
from ..models.prompt_embeddings import PromptEmbeddings
from .convert import check_embeddings, check_loras, load_lora, lora_delta

ADAPTER = "tsdsr"


def assemble_tsdsr(
    transformer: str | Path,
    vae: str | Path,
    lora: str | Path,
    embeddings: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    merge_lora: bool = True,
) -> Any:
    """A `TSDSRPipeline` on the CPU.

    Args:
        transformer: an SD3 single file (Stability AI's layout or diffusers' keys), or a diffusers SD3 folder.
        vae: the same for its VAE; may be the same path.
        lora: folder with the published transformer.safetensors and vae.safetensors.
        embeddings: folder with prompt_embeds and pool_embeds, .pt or .safetensors.
        dtype: of all weights.
        merge_lora: add the LoRA to the weights (in float32, before the cast), or keep it as the adapter "tsdsr", whose
            strength `set_adapters` changes.

    Raises:
        CheckpointError: one sentence on the first flaw found.
    """
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline

    transformer, vae, lora, embeddings = (Path(path).expanduser() for path in (transformer, vae, lora, embeddings))
    # In float32 only as long as something is added to the weights.
    networks = {
        "transformer": _load(SD3Transformer2DModel, "transformer", transformer, dtype),
        "vae": _load(AutoencoderKL, "vae", vae, dtype),
    }
    channels = networks["vae"].config.latent_channels, networks["transformer"].config.in_channels
    if channels[0] != channels[1]:
        raise CheckpointError(
            f"{vae} has {channels[0]} latent channels and {transformer} {channels[1]}, but the two must agree; use the "
            "VAE and the transformer of one SD3 model."
        )
    _, files = check_loras(lora, networks)
    prompt = check_embeddings(embeddings, networks["transformer"].config)
    loras = {side: load_lora(file) for side, file in files.items()}
    if merge_lora:
        for side, network in networks.items():
            for module, pair in loras[side].items():
                weight = network.get_submodule(module).weight
                weight.data = (weight.data.float() + lora_delta(*pair)).to(dtype)
    pipeline = TSDSRPipeline(
        **networks,
        scheduler=single_file.make_scheduler(),
        prompt_embeddings=PromptEmbeddings.from_tensors(*(tensor.to(dtype) for tensor in prompt)),
    )
    if not merge_lora:
        pipeline.load_lora_weights(
            {
                f"{side}.{module}.lora_{half}.weight": tensor.to(dtype)
                for side, modules in loras.items()
                for module, pair in modules.items()
                for half, tensor in zip("AB", pair, strict=True)
            },
            adapter_name=ADAPTER,
        )
    return pipeline


def _load(cls: Any, side: str, path: Path, dtype: torch.dtype) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path} is missing where the {side} of SD3 was expected; correct the path.")
    if path.is_file():
        return (single_file.load_transformer if side == "transformer" else single_file.load_vae)(path, dtype)
    if not (path / side / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no {side}/config.json, but a diffusers SD3 folder was expected; name one, or a single file."
        )
    try:
        model = cls.from_pretrained(path, subfolder=side, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path / side} cannot be loaded ({str(error).splitlines()[0]}); download it again."
        ) from error
    return model.requires_grad_(False).eval()
