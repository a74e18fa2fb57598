"""What the front end is told: schemas, translations, help pages, workflows."""

import inspect
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import tsdsr
from tsdsr import TSDSRPipeline
from tsdsr.comfy_nodes import TSDSRColorMatch, TSDSRExtension, TSDSRLoader, TSDSRTiledUpscale, TSDSRUpscale, schema

ROOT = Path(tsdsr.__file__).resolve().parent
NODES = {node.__name__: node for node in (TSDSRLoader, TSDSRUpscale, TSDSRTiledUpscale, TSDSRColorMatch)}
LANGUAGES = ["en", "ja", "ko", "zh"]
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def is_advanced(widget):
    return bool(widget.as_dict().get("advanced"))


async def _nodes():
    extension = await tsdsr.comfy_entrypoint()
    assert isinstance(extension, TSDSRExtension)
    return await extension.get_node_list()


def test_the_door_leads_to_the_nodes():
    import asyncio

    assert asyncio.run(_nodes()) == list(NODES.values())
    assert (ROOT / tsdsr.WEB_DIRECTORY / "docs").is_dir()


def test_defaults_are_the_pipelines():
    parameters = inspect.signature(TSDSRPipeline.__call__).parameters
    read = schema.pipeline_defaults()
    assert read == {
        name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty
    }
    seen = set()
    for node in (TSDSRUpscale, TSDSRTiledUpscale):
        for widget in node.define_schema().inputs:
            if widget.id in read and widget.id not in ("width", "height"):
                assert widget.default == read[widget.id]
                seen.add(widget.id)
    assert seen >= {"upscale", "color_fix", "tile_size", "tile_overlap", "tile_batch_size", "vae_tile_size"}


@pytest.mark.parametrize("name", NODES)
def test_schema(name):
    found = NODES[name].define_schema()
    assert found.node_id == name and found.display_name.startswith("TSD-SR") and found.description
    for widget in found.inputs:
        assert len(widget.tooltip) > 15 and widget.tooltip.endswith("."), widget.id
        default = getattr(widget, "default", None)
        if getattr(widget, "min", None) is not None:
            assert widget.min <= default <= widget.max
        if getattr(widget, "options", None):
            assert default in widget.options
    assert all(output.tooltip for output in found.outputs)


@pytest.mark.parametrize("name", ["TSDSRUpscale", "TSDSRTiledUpscale"])
def test_what_is_optional_may_be_left_out(name, embedded, pictures):
    """And then means what the schema shows as its default."""
    widgets = NODES[name].define_schema().inputs
    values = {widget.id: widget.default for widget in widgets if hasattr(widget, "default")}
    required = {widget.id for widget in widgets if not widget.optional}
    given = {"model": embedded, "image": pictures(1, 8, 8), "upscale": 2.0}
    bare = NODES[name].execute(**{**{key: values[key] for key in required & set(values)}, **given})
    full = NODES[name].execute(**{**values, **given, "mask": None})
    assert torch.equal(bare.result[0], full.result[0])


def test_advanced_inputs():
    marked = {name: {w.id for w in node.define_schema().inputs if is_advanced(w)} for name, node in NODES.items()}
    shared = {"width", "height", "lora_strength", "process_size", "sample_posterior"}
    assert marked == {
        "TSDSRLoader": {"merge_lora", "compile", "hub_id", "download"},
        "TSDSRUpscale": shared,
        "TSDSRTiledUpscale": {*shared, "vae_tile_size"},
        "TSDSRColorMatch": set(),
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_whole(language):
    text = (ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")
    translations = json.loads(text)
    assert set(translations) == set(NODES)
    for name, node in NODES.items():
        found, ours = translations[name], node.define_schema()
        assert found["display_name"] and found["description"]
        assert set(found["inputs"]) == {widget.id for widget in ours.inputs}
        assert set(found["outputs"]) == {str(index) for index in range(len(ours.outputs))}
        for entry in [*found["inputs"].values(), *found["outputs"].values()]:
            assert entry["name"].strip() and entry["tooltip"].strip()
        if language == "en":
            assert (found["display_name"], found["description"]) == (ours.display_name, ours.description)
            for widget in ours.inputs:
                assert found["inputs"][widget.id]["tooltip"] == widget.tooltip
        else:
            # Written in its own script, not left in English.
            script = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]", "ko": r"[\uac00-\ud7af]"}[
                language
            ]
            for widget in ours.inputs:
                assert re.search(script, found["inputs"][widget.id]["tooltip"]), (name, widget.id)


