"""What each memory mode of the pipeline needs, how long it takes, and what it changes.

python -m tsdsr.benchmarks.memory
python -m tsdsr.benchmarks.memory --model embedded --modes fp32 bf16 gguf_q8_0

One picture of 128x128 is enlarged to 512x512 by each mode in a process of its own. Without --model the networks are of
SD3-medium's size with random weights, made once in --folder, which needs up to 20 GB. Memory is what torch allocates on
a GPU, and on the CPU (Linux) the process's resident memory beyond what it was after the imports, mapped files included:
the peak while the pipeline is loaded, the peak of the call, and what is held after it. Times (on the CPU those of its
cores, without waiting) and differences, on the scale 0..1, are against the mode --reference. GB are 10^9 bytes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
    SD3Transformer2DModel,
    TorchAoConfig,
)
from diffusers.hooks import apply_layerwise_casting
from diffusers.utils import logging as diffusers_logging

from tsdsr.checkpoints.bake import bake_model
from tsdsr.imaging import read
from tsdsr.models.prompt_embeddings import PromptEmbeddings
from tsdsr.pipelines.pipeline_tsdsr import TSDSRPipeline

from . import EMBEDDED
from .shared_base import DTYPES, SD3_MEDIUM, Memory, random_base
from .sizes import SAMPLE, mirrored

# vae/config.json of stabilityai/stable-diffusion-3-medium-diffusers.
SD3_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def make_weights(folder: Path, transformer: dict[str, Any] = SD3_MEDIUM, vae: dict[str, Any] = SD3_VAE) -> None:
    """A pipeline folder of these configs with random weights in bfloat16, as TSD-SR's bases are published."""
    torch.manual_seed(0)
    network = random_base(transformer, torch.bfloat16, torch.device("cpu"))
    tokens, pooled = torch.randn(1, 333, network.config.joint_attention_dim), network.config.pooled_projection_dim
    pipeline = TSDSRPipeline(
        vae=AutoencoderKL.from_config(vae).to(torch.bfloat16),
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        prompt_embeddings=PromptEmbeddings.from_tensors(tokens.bfloat16(), torch.randn(1, pooled).bfloat16()),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        pipeline.save_pretrained(f"{partial}/pipeline")
        os.replace(f"{partial}/pipeline", folder)


def write_gguf(transformer: SD3Transformer2DModel, file: Path, kind: str) -> None:
    """A transformer as GGUF under diffusers' names: matrices whose rows are whole blocks in `kind`, the rest in F32.

    Args:
        kind: what the `gguf` package can write, such as "Q8_0", "Q5_0" or "Q4_0".
    """
    import gguf

    quantized = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[quantized]
    partial = file.with_name(f".{file.name}")
    writer = gguf.GGUFWriter(partial, "sd3", use_temp_file=True)
    for name, tensor in transformer.state_dict().items():
        array = tensor.float().numpy()
        if array.ndim == 2 and name.endswith("weight") and array.shape[1] % block == 0:
            writer.add_tensor(name, gguf.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, file)


# A mode takes the pipeline folder, a folder for its own files, the dtype it computes in and the device.
Mode = Callable[[Path, Path, torch.dtype, torch.device], TSDSRPipeline]


def plain(dtype: torch.dtype | None = None) -> Mode:
    def load(model: Path, files: Path, compute: torch.dtype, device: torch.device) -> TSDSRPipeline:
        # A CPU without bfloat16 would take hours for the VAE's convolutions in it.
        of_vae = compute if device.type == "cpu" else dtype or compute
        dtypes = {"vae": of_vae, "default": dtype or compute}
        return TSDSRPipeline.from_pretrained(model, dtype=dtypes).to(device)

    return load


def layerwise(modulation: bool) -> Mode:
    def load(model: Path, files: Path, compute: torch.dtype, device: torch.device) -> TSDSRPipeline:
        pipeline = TSDSRPipeline.from_pretrained(model, dtype=compute)
        if modulation:
            # The model's own method always leaves its modulation layers out with all norms; they are a third of SD3.
            kept = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "^proj_out$")
            apply_layerwise_casting(pipeline.transformer, torch.float8_e4m3fn, compute, skip_modules_pattern=kept)
        else:
            pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute)
        return pipeline.to(device)

    return load


