"""How fast each way to run a model is, and how much memory it takes, against the published inference procedure.

python -m benchmarks.speed --quick
python -m benchmarks.speed --model embedded
python -m benchmarks.speed --model full --sizes 128 --batches 1 --max-minutes 60
python -m benchmarks.speed --page

from the root of the repository, or with `tsdsr.benchmarks.speed` from anywhere. Photographs of --sizes pixels a side
are enlarged four times, --batches of them in one call, by each mode in a process of its own. "full" are networks of
SD3-medium's size with random weights, made once in --folder (4 GB). Results are kept in --results, one file for each
device, model and dtype, after every row: run the same command again and it goes on with the rows that are missing.
With --profile rows that were measured get the shares of their operators beside it. --page writes docs/benchmarks.md
from all of it.

Time is the device's on a GPU; on a CPU it is the time of its cores without waiting, which other programs still change,
so that the rate of matrix products is measured beside it. GB are 10^9 bytes.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tsdsr.models.autoencoder_tiny_separable import AutoencoderTinySeparable
from tsdsr.models.one_step_sd3 import OneStepSD3Transformer2DModel
from tsdsr.pipelines.pipeline_tsdsr import TSDSRPipeline

from . import EMBEDDED, published
from .memory import MODES as MEMORY_MODES
from .memory import SD3_VAE, make_weights, photograph, plain, torchao
from .memory import Mode as Loader
from .shared_base import DTYPES, SD3_MEDIUM, Memory

RESULTS = Path(__file__).resolve().parent / "results"
UPSCALE = 4
# A row's calls are repeated until this many seconds are measured, if --repeats does not end them before.
ENOUGH_SECONDS = 120
# Kinds of operators by their names in torch's profiler, on a CPU and as kernels of a GPU; the first that fits counts.
OPERATORS = {
    "attention": r"attention|flash|fmha|softmax",
    "convolution": r"conv|implicit",
    "matrix product": r"addmm|aten::mm|bmm|matmul|int_mm|linear|gemm|nvjet",
    "normalisation": r"norm|var_mean",
    "activation": r"silu|gelu|relu|tanh",
    "copying, adding": r"copy|cat|add|mul|sub|div|clone|fill|upsample|pad|elementwise|Memcpy|reduce|mean",
}
# Small enough for a test, and large enough that the published procedure tiles the larger picture.
QUICK_TRANSFORMER = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "caption_projection_dim": 128,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 32,
}
QUICK_VAE = SD3_VAE | {"block_out_channels": [4] * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
QUICK_SIZES = (32, 136)


@dataclass(frozen=True)
class Setting:
    """What one row measures beside its mode, and where.

    Attributes:
        model: the pipeline folder.
        files: a folder for what modes need on disk.
        size: side of the photographs in pixels.
        batch: photographs of one call.
        dtype, device: what the networks compute in, and on.
    """

    model: Path
    files: Path
    size: int
    batch: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class Run:
    """A loaded mode.

    Attributes:
        call: maps photographs (B, 3, H, W), uint8, to results of the same kind; both on the CPU. It calls its second
            argument with "encode", "step" or "decode" whenever a network is done.
        networks: those of the three stages.
        compile: run after the first call, whose operations are counted: a compiled network hides them.
        dtype: what it computes in, where that is not the setting's.
    """

    call: Callable[[Tensor, Callable[[str], None]], Tensor]
    networks: dict[str, nn.Module]
    compile: Callable[[], None] | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Mode:
    """One way to run a model: what it is, how it starts, and why it cannot in a setting (None where it can)."""

    what: str
    start: Callable[[Setting], Run]
    absent: Callable[[Setting], str | None] = lambda setting: None


def start_published(setting: Setting) -> Run:
    networks = published.load(setting.model, setting.dtype, setting.device)

    def call(photographs: Tensor, done: Callable[[str], None]) -> Tensor:
        # The published program takes one file after another.
        return torch.cat([published.enlarge(networks, one, UPSCALE, 0, done=done) for one in photographs.split(1)])

    vae = networks.vae
    return Run(call, {"encode": vae.encoder, "step": networks.transformer, "decode": vae.decoder})


def ours(
    setting: Setting,
    load: Loader | None = None,
    change: Callable[[TSDSRPipeline], Any] = lambda pipeline: None,
    **arguments: Any,
) -> Run:
    """This project's pipeline, changed after loading, with further arguments of its call."""
    load = load or plain(setting.dtype)
    pipeline = load(setting.model, setting.files, setting.dtype, setting.device)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)  # for the counter of operations, which follows gradients
    change(pipeline)

    def call(photographs: Tensor, done: Callable[[str], None]) -> Tensor:
        pictures = pipeline(
            photographs,
            upscale=UPSCALE,
            process_size=0,
            output_type="pt",
            tile_callback=lambda tiles: done(tiles.stage),
            **arguments,
        ).images
        return pictures.mul(255).round().byte().cpu()

    vae = pipeline.vae
    return Run(call, {"encode": vae.encoder, "step": pipeline.transformer, "decode": vae.decoder})


