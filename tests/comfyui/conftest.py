"""A real ComfyUI: its folder is named by COMFYUI_PATH, its Python by COMFYUI_PYTHON.

Where the latter is not set, it is that of a virtual environment in ComfyUI's folder, else this one.

The server runs on the CPU in a base folder of its own, with a copy of this repository among its custom nodes and tiny
random weights in the published layouts among its models.
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH")
PYTHON = os.environ.get("COMFYUI_PYTHON") or next(
    (str(path) for name in (".venv", "venv") if COMFYUI and (path := Path(COMFYUI, name, "bin", "python")).exists()),
    sys.executable,
)
PACK = "ComfyUI-tsdsr"
CHECKPOINT = "sd3_medium_incl_clips_t5xxlfp8.safetensors"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    here = [item for item in items if Path(item.fspath).parent == Path(__file__).parent]
    if config.pluginmanager.hasplugin("xdist"):
        for item in here:
            item.add_marker(pytest.mark.xdist_group("comfyui"))  # one server for all of them
    if not COMFYUI:
        skip = pytest.mark.skip(reason="COMFYUI_PATH is not set: the real ComfyUI is NOT tested")
        for item in here:
            item.add_marker(skip)


@dataclass
class Run:
    """What one prompt led to: `end` is the last event, `outputs` what the history says, `previews` a count."""

    prompt_id: str
    end: str
    data: dict[str, Any]
    outputs: dict[str, Any]
    events: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    previews: int = 0


@dataclass
class Comfy:
    """A running server and a client for it."""

    base: Path
    port: int
    process: subprocess.Popen
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path: str, content: dict[str, Any]) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                text = response.read()
                return response.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def run(self, graph: dict[str, Any], *, timeout: float = 300, on_event: Any = None) -> Run:
        """Queue a graph and follow it over the websocket to its end."""
        # In a thread of its own: where a browser is driven, this one has an event loop already.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(asyncio.wait_for(self._follow(graph, on_event), timeout))).result()

    async def _follow(self, graph: dict[str, Any], on_event: Any) -> Run:
        import aiohttp

        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as websocket,
        ):
            async with session.post(f"{self.url}/prompt", json={"prompt": graph, "client_id": client}) as response:
                answer = await response.json()
            assert "prompt_id" in answer, answer
            run = Run(answer["prompt_id"], "", {}, {})
            async for message in websocket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    run.previews += 1
                    continue
                event = json.loads(message.data)
                data = event.get("data", {})
                if data.get("prompt_id") not in (None, run.prompt_id):
                    continue
                run.events.append((time.monotonic(), event["type"], data))
                if on_event:
                    on_event(event["type"], data)
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    run.end, run.data = event["type"], data
                    break
            # The history is written a moment after the last event.
            while not (entry := await self._history(session, run.prompt_id)):
                await asyncio.sleep(0.05)
            run.outputs = entry.get("outputs", {})
        return run

    async def _history(self, session: Any, prompt_id: str) -> dict[str, Any]:
        async with session.get(f"{self.url}/history/{prompt_id}") as response:
            return (await response.json()).get(prompt_id, {})

    def pictures(self, run: Run) -> list[Image.Image]:
        found = [image for output in run.outputs.values() for image in output.get("images", [])]
        return [
            Image.open(self.base / image["type"] / image["subfolder"] / image["filename"]).copy()
            for image in found
            if image["filename"].endswith(".png")
        ]

    def memory(self) -> float:
        """Resident memory of the server in MB."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss / 1e6


def copy_of_the_repository(target: Path) -> None:
    """What a clone would hold, with changes that are not committed yet."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def _clip_l() -> dict[str, torch.Tensor]:
    """CLIP-L's text model at its true size, which ComfyUI asks for, with random weights."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (49408, 768),
        "embeddings.position_embedding.weight": (77, 768),
    }
    norms = ["final_layer_norm"]
    for layer in (f"encoder.layers.{index}" for index in range(12)):
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name, size in [
            *((f"{layer}.self_attn.{part}_proj", (768, 768)) for part in ("q", "k", "v", "out")),
            (f"{layer}.mlp.fc1", (3072, 768)),
            (f"{layer}.mlp.fc2", (768, 3072)),
        ]:
            shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    tensors = {name: (torch.randn(shape) * 0.02).half() for name, shape in shapes.items()}
    for name in norms:
        tensors |= {f"{name}.weight": torch.ones(768).half(), f"{name}.bias": torch.zeros(768).half()}
    return {f"text_encoders.clip_l.transformer.text_model.{name}": tensor for name, tensor in tensors.items()}