def torchao(name: str, **settings: Any) -> Mode:
    def load(model: Path, files: Path, compute: torch.dtype, device: torch.device) -> TSDSRPipeline:
        import torchao.prototype.quantization.int4 as prototypes
        import torchao.quantization as quantization

        # torchao's kernels for 4 bits differ by device; those of CPUs are among its prototypes.
        on_cpu = name == "Int4WeightOnlyConfig" and device.type == "cpu"
        kind = prototypes.PrototypeInt4WeightOnlyConfig if on_cpu else getattr(quantization, name)
        more = {} if on_cpu or name != "Int4WeightOnlyConfig" else {"int4_packing_format": "tile_packed_to_4d"}
        config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(kind(**settings, **more))})
        return TSDSRPipeline.from_pretrained(model, dtype=compute, quantization_config=config).to(device)

    return load


def gguf_file(kind: str) -> Mode:
    def load(model: Path, files: Path, compute: torch.dtype, device: torch.device) -> TSDSRPipeline:
        transformer = SD3Transformer2DModel.from_single_file(
            files / f"{kind}.gguf",
            quantization_config=GGUFQuantizationConfig(compute_dtype=compute),
            config=str(model),
            subfolder="transformer",
        )
        return TSDSRPipeline.from_pretrained(model, transformer=transformer, dtype=compute).to(device)

    return load


def offloaded(offload: Callable[[TSDSRPipeline, Path, torch.device], None]) -> Mode:
    def load(model: Path, files: Path, compute: torch.dtype, device: torch.device) -> TSDSRPipeline:
        pipeline = TSDSRPipeline.from_pretrained(model, dtype=compute)
        offload(pipeline, files, device)
        return pipeline

    return load


def group_offload(kind: str, disk: bool = False) -> Mode:
    def offload(pipeline: TSDSRPipeline, files: Path, device: torch.device) -> None:
        pipeline.enable_group_offload(
            onload_device=device,
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
            use_stream=not disk and device.type == "cuda",
            offload_to_disk_path=str(files / "offload") if disk else None,
        )

    return offloaded(offload)


def baked(load: Mode) -> Mode:
    """The same of what `tsdsr bake` made of the model, in `files`."""
    return lambda model, files, compute, device: load(files / "baked", files, compute, device)


MODES: dict[str, Mode] = {
    "fp32": plain(torch.float32),
    "bf16": plain(torch.bfloat16),
    "vae_strips": plain(),
    "fp8": layerwise(modulation=False),
    "fp8_modulation": layerwise(modulation=True),
    "int8": torchao("Int8WeightOnlyConfig"),
    "int8_dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "int4": torchao("Int4WeightOnlyConfig", group_size=32),
    "gguf_q8_0": gguf_file("Q8_0"),
    "gguf_q4_0": gguf_file("Q4_0"),
    "disk_blocks": group_offload("block_level", disk=True),
    "disk_leaves": group_offload("leaf_level", disk=True),
    "baked": baked(plain()),
    "baked_bf16": baked(plain(torch.bfloat16)),
    "baked_fp8": baked(layerwise(modulation=False)),
    "baked_int8": baked(torchao("Int8WeightOnlyConfig")),
    "baked_int8_dynamic": baked(torchao("Int8DynamicActivationInt8WeightConfig")),
    "baked_int4": baked(torchao("Int4WeightOnlyConfig", group_size=32)),
}
# What lies in memory beside a GPU is no smaller where there is none.
GPU_MODES: dict[str, Mode] = {
    "model_offload": offloaded(lambda pipeline, _, device: pipeline.enable_model_cpu_offload(device=device)),
    "sequential_offload": offloaded(lambda pipeline, _, device: pipeline.enable_sequential_cpu_offload(device=device)),
    "group_offload": group_offload("block_level"),
    "group_offload_leaves": group_offload("leaf_level"),
}


def photograph(size: int) -> np.ndarray:
    """The photograph that ships with the package, (size, size, 3), float32, 0..1."""
    return mirrored(read(SAMPLE).rgb, size, size)