def channels_last(pipeline: TSDSRPipeline) -> None:
    pipeline.vae.to(memory_format=torch.channels_last)


def compiled(
    setting: Setting,
    whole: bool = False,
    change: Callable[[TSDSRPipeline], Any] = lambda pipeline: None,
    load: Loader | None = None,
    **options: Any,
) -> Run:
    """Both halves of the VAE, and of the transformer one block for all of them, or the whole."""
    run = ours(setting, load, change)

    def compile_all() -> None:
        for stage, network in run.networks.items():
            blocks_alone = stage == "step" and not whole
            (network.compile_repeated_blocks if blocks_alone else network.compile)(dynamic=False, **options)

    run.compile = compile_all
    return run


def tinysr(model: Path, files: Path, compute: torch.dtype, device: torch.device) -> TSDSRPipeline:
    """TinySR's networks (arXiv 2508.17434) with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = OneStepSD3Transformer2DModel(num_layers=12, text_stream="none", prompt_tokens=0)
        vae = AutoencoderTinySeparable(latent_channels=16, separable_encoder=True, separable_decoder=False)
    networks = {"transformer": transformer, "vae": vae}
    return TSDSRPipeline(
        **{name: network.to(compute).eval() for name, network in networks.items()},
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def is_other_size(setting: Setting) -> str | None:
    file = setting.model / "transformer" / "config.json"
    config = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if (config.get("num_layers"), config.get("num_attention_heads")) == (24, 24):
        return None
    return "its networks have one size, that of SD3-medium's halved"


def in_dtype(dtype: torch.dtype, setting: Setting, **how: Any) -> Run:
    run = ours(setting, plain(dtype), **how)
    run.dtype = dtype
    return run


def no_gpu(setting: Setting) -> str | None:
    return None if setting.device.type == "cuda" else "needs a GPU"


def same(setting: Setting, dtype: str) -> str | None:
    return "all modes compute in it here" if setting.dtype == DTYPES[dtype] else None


def no_bfloat16(setting: Setting) -> str | None:
    """Only some CPUs compute in it; others would take minutes for a picture."""
    if same(setting, "bf16"):
        return same(setting, "bf16")
    if setting.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return None
    return "this CPU does not compute in bfloat16"


def no_published(setting: Setting) -> str | None:
    """The published procedure samples an AutoencoderKL, and its LoRAs are those of a base."""
    if json.loads((setting.model / "model_index.json").read_text("utf-8"))["vae"][1] == AutoencoderKL.__name__:
        return None
    return "the procedure is one for a base with an AutoencoderKL and LoRAs beside it"


def no_tiles(setting: Setting) -> str | None:
    one = UPSCALE * setting.size <= 8 * published.LATENT_TILE
    return "the transformer takes the picture as one tile" if one else None


def no_torchao(setting: Setting) -> str | None:
    try:
        import torchao  # noqa: F401
    except ImportError:
        return "torchao is not installed"
    return None


def no_fp8(setting: Setting) -> str | None:
    if no_gpu(setting) or torch.cuda.get_device_capability(setting.device) < (8, 9):
        return "needs a GPU that computes in float8"
    return no_torchao(setting)


MODES: dict[str, Mode] = {
    "published": Mode("the published procedure: LoRAs unmerged, tiles one by one", start_published, no_published),
    "merged": Mode("`TSDSRPipeline` as it loads, LoRAs merged", ours),
    "tile_batches": Mode("`merged`, `tile_batch_size=4`", partial(ours, tile_batch_size=4), no_tiles),
    "channels_last": Mode("`merged`, VAE in channels-last layout", partial(ours, change=channels_last)),
    "fused_qkv": Mode("`merged`, `fuse_qkv_projections()`", partial(ours, change=TSDSRPipeline.fuse_qkv_projections)),
    "compiled": Mode("`merged`, VAE and transformer's blocks compiled by `torch.compile`", compiled),
    "cuda_graphs": Mode(
        "whole networks compiled, mode `reduce-overhead`", partial(compiled, whole=True, mode="reduce-overhead"), no_gpu
    ),
    "autotuned": Mode(
        "whole networks compiled, mode `max-autotune`", partial(compiled, whole=True, mode="max-autotune"), no_gpu
    ),
    "baked": Mode("`merged`, `bake()`", partial(ours, change=TSDSRPipeline.bake)),
    "baked_compiled": Mode("`baked`, compiled as `compiled`", partial(compiled, change=TSDSRPipeline.bake)),
    "baked_autotuned": Mode(
        "`baked`, whole networks compiled, mode `max-autotune`",
        partial(compiled, whole=True, change=TSDSRPipeline.bake, mode="max-autotune"),
        no_gpu,
    ),
    "tinysr": Mode("TinySR's networks, half of the blocks and a tiny VAE", partial(ours, load=tinysr), is_other_size),
    "tinysr_compiled": Mode(
        "`tinysr`, whole networks compiled, mode `max-autotune`",
        partial(compiled, whole=True, load=tinysr, mode="max-autotune"),
        lambda setting: no_gpu(setting) or is_other_size(setting),
    ),
    "int8": Mode("transformer's weights in int8 (torchao)", partial(ours, load=MEMORY_MODES["int8"]), no_torchao),
    "int8_dynamic": Mode(
        "transformer's weights and activations in int8 (torchao)",
        partial(ours, load=MEMORY_MODES["int8_dynamic"]),
        no_torchao,
    ),
    "fp8_dynamic": Mode(
        "transformer's weights and activations in float8 (torchao)",
        partial(ours, load=torchao("Float8DynamicActivationFloat8WeightConfig")),
        no_fp8,
    ),
    "bf16": Mode("`merged` in bfloat16", partial(in_dtype, torch.bfloat16), no_bfloat16),
    "baked_bf16": Mode(
        "`baked` in bfloat16", partial(in_dtype, torch.bfloat16, change=TSDSRPipeline.bake), no_bfloat16
    ),
    "fp16": Mode(
        "`merged` in float16",
        partial(in_dtype, torch.float16),
        lambda setting: no_gpu(setting) or same(setting, "fp16"),
    ),
}


def count_flops(function: Callable[[], Any]) -> int:
    """Floating-point (for int8: integer) operations of matrix products, convolutions and attention in a call.

    Two for each multiplication with its addition. Normalisations, activations, softmax and resizing are not counted.
    """
    aten = torch.ops.aten
    unknown = {
        # Attention of the CPU, and products of int8, which torch's table lacks; they are given shapes.
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._int_mm: lambda a, b, **_: 2 * a[0] * a[1] * b[1],
    }
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        function()
    return counter.get_total_flops()


def moment(device: torch.device) -> Any:
    """Now: an event on a GPU's stream, or the seconds that this process has kept cores busy."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    return time.process_time()


