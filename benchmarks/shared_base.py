"""Memory of one base network in three roles, against the two copies of the published trainer.

python -m tsdsr.benchmarks.shared_base
python -m tsdsr.benchmarks.shared_base --latent-size 64 --batch-size 2 --step

Here student, teacher and fake score are adapters on one copy of the base. In the published layout one copy has the
student's LoRA, and the other the fake score's, which is the teacher while its LoRA is off. Weights are random. Each
layout is measured in a process of its own: on a GPU what torch allocates there, on the CPU (Linux) the process's memory
beyond what it was after the imports. GB are 10^9 bytes.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from tsdsr.training.base import lora_config
from tsdsr.training.config import Phase
from tsdsr.training.families import Prompt, RectifiedFlow, guided_velocity
from tsdsr.training.losses import distillation, fake_score_term
from tsdsr.training.networks import FAKE_SCORE, STUDENT, TEACHER, SharedBase
from tsdsr.training.objectives import latent_mse

# transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers.
SD3_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = ("shared", "two_copies")


class Memory:
    """What this process holds on a device beyond what it held when this was made, in GB."""

    def __init__(self, device: torch.device):
        self._gpu = device if device.type == "cuda" else None
        self._before = self._held("VmRSS")

    def _held(self, field: str) -> int:
        gc.collect()
        if self._gpu:
            peak = field == "VmHWM"
            return torch.cuda.max_memory_allocated(self._gpu) if peak else torch.cuda.memory_allocated(self._gpu)
        # Not getrusage's ru_maxrss: a process inherits that of the one that started it.
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])

    def now(self) -> float:
        return (self._held("VmRSS") - self._before) / 1e9

    def peak(self) -> float:
        return (self._held("VmHWM") - self._before) / 1e9


def random_base(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel:
    """A transformer with random weights that was never in memory twice, nor at a higher precision."""
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(config)
    network = network.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.normal_(std=0.02)
    network.enable_gradient_checkpointing()
    return network


def build(layout: str, config: dict[str, Any], rank: int, dtype: torch.dtype, device: torch.device) -> dict:
    """The network of each role; in the layout "shared" it is the same one for all."""
    targets = {STUDENT: RectifiedFlow.student_targets, FAKE_SCORE: RectifiedFlow.fake_score_targets}
    loras = {role: lora_config(rank, names) for role, names in targets.items()}
    if layout == "shared":
        shared = SharedBase(random_base(config, dtype, device), loras)
        found = {STUDENT: shared, TEACHER: shared, FAKE_SCORE: shared}
    else:
        one, other = (SharedBase(random_base(config, dtype, device), {role: loras[role]}) for role in targets)
        found = {STUDENT: one, TEACHER: other, FAKE_SCORE: other}
    for role in targets:
        cast_training_params(found[role].network, dtype=torch.float32)
    return found


def training_step(
    networks: dict[str, SharedBase], phase: Phase, size: tuple[int, ...], prompt_tokens: int, dtype: torch.dtype
) -> None:
    """One step of student and fake score (equations 3 to 9) between random latents (B, C, h, w)."""
    network = networks[STUDENT].network
    device, config = network.device, network.config
    generator = torch.Generator().manual_seed(0)
    family = RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def random_prompt() -> Prompt:
        embeds = random(1, prompt_tokens, config.joint_attention_dim).to(dtype)
        return embeds, random(1, config.pooled_projection_dim).to(dtype)

    prompt, null = random_prompt(), random_prompt()
    lq, hq = random(*size), random(*size)
    optimizers = {role: torch.optim.AdamW(networks[role].parameters(role)) for role in (STUDENT, FAKE_SCORE)}
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    def velocity(role: str, z: Tensor, sigma: Tensor) -> Tensor:
        with networks[role].role(role) as network, autocast():
            return guided_velocity(family, network, prompt, null, phase.guidance_scale)(z, sigma)

    with networks[STUDENT].role(STUDENT) as student:
        with autocast():
            latents = family.one_step(student, lq, prompt)
        teacher, fake_score = (partial(velocity, role) for role in (TEACHER, FAKE_SCORE))
        loss = distillation(phase, family.scheduler, latents, hq, teacher, fake_score, generator)
        (latent_mse(latents, hq) + loss).backward()
    optimizers[STUDENT].step()
    optimizers[STUDENT].zero_grad()
    with networks[FAKE_SCORE].role(FAKE_SCORE) as network:
        with autocast():
            predict = family.velocity(network, prompt)
            term = fake_score_term(family.scheduler, latents.detach(), predict, generator)
        term.backward()
    optimizers[FAKE_SCORE].step()


def measure(layout: str, config: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """GB of one layout in this process: its weights, and with `args.step` the most that a whole step holds."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    memory = Memory(device)
    networks = build(layout, config, args.rank, dtype, device)
    found = {"weights_gb": round(memory.now(), 3)}
    if args.step:
        size = (args.batch_size, config["in_channels"], args.latent_size, args.latent_size)
        begun = time.perf_counter()
        training_step(networks, Phase(dasm_steps=args.dasm_steps), size, args.prompt_tokens, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found |= {"step_peak_gb": round(memory.peak(), 3), "step_seconds": round(time.perf_counter() - begun, 1)}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformer-config", type=Path, help="config.json of an SD3 transformer; else medium's")
    parser.add_argument("--layers", type=int, help="only so many layers of it")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the frozen weights")
    parser.add_argument("--rank", type=int, default=64, help="of both LoRAs")
    parser.add_argument("--step", action="store_true", help="measure a whole training step too")
    parser.add_argument("--latent-size", type=int, default=64, help="side of the latents; 64 are 512 pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=333, help="77 of CLIP and 256 of T5 in SD3")
    parser.add_argument("--dasm-steps", type=int, default=4, help="points on the trajectory, equation 6")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument("--layout", choices=LAYOUTS, help="measure this one only, in this process; prints JSON")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)

    diffusers_logging.set_verbosity_error()
    config = json.loads(args.transformer_config.read_text("utf-8")) if args.transformer_config else dict(SD3_MEDIUM)
    if args.layers:
        config["num_layers"] = args.layers
    if args.layout:
        print(json.dumps(measure(args.layout, config, args)))
        return
    rows = {}
    for layout in LAYOUTS:
        command = [sys.executable, "-m", __spec__.name, *given, "--layout", layout]
        rows[layout] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    facts = {name: getattr(args, name) for name in ("dtype", "rank", "device")} | {"layers": config["num_layers"]}
    if args.step:
        facts |= {name: getattr(args, name) for name in ("latent_size", "batch_size", "prompt_tokens", "dasm_steps")}
    if args.json:
        print(json.dumps({**facts, **rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, label in (("weights_gb", "weights"), ("step_peak_gb", "peak of a step")):
        if name in rows["shared"]:
            one, two = (rows[layout][name] for layout in LAYOUTS)
            print(f"{label:15s}  one copy {one:7.2f} GB  two copies {two:7.2f} GB  ratio {one / two:.2f}")


if __name__ == "__main__":
    main()