def measure(mode: str, model: Path, files: Path, args: argparse.Namespace) -> dict[str, float]:
    """Memory in GB and seconds of one mode in this process; the picture goes to `files`."""
    device, compute = torch.device(args.device), DTYPES[args.dtype]
    shutil.rmtree(files / "offload", ignore_errors=True)  # what lies there would be used instead of these weights
    memory = Memory(device)
    pipeline = (MODES | GPU_MODES)[mode](model, files, compute, device)
    pipeline.set_progress_bar_config(disable=True)
    loading = memory.peak()

    def call() -> torch.Tensor:
        # Half a side, so that there are four strips or more.
        tiles = {"vae_tile_size": 2 * args.size} if mode == "vae_strips" else {}
        picture = photograph(args.size)
        return pipeline(picture, process_size=0, color_fix="none", output_type="pt", **tiles).images.cpu()

    if device.type == "cuda":
        call()  # the first call also sets kernels up
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux begins the peak anew at what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    # A CPU's own time is the same on a busy machine.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begun = clock()
    picture = call()
    seconds = clock() - begun
    torch.save(picture, files / f"{mode}.pt")
    shutil.rmtree(files / "offload", ignore_errors=True)
    return {
        "loading_gb": round(loading, 3),
        "run_gb": round(memory.peak(), 3),
        "held_gb": round(memory.now(), 3),
        "seconds": round(seconds, 2),
    }


def table(rows: dict[str, dict[str, float]], reference: str, seconds: bool) -> str:
    """The results in Markdown; absolute seconds only where asked for."""
    heads = ["mode", "loading, peak GB", "call, peak GB", "held after, GB", f"time / {reference}"]
    heads += ["seconds"] * seconds + ["largest difference", "mean difference", "PSNR, dB"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for mode, row in rows.items():
        cells = [f"`{mode}`", *(f"{row[name]:.2f}" for name in ("loading_gb", "run_gb", "held_gb"))]
        cells.append(f"{row['seconds'] / rows[reference]['seconds']:.2f}")
        cells += [f"{row['seconds']:.2f}"] * seconds + [
            f"{row['largest']:.1e}",
            f"{row['mean']:.1e}",
            f"{row['psnr']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help='"embedded" or a pipeline folder; else random weights of SD3-medium\'s size')
    parser.add_argument("--folder", type=Path, default=Path("memory_benchmark"), help="for weights and results")
    parser.add_argument("--modes", nargs="+", choices=[*MODES, *GPU_MODES], help="by default all there are here")
    parser.add_argument("--reference", default="bf16" if gpu else "fp32", help="the mode others are compared with")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "fp32", help="other modes compute in it")
    parser.add_argument("--size", type=int, default=128, help="side of the photograph")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--mode", choices=[*MODES, *GPU_MODES], help="measure this one in this process; prints JSON")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    model = EMBEDDED if args.model == "embedded" else Path(args.model or args.folder / "sd3_medium")
    files = args.folder / re.sub(r"\W+", "_", f"{model.name}_{args.device}")
    if args.mode:
        print(json.dumps(measure(args.mode, model, files, args)))
        return

    if args.model and not (model / "model_index.json").is_file():
        parser.error(f"{model} is not a pipeline folder; name one, or, in the repository, embedded.")
    on_gpu = torch.device(args.device).type == "cuda"
    modes = args.modes or [*MODES, *(GPU_MODES if on_gpu else ())]
    modes = [args.reference, *(mode for mode in modes if mode != args.reference)]
    files.mkdir(parents=True, exist_ok=True)
    if not args.model and not model.exists():
        make_weights(model)
    for mode in modes:
        kind = mode.removeprefix("gguf_").upper()
        if mode.startswith("gguf_") and not (files / f"{kind}.gguf").exists():
            transformer = SD3Transformer2DModel.from_pretrained(model, subfolder="transformer", dtype=torch.bfloat16)
            write_gguf(transformer, files / f"{kind}.gguf", kind)
            del transformer
    if any(mode.startswith("baked") for mode in modes) and not (files / "baked").exists():
        bake_model(model, files / "baked")

    # What is freed goes back to the system at once, so that it is not counted as held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    rows: dict[str, dict[str, float]] = {}
    for mode in modes:
        command = [sys.executable, "-m", __spec__.name, *given, "--mode", mode]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        difference = (torch.load(files / f"{mode}.pt") - torch.load(files / f"{args.reference}.pt")).abs()
        row = json.loads(child.stdout.splitlines()[-1])
        square = difference.double().square().mean()
        rows[mode] = row | {
            "largest": difference.max().item(),
            "mean": difference.mean().item(),
            "psnr": round(-10 * square.log10().item(), 2) if square else float("inf"),
        }
        if not args.json:
            print(f"{mode}: {rows[mode]}", file=sys.stderr, flush=True)
    print(json.dumps(rows) if args.json else table(rows, args.reference, seconds=on_gpu))


if __name__ == "__main__":
    main()