def between(begun: Any, ended: Any) -> float:
    """Seconds between two moments."""
    if isinstance(begun, float):
        return ended - begun
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000


def seconds_of(device: torch.device, function: Callable[[], Any]) -> float:
    begun = moment(device)
    function()
    return between(begun, moment(device))


def matmul_rates(side: int, dtype: torch.dtype, device: torch.device, repeats: int = 3) -> list[float]:
    """Operations a second of the product of square matrices; the first one, which sets kernels up, is left out."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return [2 * side**3 / seconds_of(device, lambda: a @ b) for _ in range(1 + repeats)][1:]


def copy_rates(side: int, dtype: torch.dtype, device: torch.device, repeats: int = 3) -> list[float]:
    """Bytes a second, read and written, of copying 16 square matrices, more than fit in a cache."""
    source = torch.ones(16, side, side, device=device, dtype=dtype)
    target = torch.ones_like(source)
    return [2 * source.nbytes / seconds_of(device, lambda: target.copy_(source)) for _ in range(1 + repeats)][1:]


def stored_bytes(tensor: Tensor) -> int:
    """Of a weight, quantized ones as they are stored."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def begin_peak(device: torch.device) -> None:
    """From here on `Memory.peak` is that of what follows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what loading freed is not to count
        Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Stages:
    """When networks were done in one call."""

    device: torch.device
    begun: Any = None
    moments: list[tuple[str, Any]] = field(default_factory=list)

    def done(self, stage: str) -> None:
        self.moments.append((stage, moment(self.device)))

    def seconds(self, ended: Any) -> dict[str, float]:
        """Of each stage, with what comes before it in a call; what comes after the last decoding is the rest."""
        found = dict.fromkeys(("encode", "step", "decode", "rest"), 0.0)
        before = self.begun
        for stage, at in [*self.moments, ("rest", ended)]:
            # The next photograph begins with its resizing, and what follows a decoding is counted there.
            found[stage] += between(before, at)
            before = at
        return found


def measure(mode: str, setting: Setting, repeats: int, side: int) -> dict[str, Any]:
    """One row, in this process.

    Args:
        mode: one of `MODES` that is not absent in the setting.
        setting: of the row.
        repeats: timed calls, fewer where they last long.
        side: of the square matrices whose product shows what the machine can do.

    Returns:
        seconds and wall_seconds of a call (medians), repeats, stages (seconds of each), flops, peak_gb of a call beyond
        the imports, weights_gb, gemm_flops and copy_bytes a second, weight_bytes that a call has to read.
    """
    device = setting.device
    memory = Memory(device)
    run = MODES[mode].start(setting)
    dtype = run.dtype or setting.dtype
    photographs = torch.from_numpy(photograph(setting.size)).movedim(-1, 0).mul(255).byte()
    photographs = photographs.expand(setting.batch, -1, -1, -1).contiguous()

    calls: list[str] = []
    flops = count_flops(lambda: run.call(photographs, calls.append))
    weights = {
        stage: sum(stored_bytes(weight) for weight in (*network.parameters(), *network.buffers()))
        for stage, network in run.networks.items()
    }
    if run.compile:
        run.compile()
        run.call(photographs, lambda stage: None)
    for _ in range(3 if device.type == "cuda" else 0):
        run.call(photographs, lambda stage: None)

    gemm, copies, whole, wall, stages = [], [], [], [], []
    peak = 0.0
    while len(whole) < repeats and sum(whole) < ENOUGH_SECONDS:
        # What the machine can do is measured beside what it does.
        gemm += matmul_rates(side, dtype, device)
        copies += copy_rates(side, dtype, device)
        begin_peak(device)
        watch, started = Stages(device), time.perf_counter()
        watch.begun = moment(device)
        run.call(photographs, watch.done)
        ended = moment(device)
        stages.append(watch.seconds(ended))
        whole.append(between(watch.begun, ended))
        wall.append(time.perf_counter() - started)
        peak = max(peak, memory.peak())
    return {
        "seconds": statistics.median(whole),
        "wall_seconds": statistics.median(wall),
        "repeats": len(whole),
        "stages": {stage: statistics.median(one[stage] for one in stages) for stage in stages[0]},
        "flops": flops,
        "peak_gb": round(peak, 3),
        "weights_gb": round(sum(weights.values()) / 1e9, 3),
        "gemm_flops": statistics.median(gemm),
        "copy_bytes": statistics.median(copies),
        "weight_bytes": sum(weights[stage] for stage in calls),
    }


def operators(mode: str, setting: Setting) -> dict[str, Any]:
    """Shares of a call's time by kind of operator, in a further process: a profiler slows what it watches.

    Returns:
        operators: kinds of `OPERATORS` and "rest", each from 0 to 1.
    """
    from torch.profiler import ProfilerActivity, profile

    run = MODES[mode].start(setting)
    photographs = torch.from_numpy(photograph(setting.size)).movedim(-1, 0).mul(255).byte()
    photographs = photographs.expand(setting.batch, -1, -1, -1).contiguous()
    for ready in (None, run.compile):
        if ready:
            ready()
        run.call(photographs, lambda stage: None)
    gpu = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as watched:
        run.call(photographs, lambda stage: None)
    spent = dict.fromkeys((*OPERATORS, "rest"), 0.0)
    for event in watched.key_averages():
        kind = next((kind for kind, pattern in OPERATORS.items() if re.search(pattern, event.key)), "rest")
        spent[kind] += event.self_device_time_total if gpu else event.self_cpu_time_total
    return {"operators": {kind: round(value / sum(spent.values()), 4) for kind, value in spent.items()}}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text("utf-8")) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What rows must share to be compared."""
    device = torch.device(args.device)
    return {
        "device": device_name(device),
        "type": device.type,
        "threads": args.threads,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def available_bytes() -> int | None:
    """Memory that a process may still take, where the system says so."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+)", info.read_text()) if info.exists() else None
    return 1024 * int(found[1]) if found else None


def limit_memory() -> None:
    """Let this process fail where it would otherwise take more than the machine has left."""
    available = available_bytes()
    if available:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (available, resource.RLIM_INFINITY))


def in_process(command: list[str], seconds: float) -> dict[str, Any]:
    """The row that a process of its own prints, or why there is none."""
    # A thread that waits for another one sleeps, so that only work is counted as a CPU's time.
    environment = {**os.environ, "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    limit = None if seconds == float("inf") else max(1, seconds)
    try:
        child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"not_run": f"not done after {seconds / 60:.0f} minutes, when no time was left (--max-minutes)"}
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    if child.returncode == -9 or "allocate memory" in child.stderr or re.search(r"\w*(OutOf)?MemoryError", last):
        return {"not_run": "out of memory"}
    return {"not_run": f"failed: {last[:200]}"}


def write_results(file: Path, rows: list[dict[str, Any]]) -> None:
    """The file as a whole: rows by size and batch, modes in the order of `MODES`."""
    order = list(MODES)
    rows = sorted(rows, key=lambda row: (row["size"], row["batch"], order.index(row["mode"])))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_name(f".{file.name}")
    partial_file.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial_file, file)


def read_results(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []


def slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower()


def main(arguments: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help='"full", "embedded" or a pipeline folder')
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="by default all")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the photographs; by default 128 256 512")
    parser.add_argument("--batches", type=int, nargs="+", help="photographs of one call; by default 1 8")
    parser.add_argument(
        "--repeats", type=int, help="timed calls, of which the median counts; by default 10 on a GPU, 3"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="by default fp16, as published, on a GPU, fp32 on a CPU")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--side", type=int, help="of the matrix products that show what the device can do")
    parser.add_argument("--folder", type=Path, default=Path("memory_benchmark"), help="for weights")
    parser.add_argument("--results", type=Path, help="folder of the results; by default benchmarks/results")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="start nothing after that long")
    parser.add_argument("--redo", action="store_true", help="measure again what has been measured")
    parser.add_argument("--quick", action="store_true", help="tiny random networks, to see that all of it works")
    parser.add_argument("--profile", action="store_true", help="add shares of operators to the rows that there are")
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md from the results and do no more")
    parser.add_argument("--row", nargs=3, metavar=("MODE", "SIZE", "BATCH"), help="measure it here; prints JSON")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    if args.page:
        from .report import write_page

        write_page()
        return
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    usual = "fp16" if args.device.startswith("cuda") else "fp32"
    args.dtype = args.dtype or usual
    args.repeats = args.repeats or (1 if args.quick else 10 if args.device.startswith("cuda") else 3)
    sizes = args.sizes or (QUICK_SIZES if args.quick else (128, 256, 512))
    batches = args.batches or ((1, 2) if args.quick else (1, 8))
    args.side = args.side or (256 if args.quick else 8192 if args.device.startswith("cuda") else 2048)

    if args.quick:
        name, model, configs = "quick", args.folder / "quick_networks", (QUICK_TRANSFORMER, QUICK_VAE)
    elif args.model == "full":
        name, model, configs = "full", args.folder / "sd3_medium", (SD3_MEDIUM, SD3_VAE)
    else:
        model = EMBEDDED if args.model == "embedded" else Path(args.model)
        name, configs = "embedded" if args.model == "embedded" else model.resolve().name, None
    files = args.folder / "speed"

    def setting(size: int, batch: int) -> Setting:
        return Setting(model, files, size, batch, DTYPES[args.dtype], torch.device(args.device))

    def take(mode: str, setting: Setting) -> dict[str, Any]:
        return operators(mode, setting) if args.profile else measure(mode, setting, args.repeats, args.side)

    if args.row:
        limit_memory()
        mode, size, batch = args.row[0], int(args.row[1]), int(args.row[2])
        print(json.dumps(take(mode, setting(size, batch))))
        return

    if configs and not model.exists():
        make_weights(model, *configs)
    if not (model / "model_index.json").is_file():
        parser.error(f"{model} is not a pipeline folder; name one, or full, or, in the repository, embedded.")
    files.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(args)
    results = args.results or (args.folder / "quick_results" if args.quick else RESULTS)
    ending = "" if args.dtype == usual else f"_{args.dtype}"
    file = results / f"{slug(facts['device'])}_{slug(name)}{ending}.json"
    kept = {(row["mode"], row["size"], row["batch"]): row for row in read_results(file)}
    deadline = time.monotonic() + 60 * args.max_minutes
    for size, batch, mode in [(s, b, m) for s in sizes for b in batches for m in MODES if m in args.modes]:
        key = (mode, size, batch)
        measured = "seconds" in kept.get(key, {})
        if args.profile and not measured:
            continue
        if measured and not (args.redo or args.profile):
            print(f"{mode} {size} x{batch}: kept", file=sys.stderr, flush=True)
            continue
        reason, left = MODES[mode].absent(setting(size, batch)), deadline - time.monotonic()
        if args.quick and mode == "compiled" and (size, batch) != (sizes[0], batches[0]):
            reason = "compiled once in --quick, which is to be quick"
        if reason:
            row = {"not_run": reason}
        elif left <= 0:
            row = {"not_run": f"no time was left (--max-minutes {args.max_minutes:g})"}
        elif args.quick:  # a process for each would take longer than all that it measures
            torch.compiler.reset()
            row = take(mode, setting(size, batch))
        else:
            row = in_process([sys.executable, "-m", __spec__.name, *given, "--row", mode, str(size), str(batch)], left)
        if args.profile and "not_run" not in row:
            kept[key] |= row
            write_results(file, list(kept.values()))
        elif not (measured and "not_run" in row):
            kept[key] = {"mode": mode, "size": size, "batch": batch, **row, "machine": facts}
            write_results(file, list(kept.values()))
        said = row.get("not_run") or row.get("operators") or f"{row['seconds']:.3g} s, {row['peak_gb']} GB"
        print(f"{mode} {size} x{batch}: {said}", file=sys.stderr, flush=True)
    print(file)


if __name__ == "__main__":
    main()
