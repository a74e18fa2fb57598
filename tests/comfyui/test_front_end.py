"""The real front end in headless Chromium: Templates, workflows without missing nodes, a run, its result on the canvas.

With TSDSR_SCREENSHOTS set, the pictures of `docs/images` and the thumbnails of the workflows are taken anew.
"""

import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json"))
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
RENEW = bool(os.environ.get("TSDSR_SCREENSHOTS"))
# Their models are not at hand here, so the graph itself is shown.
GRAPHS_AS_THUMBNAILS = {"after_text_to_image", "published_tsdsr_weights"}


@pytest.fixture(scope="module")
def page(comfy):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if not CHROMIUM:
        pytest.skip("no Chromium: the front end is NOT tested (CHROMIUM names one)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(30_000)
        page.goto(comfy.url)
        page.wait_for_function("window.app && window.app.graph && window.app.canvas", timeout=120_000)
        page.wait_for_timeout(3000)
        yield page
        browser.close()


def close_dialogs(page):
    for _ in range(3):
        page.keyboard.press("Escape")
        page.wait_for_timeout(200)


def open_workflow(page, name):
    """As the Templates dialog does it: the file from the server, loaded into the graph."""
    page.evaluate(
        """async name => {
            const answer = await fetch('/api/workflow_templates/ComfyUI-tsdsr/' + name + '.json');
            await window.app.loadGraphData(await answer.json(), true, true, name);
        }""",
        name,
    )
    page.wait_for_timeout(800)


def fit(page):
    """The whole graph in view, as large as it goes."""
    page.evaluate(
        """() => {
            const nodes = window.app.graph.nodes, canvas = window.app.canvas;
            const box = [1e9, 1e9, -1e9, -1e9];
            for (const n of nodes) {
                box[0] = Math.min(box[0], n.pos[0]); box[1] = Math.min(box[1], n.pos[1] - 40);
                box[2] = Math.max(box[2], n.pos[0] + n.size[0]); box[3] = Math.max(box[3], n.pos[1] + n.size[1]);
            }
            const element = canvas.canvas, ratio = window.devicePixelRatio;
            const width = element.width / ratio - 120, height = element.height / ratio - 120;
            const scale = Math.min(width / (box[2] - box[0]), height / (box[3] - box[1]), 1.2);
            canvas.ds.scale = scale;
            canvas.ds.offset[0] = (60 + width / 2) / scale - (box[0] + box[2]) / 2 + 30 / scale;
            canvas.ds.offset[1] = (60 + height / 2) / scale - (box[1] + box[3]) / 2;
            canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(700)


def shot(page, name):
    path = ROOT / "docs" / "images" / f"{name}.png" if RENEW else None
    data = page.screenshot(path=str(path) if path else None)
    assert len(data) > 20_000
    return data


def run(page, comfy):
    before = len(comfy.get("/history"))
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    deadline = time.monotonic() + 240
    while len(comfy.get("/history")) == before:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    page.wait_for_timeout(2500)
    return list(comfy.get("/history").values())[-1]


def test_templates_lists_ours(page):
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.wait_for_timeout(2500)
    entry = page.get_by_text("ComfyUI-tsdsr", exact=False).first
    entry.wait_for()
    entry.click()
    page.wait_for_timeout(2500)
    text = page.evaluate("() => document.body.innerText")
    for name in WORKFLOWS:
        assert name in text or name.replace("_", " ") in text.lower(), name
    shot(page, "comfyui_templates")
    close_dialogs(page)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_open_without_missing_nodes(page, name):
    open_workflow(page, name)
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    types = page.evaluate(
        "() => window.app.graph.nodes.map(n => [n.type, !!window.LiteGraph.registered_node_types[n.type]])"
    )
    assert all(known for _, known in types), types
    assert sorted(kind for kind, _ in types if kind != "MarkdownNote") == sorted(
        node["class_type"] for node in prompt.values()
    )
    # What the front end would send is the API twin.
    sent = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    for node in sent.values():
        # Boxes of the front end's own, which the server knows nothing of.
        for box in ("preview", "video-preview"):
            node["inputs"].pop(box, None)
    assert {key: (node["class_type"], node["inputs"]) for key, node in sent.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in prompt.items()
    }
    close_dialogs(page)
    fit(page)
    if RENEW and name in GRAPHS_AS_THUMBNAILS:
        box = page.evaluate("() => window.app.canvas.canvas.getBoundingClientRect().toJSON()")
        data = page.screenshot(clip={"x": 60, "y": 40, "width": box["width"] - 300, "height": box["height"] - 40})
        save_thumbnail(Image.open(io.BytesIO(data)), name)


def save_thumbnail(picture, name):
    picture = picture.convert("RGB")
    picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
    picture.save(ROOT / "workflows" / f"{name}.jpg", quality=88)


@pytest.mark.skipif(not RENEW, reason="TSDSR_SCREENSHOTS is not set: thumbnails stay as they are")
@pytest.mark.parametrize("name", sorted({*WORKFLOWS} - GRAPHS_AS_THUMBNAILS))
def test_thumbnail(comfy, name):
    """What the workflow made of the example picture, beside the picture itself."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] == "SaveVideo":
            node["class_type"], node["inputs"] = "SaveImage", {"images": ["6", 0], "filename_prefix": "frames"}
            graph.pop("7")
            break
    results = comfy.pictures(comfy.run(graph, timeout=500))
    before = Image.open(comfy.base / "input" / "example.png").convert("RGB")
    if len(results) > 1:
        sheet = Image.new("RGB", (2 * 480 + 10, 480), "white")
        for index, picture in enumerate(results[:2]):
            sheet.paste(picture.convert("RGB").resize((480, 480), Image.Resampling.LANCZOS), (index * 490, 0))
    elif name == "before_after_comparison":
        sheet = results[0]
    else:
        # Left of the middle as it was, right of it as it is: the middle fifth for large ones.
        zoom = 0.25 if name.startswith("large") else 0.6
        sheet = crop(results[0].convert("RGB"), zoom).resize((640, 640), Image.Resampling.LANCZOS)
        sheet.paste(crop(before, zoom).resize((640, 640), Image.Resampling.NEAREST).crop((0, 0, 318, 640)), (0, 0))
        sheet.paste("white", (318, 0, 322, 640))
    save_thumbnail(sheet, name)


def crop(picture, part):
    width, height = picture.size
    left, top = round(width * (1 - part) / 2), round(height * (1 - part) / 2)
    return picture.crop((left, top, width - left, height - top))


def test_a_workflow_runs_and_shows_its_result(page, comfy):
    open_workflow(page, "upscale_one_photo")
    close_dialogs(page)
    fit(page)
    entry = run(page, comfy)
    assert entry["status"]["status_str"] == "success"
    shown = page.evaluate(
        """() => window.app.graph.nodes.filter(n => n.type === 'SaveImage')
            .map(n => (n.imgs || []).map(i => [i.naturalWidth, i.naturalHeight]))"""
    )
    side = 4 * Image.open(comfy.base / "input" / "example.png").width
    assert shown == [[[side, side]]]
    shot(page, "comfyui_result")


def test_advanced_inputs_are_marked_and_seed_has_no_companion(page):
    open_workflow(page, "upscale_one_photo")
    widgets = page.evaluate(
        """() => window.app.graph.nodes.find(n => n.type === 'TSDSRUpscale')
            .widgets.map(w => [w.name, !!(w.advanced ?? w.options?.advanced)])"""
    )
    names = dict(widgets)
    assert "control_after_generate" not in names
    assert {name for name, marked in names.items() if marked} == {
        "width",
        "height",
        "lora_strength",
        "process_size",
        "sample_posterior",
    }
    close_dialogs(page)
