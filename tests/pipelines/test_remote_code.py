"""A folder that carries its code loads where this package is not."""

import ast
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tsdsr import TSDSRPipeline
from tsdsr.pipelines import remote_code

# `tsdsr` cannot be imported there, whatever is installed beside diffusers.
CODE = """
import json, sys
sys.modules["tsdsr"] = None
import numpy as np
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
    refusal = None
except ValueError as error:
    refusal = str(error)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
picture = np.load(sys.argv[2])
arguments = dict(process_size=32, tile_size=32, tile_overlap=8, output_type="np")
results = [pipeline(picture, **arguments).images]
for name in ("tsdsr", "tsdsr-mse"):
    pipeline.load_lora_weights(f"{sys.argv[1]}/{name}", adapter_name=name)
results.append(pipeline(picture, fidelity=0.25, **arguments).images)
np.save(sys.argv[3], np.stack(results))
found = {"class": type(pipeline).__module__, "prompt": type(pipeline.prompt_embeddings).__name__, "refusal": refusal}
try:
    pipeline.push_to_hub("someone/model")
except ImportError as error:
    found["hub"] = str(error)
found["modules"] = [name for name in sys.modules if name.split(".")[0] == "tsdsr"]
print(json.dumps(found))
"""


@pytest.fixture
def run_alone(tmp_path, picture):
    """A function that loads a folder in a process without this package: (what it found, its pictures)."""
    np.save(tmp_path / "picture.npy", picture(20, 8))

    def run(folder):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        result = subprocess.run(
            [sys.executable, "-c", CODE, str(folder), "picture.npy", "result.npy"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**environment, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
            timeout=200,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1]), np.load(tmp_path / "result.npy")

    return run


def test_without_the_package(make_pipeline, picture, tmp_path, run_alone):
    arguments = {"process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "np"}
    pipeline = make_pipeline("kl")
    expected = [pipeline(picture(20, 8), **arguments).images]
    pipeline.save_pretrained(tmp_path / "model", include_code=True)
    for name in ("tsdsr", "tsdsr-mse"):
        settings = LoraConfig(r=2, lora_alpha=2, target_modules=["encoder.conv_in"], init_lora_weights=False)
        pipeline.vae.add_adapter(settings, name)
        layers = get_peft_model_state_dict(pipeline.vae, adapter_name=name)
        TSDSRPipeline.save_lora_weights(tmp_path / "model" / name, vae_lora_layers=layers)
    expected.append(pipeline(picture(20, 8), fidelity=0.25, **arguments).images)

    found, results = run_alone(tmp_path / "model")
    np.testing.assert_allclose(results, expected, rtol=0, atol=3e-5)
    assert np.abs(results[0] - results[1]).max() > 1e-3
    assert found["class"] == "diffusers_modules.local.pipeline" and found["prompt"] == "PromptEmbeddings"
    assert "trust_remote_code=True" in found["refusal"]
    assert found["hub"].startswith("This needs the package tsdsr itself")
    assert found["modules"] == ["tsdsr"]  # the one that blocks it


def test_with_the_package_its_own_code_runs(make_pipeline, picture, tmp_path):
    pipeline = make_pipeline("kl")
    pipeline.save_pretrained(tmp_path, include_code=True)
    (tmp_path / "pipeline.py").write_text("raise SystemExit('the code of a folder was run')")
    loaded = TSDSRPipeline.from_pretrained(tmp_path)
    assert type(loaded) is TSDSRPipeline
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "TSDSRPipeline"
    assert not (tmp_path / "again" / "pipeline.py").exists()


def test_the_joined_module_is_whole(tmp_path):
    """No two modules share a name, nothing is imported from this package, and every name that is used is known."""
    text = remote_code.join_modules()
    tree = ast.parse(text)
    names = [
        name
        for node in tree.body
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.Assign)
            else []
        )
    ]
    assert len(names) == len({*names} - {"logger"}) + names.count("logger") > 30
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert not relative
    ruff = shutil.which("ruff", path=os.path.dirname(sys.executable))
    if ruff:
        (tmp_path / "pipeline.py").write_text(text)
        command = [ruff, "check", "--isolated", "--select", "F", "--target-version", "py310", str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_every_module_stands_behind_what_it_imports():
    """A module that the pipeline comes to need must be carried too."""
    known = set()
    for name in remote_code.MODULES:
        path = remote_code.Path(remote_code.__file__).parent.parent / name
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                room = name.split("/")[0] if node.level == 1 else None
                target = f"{room}/{node.module}.py" if room else f"{node.module.replace('.', '/')}.py"
                assert target in known, f"{name} imports {target}"
        known.add(name)


def test_a_folder_without_a_prompt_of_its_own(make_pipeline, tmp_path):
    make_pipeline(prompt_embeddings=None).save_pretrained(tmp_path, include_code=True)
    assert not (tmp_path / "prompt_embeddings").exists()
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == ["pipeline", "TSDSRPipeline"]
