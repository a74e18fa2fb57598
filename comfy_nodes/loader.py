"""The loader: the embedded model, pipeline folders, and the published LoRAs over an SD3 base."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..checkpoints import CheckpointError
from . import files
from .download import hub_folder, local_folder
from .schema import CATEGORY, Model, advanced

if TYPE_CHECKING:
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline

logger = logging.getLogger("tsdsr")

DTYPES = ["auto", "bf16", "fp16", "fp32", "fp8"]


class TSDSRLoader(io.ComfyNode):
    """A model for the upscalers, and what it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TSDSRLoader",
            display_name="TSD-SR Loader",
            category=CATEGORY,
            description="Loads a TSD-SR model: the small one that ships with the nodes, a pipeline folder, or the "
            "published LoRAs over Stable Diffusion 3.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[files.EMBEDDED, *(model.name for model in files.models())],
                    default=files.EMBEDDED,
                    tooltip="embedded: the small model that ships with the nodes. Others: folders under models/tsdsr "
                    "(pipelines, or the published transformer.safetensors and vae.safetensors) and such LoRA folders "
                    "under models/loras.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default="auto",
                    tooltip="Number format. auto: what the device computes in (fp32 on a CPU). fp8: the transformer is "
                    "stored in 8 bits and computes in auto's format, for half the memory.",
                ),
                io.Combo.Input(
                    "base_model",
                    options=[files.AUTOMATIC, *files.bases()],
                    default=files.AUTOMATIC,
                    optional=True,
                    tooltip="Stable Diffusion 3 medium, for LoRA models only: a checkpoint, a transformer, or a "
                    "diffusers folder. automatic: the first that is found.",
                ),
                io.Combo.Input(
                    "vae",
                    options=[files.AUTOMATIC, *files.vaes()],
                    default=files.AUTOMATIC,
                    optional=True,
                    tooltip="SD3's VAE, for LoRA models only. automatic: that of the base, or the first that is found.",
                ),
                advanced(
                    io.Boolean.Input(
                        "merge_lora",
                        default=False,
                        optional=True,
                        tooltip="Add the LoRA to the weights for good: a little faster, but lora_strength then has no "
                        "effect, and in fp8 small changes are rounded away.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "compile",
                        default=False,
                        optional=True,
                        tooltip="Compile the networks with torch.compile: the first picture takes minutes, further "
                        "ones of the same size may be faster. Goes on without where it does not work.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "hub_id",
                        default="",
                        optional=True,
                        placeholder="owner/name",
                        tooltip="A pipeline on the Hugging Face Hub instead of model. It lies in models/tsdsr once it "
                        "is downloaded.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "download",
                        default=False,
                        optional=True,
                        tooltip="Allow the download of hub_id, where it is not there yet. Nothing is ever fetched "
                        "without this. An interrupted download goes on where it stopped; HF_ENDPOINT and "
                        "HF_HUB_OFFLINE are respected.",
                    )
                ),
            ],
            outputs=[
                Model.Output(display_name="model", tooltip="For TSD-SR Upscale and TSD-SR Tiled Upscale."),
                io.String.Output(
                    display_name="info",
                    tooltip="What the model is: family, size, number format, and the licence of its base. Connect "
                    "Preview Any to read it.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, model=None, base_model=None, vae=None, hub_id=None) -> bool | str:
        # None where the input is linked: it is checked when the node runs.
        if hub_id and hub_id.strip():
            return True
        if model not in (None, files.EMBEDDED) and files.model_path(model) is None:
            return files.missing(model, "model")
        for name, what in ((base_model, "base model"), (vae, "vae")):
            if name not in (None, files.AUTOMATIC) and files.weights_path(name) is None:
                return files.missing(name, what)
        return True

    @classmethod
    def fingerprint_inputs(cls, model=None, base_model=None, vae=None, hub_id=None, **_: Any) -> Any:
        """Changes when a file of the model does, so that it is loaded anew."""
        if hub_id and hub_id.strip():
            return str(files.fingerprint([hub_folder(hub_id.strip(), files.home())]))
        if model in (None, files.EMBEDDED):
            return ""
        found = files.model_path(model)
        if found is None or not found.is_lora:
            return str(files.fingerprint([found.path] if found else []))
        try:
            parts = files.parts(found.path, base_model or files.AUTOMATIC, vae or files.AUTOMATIC)
        except CheckpointError as error:  # something is not there: told when the node runs
            return str(error)
        return str(files.fingerprint([found.path, *parts]))

    @classmethod
    def execute(
        cls,
        model,
        dtype,
        base_model=files.AUTOMATIC,
        vae=files.AUTOMATIC,
        merge_lora=False,
        compile=False,
        hub_id="",
        download=False,
    ) -> io.NodeOutput:
        import torch

        _drop_empty_torchvision()
        from .hosting import HostedModel, compiled_parts

        # The host runs nodes in inference mode; weights made in it could not be compiled or given adapters.
        with torch.inference_mode(False), torch.no_grad():
            compute = _compute_dtype(dtype)
            if hub_id.strip():
                found: files.Found | None = files.Found(
                    hub_id.strip(), local_folder(hub_id.strip(), files.home(), download), False
                )
            else:
                found = None if model == files.EMBEDDED else files.model_path(model)
                if found is None and model != files.EMBEDDED:
                    raise FileNotFoundError(files.missing(model, "model"))
            if found is None or not found.is_lora:
                pipeline, source = _load_folder(found.path if found else None, compute)
            else:
                pipeline, source = _load_lora(found.path, base_model, vae, compute, merge_lora)
            # What convolutions are fastest with.
            pipeline.vae.to(memory_format=torch.channels_last)
            if dtype == "fp8":
                _store_in_8_bits(pipeline, compute)
            if compile:
                # In place, so that the host moves the same modules; shapes change with every picture.
                for module in compiled_parts(pipeline):
                    module.compile(dynamic=True)
            info = _describe(found.name if found else files.EMBEDDED, source, pipeline, dtype)
            hosted = HostedModel(pipeline, info)
        logger.info("[tsdsr] Loaded:\n%s", info)
        return io.NodeOutput(hosted, info)


def _drop_empty_torchvision() -> None:
    """Headless hosts without torchvision leave an empty stand-in, which transformers would take for the real one."""
    stand_in = sys.modules.get("torchvision")
    if stand_in is not None and not hasattr(stand_in, "__file__") and "transformers" not in sys.modules:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def _compute_dtype(dtype: str) -> Any:
    """What the device computes in, as the host sees it, or what was asked for."""
    import torch
    from comfy import model_management

    from ..pipelines.loading import DTYPES as NAMED

    if dtype in NAMED:
        return NAMED[dtype]
    device = model_management.get_torch_device()
    if model_management.is_device_cpu(device):
        return torch.float32
    if model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if model_management.should_use_fp16(device) else torch.float32


def _load_folder(folder: Path | None, dtype: Any) -> tuple["TSDSRPipeline", dict[str, object]]:
    from ..checkpoints import describe
    from ..pipelines.loading import DTYPES as NAMED
    from ..pipelines.loading import EMBEDDED, load_pipeline

    path = folder or EMBEDDED
    source = describe(path)
    name = next(name for name, named in NAMED.items() if named == dtype)
    return load_pipeline(path, dtype=name, device="cpu"), source


def _load_lora(
    lora: Path, base_model: str, vae: str, dtype: Any, merge: bool
) -> tuple["TSDSRPipeline", dict[str, object]]:
    from ..checkpoints import assemble_tsdsr, describe
    from ..checkpoints.info import licence_name, licence_of

    base, vae_path, embeddings = files.parts(lora, base_model, vae)
    pipeline = assemble_tsdsr(base, vae_path, lora, embeddings, dtype=dtype, merge_lora=merge)
    licence = licence_name(licence_of(base if base.is_dir() else base.parent, dict(pipeline.transformer.config)))
    return pipeline, {**describe(lora), "licence": licence, "base": base, "vae": vae_path, "embeddings": embeddings}


def _store_in_8_bits(pipeline: "TSDSRPipeline", compute: Any) -> None:
    import torch
    from diffusers.hooks import apply_layerwise_casting

    # What is small and sensitive keeps its format: positions, embeddings of time and prompt, the last layers, LoRAs.
    # The modulation layers, which the model's own defaults leave out with all norms, are a third of SD3.
    kept: tuple[str, ...] = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "^proj_out$", "lora_")
    if pipeline.is_baked:
        kept = ("^proj_in$", "^proj_out$", "lora_")
    if pipeline.unet is not None:
        kept = ("time_embedding", "^conv_in$", "^conv_out$", "lora_")
    apply_layerwise_casting(pipeline.denoiser, torch.float8_e4m3fn, compute, skip_modules_pattern=kept)


def _describe(name: str, source: dict[str, object], pipeline: "TSDSRPipeline", dtype: str) -> str:
    def millions(module: Any) -> str:
        return f"{sum(weight.numel() for weight in module.parameters()) / 1e6:.1f} M"

    network = "transformer" if pipeline.unet is None else "UNet"
    compute = str(pipeline.denoiser.dtype).removeprefix("torch.")
    lines = {
        "model": name,
        "family": source["family"],
        "parameters": f"{network} {millions(pipeline.denoiser)}, VAE {millions(pipeline.vae)}",
        "number format": f"{compute}, {network} stored in float8_e4m3fn" if dtype == "fp8" else compute,
        "LoRA": f"rank {source['lora_rank']}" if source.get("lora_rank") else None,
        "licence": source["licence"],
        "folder": source["path"],
        "base": source.get("base"),
        "VAE": source.get("vae"),
        "embeddings": source.get("embeddings"),
    }
    return "\n".join(f"{key}: {value}" for key, value in lines.items() if value is not None)
