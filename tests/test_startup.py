"""What starting costs: only what is needed is imported, and no search for garbage goes through it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

# Formats that this picture has not, measuring, training, figures.
NEEDLESS = {
    *("OpenEXR", "PIL.ImageCms", "av", "datasets", "pillow_heif", "pyiqa", "skimage", "tensorboard", "tifffile"),
    *(f"tsdsr.{room}" for room in ("checkpoints", "comfy_nodes", "evaluation", "training")),
    *(f"tsdsr.pipelines.{name}" for name in ("hub", "model_card", "modular", "remote_code", "single_file", "text")),
    *("tsdsr.imaging.video", "tsdsr.imaging.whole", "tsdsr.models.single_file"),
}
HEAVY = {"PIL", "accelerate", "diffusers", "huggingface_hub", "numpy", "peft", "safetensors", "torch", "transformers"}


def python(code, *arguments):
    """What code prints, as JSON, in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def run(*arguments):
    """The command as a program of its own: what it imported, and how many objects a search for garbage then meets."""
    return python(
        "import atexit, gc, json, sys\n"
        "from tsdsr.cli import main\n"
        "atexit.register(lambda: print(json.dumps([[*sys.modules], len(gc.get_objects())])))\n"
        "sys.argv[0] = 'tsdsr'\n"
        "main()",
        *arguments,
    )


def test_importing_the_package_imports_nothing_else():
    modules = python("import json, sys, tsdsr; print(json.dumps([*sys.modules]))")
    assert [name for name in modules if name.split(".")[0] == "tsdsr"] == ["tsdsr"]
    assert {"typer", "rich", *HEAVY} & {*modules} == set()


def test_help_imports_nothing_heavy():
    modules, _ = run("--help")
    assert {"rich", "yaml", *HEAVY, *NEEDLESS} & {*modules} == set()


def test_a_picture_is_upscaled_with_what_it_needs_alone(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(tmp_path / "a.png")
    modules, tracked = run("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--process-size", "0")
    assert (tmp_path / "b.png").is_file()
    assert {"diffusers", "tsdsr.imaging.reading"} <= {*modules}
    assert NEEDLESS & {*modules} == set()
    assert tracked < 10_000  # of some 400,000


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_rests_while_names_are_imported_and_is_then_as_it_was(collects):
    during, after, after_failure = python(
        "import gc, json, sys, tsdsr\n"
        f"{'gc.enable' if collects else 'gc.disable'}()\n"
        "during = []\n"
        "sys.addaudithook(lambda event, _: event == 'import' and during.append(gc.isenabled()))\n"
        "tsdsr.describe\n"
        "after = gc.isenabled()\n"
        "sys.modules['tsdsr.pipelines.loading'] = None\n"
        "try:\n"
        "    tsdsr.load_pipeline\n"
        "except ImportError:\n"
        "    print(json.dumps([during, after, gc.isenabled()]))"
    )
    assert during and not any(during)
    assert after is after_failure is collects
