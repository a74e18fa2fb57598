"""The package as a whole: what importing costs, which room may know which, what the wheel holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tsdsr

ROOT = Path(tsdsr.__file__).resolve().parent
FACES = {"cli", "comfy_nodes"}
MAY_IMPORT = {
    "cli": {"pipelines", "training", "evaluation", "imaging", "checkpoints"},
    "comfy_nodes": {"pipelines", "training", "evaluation", "imaging", "checkpoints"},
    "training": {"evaluation", "pipelines", "models", "imaging"},
    "evaluation": {"pipelines", "models", "imaging"},
    "checkpoints": {"pipelines", "models"},
    "pipelines": {"models"},
    "models": set(),
    "imaging": set(),
}
ONLY_IN = {
    "OpenEXR": "imaging",
    "PIL": "imaging",
    "accelerate": "training",
    "av": "imaging",
    "comfy": "comfy_nodes",
    "comfy_api": "comfy_nodes",
    "folder_paths": "comfy_nodes",
    "pillow_heif": "imaging",
    "tifffile": "imaging",
}
MODULES = sorted(path.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a file; `from .. import x` gives (2, "x")."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module)] if node.module else [(node.level, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_import_only_what_the_design_allows(path):
    room, depth = path.parts[0], len(path.parts) - 1
    for level, name in imports(path):
        top = name.split(".")[0]
        if level == 0:
            assert top != "tsdsr", f"{path} imports {name} absolutely, and the package may be called otherwise"
            if top in ONLY_IN and not (top == "accelerate" and "init_empty_weights" in (ROOT / path).read_text()):
                assert room == ONLY_IN[top], f"{path} imports {top}"
        elif level == depth + 1 and (ROOT / top).is_dir():
            assert top == room or top in MAY_IMPORT[room], f"{path} imports {top}"


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_loads_no_heavy_library():
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'huggingface_hub'}"
    assert run(f"import sys, tsdsr, tsdsr.cli; print({heavy} & set(sys.modules))") == "set()\n"


def test_every_public_name_resolves():
    for name in tsdsr.__all__:
        assert getattr(tsdsr, name) is not None and name in dir(tsdsr)
    with pytest.raises(AttributeError, match="no attribute 'TSDSRpipeline'"):
        _ = tsdsr.TSDSRpipeline


def test_every_room_is_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for room in MAY_IMPORT:
        if (ROOT / room / "__init__.py").is_file():
            assert f'"tsdsr.{room}"' in text, f"{room} is missing from packages in pyproject.toml"
    assert f'version = "{tsdsr.__version__}"' in text