def _models(base: Path, save_single_file: Any, published_targets: Any) -> None:
    """An SD3 that ComfyUI's own nodes load as well: two blocks, but CLIP-L and the VAE at their true sizes."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=4096,
        caption_projection_dim=128,
        pooled_projection_dim=2048,
        pos_embed_max_size=96,
    )
    vae = AutoencoderKL(
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    save_single_file(base / "models" / "checkpoints" / CHECKPOINT, transformer.half(), vae.half(), **_clip_l())
    folder = base / "models" / "tsdsr" / "tsdsr"
    folder.mkdir(parents=True)
    for side, model in (("transformer", transformer), ("vae", vae)):
        tensors = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and published_targets(side, name):
                shape = module.weight.shape
                tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, *shape[1:]) / shape[1:].numel() ** 0.5
                tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(shape[0], 4, *[1] * len(shape[2:])) * 0.1
        save_file(tensors, folder / f"{side}.safetensors")
    torch.save(torch.randn(1, 333, 4096), folder / "prompt_embeds.pt")
    torch.save(torch.randn(1, 2048), folder / "pool_embeds.pt")


def _inputs(base: Path) -> None:
    folder = base / "input"
    folder.mkdir(parents=True)
    with Image.open(ROOT / "tests" / "fixtures" / "flower.webp") as flower:
        # For screenshots a picture worth looking at, else a quick one.
        side = 128 if os.environ.get("TSDSR_SCREENSHOTS") else 64
        picture = flower.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    picture.save(folder / "example.png")
    picture.crop((0, 0, 37, 53)).save(folder / "odd.png")
    alpha = Image.radial_gradient("L").resize(picture.size)
    picture.putalpha(alpha)
    picture.save(folder / "alpha.png")
    code = """
import av, sys, numpy
from PIL import Image
picture = numpy.asarray(Image.open(sys.argv[1]).convert("RGB"))
with av.open(sys.argv[2], "w") as container:
    stream = container.add_stream("h264", rate=8)
    stream.width = stream.height = picture.shape[0]
    stream.pix_fmt = "yuv420p"
    for shift in range(4):
        frame = av.VideoFrame.from_ndarray(numpy.roll(picture, shift, 1).copy(), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
"""
    subprocess.run([PYTHON, "-c", code, str(folder / "example.png"), str(folder / "video.mp4")], check=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def comfy(tmp_path_factory, save_single_file):
    """The server, for the whole session."""
    pytest.importorskip("aiohttp", reason="aiohttp is needed to follow a prompt")
    from tsdsr.checkpoints.layout import is_target

    assert COMFYUI is not None
    needed = "torch, torchvision, torchaudio, aiohttp, diffusers, peft"
    check = subprocess.run([PYTHON, "-c", f"import {needed}"], capture_output=True, text=True)
    if check.returncode:
        pytest.fail(
            f"{PYTHON} cannot run ComfyUI with these nodes ({check.stderr.strip().splitlines()[-1]}): name another one"
            " in COMFYUI_PYTHON, or install ComfyUI's requirements.txt and ours there."
        )
    base = tmp_path_factory.mktemp("comfyui")
    if os.environ.get("TSDSR_SCREENSHOTS"):
        # Its path is in the pictures.
        base = Path(tempfile.gettempdir()) / "comfyui"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
    copy_of_the_repository(base / "custom_nodes" / PACK)
    _models(base, save_single_file, is_target)
    _inputs(base)
    port, log = _free_port(), base / "server.log"
    command = [PYTHON, "main.py", "--cpu", "--base-directory", str(base), "--port", str(port)]
    # Nothing of this process's Python path: the clone must stand on its own.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            cwd=COMFYUI,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, "HF_HUB_OFFLINE": "1"},
        )
    server = Comfy(base, port, process, log)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                server.get("/system_stats")
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, server.log()[-3000:]
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