@pytest.mark.parametrize("name", NODES)
def test_help_pages_name_every_input(name):
    docs = ROOT / "comfy_nodes" / "web" / "docs"
    for page in (docs / f"{name}.md", *(docs / name / f"{language}.md" for language in LANGUAGES if language != "en")):
        text = page.read_text(encoding="utf-8")
        for widget in NODES[name].define_schema().inputs:
            assert widget.id in text, (page, widget.id)


def test_workflows_are_what_the_builder_makes(tmp_path, monkeypatch):
    builder = runpy.run_path(str(ROOT / "workflows" / "build.py"))
    monkeypatch.setitem(builder["Graph"].write.__globals__, "HERE", tmp_path)
    builder["main"].__globals__["HERE"] = tmp_path
    builder["main"]()
    made = {path.relative_to(tmp_path): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json")}
    kept = {
        path.relative_to(ROOT / "workflows"): path.read_text(encoding="utf-8")
        for path in (ROOT / "workflows").rglob("*.json")
    }
    assert made == kept and len(made) == 2 * len(WORKFLOWS) >= 12


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_fits_the_schemas(name):
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert (ROOT / "workflows" / f"{name}.jpg").stat().st_size < 200_000
    assert any(node["type"] == "MarkdownNote" for node in workflow["nodes"])
    ours = [node for node in workflow["nodes"] if node["type"] in NODES]
    assert {"TSDSRLoader"} < {node["type"] for node in ours}
    for node in ours:
        found = NODES[node["type"]].define_schema()
        widgets = [widget for widget in found.inputs if hasattr(widget, "default")]
        sent = prompt[str(node["id"])]["inputs"]
        assert len(node["widgets_values"]) == len(widgets)
        for widget, value in zip(widgets, node["widgets_values"], strict=True):
            assert sent[widget.id] == value
            if getattr(widget, "min", None) is not None:
                assert widget.min <= value <= widget.max
            elif getattr(widget, "options", None) and (widget.id, value) != ("model", "tsdsr"):
                assert value in widget.options
        sockets = {widget.id: widget.get_io_type() for widget in found.inputs if not hasattr(widget, "default")}
        assert {socket["name"]: socket["type"] for socket in node["inputs"]} == sockets
        assert [output["type"] for output in node["outputs"]] == [output.get_io_type() for output in found.outputs]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs(name, published, pictures, models):
    """Our nodes of each workflow, in order; what other nodes would give is given."""
    published.rename(models / "tsdsr" / "tsdsr")
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    given = {"IMAGE": pictures(2, 12, 16), "MASK": None}
    results = {}
    for key in sorted(prompt, key=int):
        node = prompt[key]
        if node["class_type"] not in NODES:
            continue
        values = {
            widget: (results.get(value[0], {}).get(value[1], given["IMAGE"]) if isinstance(value, list) else value)
            for widget, value in node["inputs"].items()
        }
        if "process_size" in values:
            values.update(process_size=32, width=min(values["width"], 80))
        output = NODES[node["class_type"]].execute(**values)
        results[key] = dict(enumerate(output.result))
    final = [result[0] for key, result in results.items() if prompt[key]["class_type"] != "TSDSRLoader"]
    expected = {"large_picture_tiled_4k": (60, 80), "video_frames": (24, 32), "batch_of_pictures": (24, 32)}
    assert final and tuple(final[0].shape) == (2, *expected.get(name, (48, 64)), 3)


def test_requirements_agree_with_the_package():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert f'"{line}"' in text, line
