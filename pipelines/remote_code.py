"""The Python code of the pipeline as files beside its weights, for those who load it without this package.

diffusers runs `pipeline.py` of a folder, with `trust_remote_code=True`, and takes no other module along from the Hub:
so everything a run needs is joined into that one file.
"""

import ast
import json
from pathlib import Path

CODE_FILE = "pipeline.py"
# Each imports only those before it.
MODULES = (
    "models/prompt_embeddings.py",
    "models/attention.py",
    "models/fast_layers.py",
    "models/one_step_sd3.py",
    "models/autoencoder_tiny_separable.py",
    "pipelines/strips.py",
    "pipelines/tiling.py",
    "pipelines/color.py",
    "pipelines/degrid.py",
    "pipelines/grain.py",
    "pipelines/memory.py",
    "pipelines/precision.py",
    "pipelines/codec.py",
    "pipelines/lora.py",
    "pipelines/placement.py",
    "pipelines/saving.py",
    "pipelines/pipeline_tsdsr.py",
)


# Networks that diffusers does not have, by the names of their classes: the code of each alone.
COMPONENTS = {
    "PromptEmbeddings": ("models/prompt_embeddings.py",),
    "OneStepSD3Transformer2DModel": (
        "models/prompt_embeddings.py",
        "models/attention.py",
        "models/one_step_sd3.py",
    ),
    "AutoencoderTinySeparable": ("models/autoencoder_tiny_separable.py",),
}


def join_modules(names: tuple[str, ...] = MODULES) -> str:
    """One module with the code of several: their imports of other packages, then their bodies as they stand."""

    def drop(lines: list[str], node: ast.stmt) -> None:
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            lines[number - 1] = ""

    root = Path(__file__).resolve().parent.parent
    imported: dict[str, set[str]] = {}
    bodies = []
    for name in names:
        text = (root / name).read_text(encoding="utf-8")
        lines = text.splitlines()
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if getattr(node, "level", 0) == 0:
                    start = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
                    imported.setdefault(start, set()).update(ast.unparse(alias) for alias in node.names)
                drop(lines, node)
        # The docstring names the part.
        drop(lines, tree.body[0])
        title = (ast.get_docstring(tree) or "").splitlines()[0]
        bodies.append(f"# --- {name}: {title}\n\n\n" + "\n".join(lines).strip())
    plain = [f"import {name}" for name in sorted(imported.pop("import", ()))]
    imports = [*plain, *(f"{start} {', '.join(sorted(names))}" for start, names in sorted(imported.items()))]
    licence = "# Licence: Apache-2.0"
    what = '"""TSD-SR as a diffusers pipeline in one file, joined from the modules of the package tsdsr."""'
    return "\n\n\n".join([f"{licence}\n{what}\n\n" + "\n".join(imports), *bodies]) + "\n"


def write_code(folder: Path) -> None:
    """Put the code into a saved pipeline and name it there.

    `pipeline.py` is what runs. Classes of components lie in the folders of their weights a second time, because
    diffusers downloads a component from elsewhere than its own libraries only where it finds the code of its class.
    """
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    (folder / CODE_FILE).write_text(join_modules(), encoding="utf-8")
    for component, entry in index.items():
        if isinstance(entry, list) and entry[1] in COMPONENTS:
            code = join_modules(COMPONENTS[entry[1]])
            (folder / component / f"{entry[0]}.py").write_text(code, encoding="utf-8")
    if not isinstance(index["_class_name"], list):
        index["_class_name"] = [Path(CODE_FILE).stem, index["_class_name"]]
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
