"""The nodes in a real ComfyUI: its graph executor, memory management, queue and websocket."""

import copy
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json"))
# What makes a workflow small enough for a test, by class of node.
SMALL = {
    "TSDSRUpscale": {"process_size": 0},
    "TSDSRTiledUpscale": {"process_size": 0, "width": 0, "tile_size": 128, "tile_overlap": 32},
    "EmptySD3LatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 2},
}


def chain(model="embedded", image="example.png", node="TSDSRUpscale", loader=None, **changes):
    """Loader, picture, upscaler, and its picture and mask saved."""
    defaults = {"upscale": 4.0, "color_fix": "wavelet", "seed": 0, "process_size": 0}
    if node == "TSDSRTiledUpscale":
        defaults |= {"tile_size": 128, "tile_overlap": 32, "tile_batch_size": 2, "vae_tile_size": 256}
    return {
        "1": {"class_type": "TSDSRLoader", "inputs": {"model": model, "dtype": "auto", **(loader or {})}},
        "2": {"class_type": "LoadImage", "inputs": {"image": image}},
        "3": {"class_type": node, "inputs": {"model": ["1", 0], "image": ["2", 0], **defaults, **changes}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "test"}},
    }


def array(picture):
    return np.asarray(picture.convert("RGB")).astype(int)


def test_object_info_describes_every_input(comfy):
    found = comfy.get("/object_info")
    for name in ("TSDSRLoader", "TSDSRUpscale", "TSDSRTiledUpscale", "TSDSRColorMatch"):
        node = found[name]
        assert node["python_module"] == "custom_nodes.ComfyUI-tsdsr" and node["description"] and node["display_name"]
        inputs = {**node["input"]["required"], **node["input"].get("optional", {})}
        assert all(options.get("tooltip") for _, options in inputs.values())
        assert all(node["output_tooltips"])
    advanced = {
        key for key, (_, options) in found["TSDSRUpscale"]["input"]["optional"].items() if options.get("advanced")
    }
    assert advanced == {"width", "height", "lora_strength", "process_size", "sample_posterior"}


def test_start_up_costs_next_to_nothing(comfy):
    line = re.search(r"([\d.]+) seconds(.*): .*ComfyUI-tsdsr", comfy.log())
    assert line and float(line[1]) < 0.5 and "FAILED" not in line[2]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_api_workflow_runs(comfy, name):
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        node["inputs"].update(SMALL.get(node["class_type"], {}))
    run = comfy.run(graph)
    assert run.end == "execution_success", run.data
    assert run.previews > 0
    if name == "video_frames":
        assert list(comfy.base.glob("output/tsdsr/video_*.mp4"))
    else:
        pictures = comfy.pictures(run)
        assert pictures and all(np.ptp(array(picture)) > 20 for picture in pictures)
        # The comparison makes its picture four times smaller first, and shows two side by side.
        size = {"batch_of_pictures": (128, 128), "before_after_comparison": (2 * 64 + 8, 64)}.get(name, (256, 256))
        assert size in {picture.size for picture in pictures}


@pytest.mark.parametrize("node", ["TSDSRUpscale", "TSDSRTiledUpscale"])
@pytest.mark.parametrize(("image", "size"), [("odd.png", (37, 53)), ("example.png", (64, 64))])
def test_sizes(comfy, node, image, size):
    run = comfy.run(chain(image=image, node=node, upscale=3.3))
    assert run.end == "execution_success", run.data
    assert [picture.size for picture in comfy.pictures(run)] == [(round(3.3 * size[0]), round(3.3 * size[1]))]


def test_the_result_is_the_pipelines(comfy):
    from PIL import Image

    from tsdsr import load_pipeline

    picture = Image.open(comfy.base / "input" / "odd.png")
    expected = load_pipeline(device="cpu")(picture, process_size=0).images[0]
    run = comfy.run(chain(image="odd.png"))
    assert np.abs(array(comfy.pictures(run)[0]) - array(expected)).max() <= 1


def test_fifty_runs_leave_memory_flat(comfy):
    used = []
    for seed in range(50):
        run = comfy.run(chain(image="odd.png", seed=seed))
        assert run.end == "execution_success", run.data
        used.append(comfy.memory())
    # The first runs fill the allocator's pools.
    assert max(used[-5:]) - max(used[10:15]) < 30, used


def test_batches_need_no_more_memory_than_their_pictures(comfy):
    def batch(count, seed):
        graph = chain(seed=seed)
        graph["5"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["2", 0], "amount": count}}
        graph["3"]["inputs"]["image"] = ["5", 0]
        return graph

    assert comfy.run(batch(2, 1)).end == "execution_success"
    before = comfy.memory()
    run = comfy.run(batch(24, 2))
    assert len(comfy.pictures(run)) == 24
    # 24 results of 256x256 in float32 are 19 MB, and the host keeps one more copy at times.
    assert comfy.memory() - before < 80


def test_interrupt_while_tiling(comfy):
    graph = chain(node="TSDSRTiledUpscale", upscale=16.0, seed=5, tile_batch_size=1)
    sent = []

    def interrupt(kind, data):
        if kind == "progress" and data["value"] >= 3 and not sent:
            sent.append((time.monotonic(), data["max"]))
            threading.Thread(target=comfy.post, args=("/interrupt", {})).start()

    run = comfy.run(graph, on_event=interrupt)
    assert run.end == "execution_interrupted", run.data
    progress = [(when, data["value"]) for when, kind, data in run.events if kind == "progress"]
    each = (progress[-1][0] - progress[0][0]) / max(1, progress[-1][1] - progress[0][1])
    # No more than the tile in work, with room for a busy machine.
    assert run.events[-1][0] - sent[0][0] < 5 * each + 1.5
    assert progress[-1][1] < sent[0][1]
    assert comfy.run(chain(seed=6)).end == "execution_success"


def test_unload_and_reload_gives_the_same_picture(comfy):
    first = array(comfy.pictures(comfy.run(chain(image="odd.png", seed=100)))[0])
    assert comfy.post("/free", {"unload_models": True, "free_memory": True})[0] == 200
    deadline = time.monotonic() + 20
    loads = comfy.log().count("Requested to load TSDSRNetworks")
    time.sleep(1.5)
    run = comfy.run(chain(image="odd.png", seed=101))
    assert run.end == "execution_success", run.data
    while comfy.log().count("Requested to load TSDSRNetworks") == loads and time.monotonic() < deadline:
        time.sleep(0.2)
    assert comfy.log().count("Requested to load TSDSRNetworks") > loads
    assert np.array_equal(array(comfy.pictures(run)[0]), first)


def test_two_prompts_queued(comfy):
    results = {}

    def follow(seed):
        results[seed] = comfy.run(chain(seed=seed, upscale=2.0))

    threads = [threading.Thread(target=follow, args=(seed,)) for seed in (200, 201)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert {run.end for run in results.values()} == {"execution_success"} and len(results) == 2


def test_alpha_and_masks(comfy):
    graph = chain(image="alpha.png", mask=["2", 1])
    graph["5"] = {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["2", 0], "alpha": ["2", 1]}}
    graph["3"]["inputs"]["image"] = ["5", 0]
    graph["6"] = {"class_type": "MaskToImage", "inputs": {"mask": ["3", 1]}}
    graph["7"] = {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "mask"}}
    run = comfy.run(graph)
    assert run.end == "execution_success", run.data
    picture, mask = sorted(comfy.pictures(run), key=lambda picture: picture.mode, reverse=True)
    assert (picture.mode, picture.size, mask.size) == ("RGBA", (256, 256), (256, 256))
    alpha = np.asarray(picture)[..., 3].astype(int)
    assert np.abs(alpha - (255 - array(mask)[..., 0])).max() <= 2 and np.ptp(alpha) > 200


def test_an_empty_mask_of_another_size(comfy):
    graph = chain(image="odd.png", mask=["5", 0])
    graph["5"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 16, "height": 16}}
    graph["6"] = {"class_type": "MaskToImage", "inputs": {"mask": ["3", 1]}}
    graph["7"] = {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "mask"}}
    run = comfy.run(graph)
    assert run.end == "execution_success", run.data
    assert {picture.size for picture in comfy.pictures(run)} == {(148, 212)}


def test_between_nodes_of_others(comfy):
    graph = chain()
    graph["5"] = {"class_type": "ImageInvert", "inputs": {"image": ["2", 0]}}
    graph["3"]["inputs"]["image"] = ["5", 0]
    graph["6"] = {"class_type": "ImageBlur", "inputs": {"image": ["3", 0], "blur_radius": 2, "sigma": 1.0}}
    graph["7"] = {
        "class_type": "TSDSRColorMatch",
        "inputs": {"image": ["6", 0], "reference": ["2", 0], "method": "lab", "strength": 1.0},
    }
    graph["4"]["inputs"]["images"] = ["7", 0]
    run = comfy.run(graph)
    assert run.end == "execution_success", run.data
    mean = array(comfy.pictures(run)[0]).mean((0, 1))
    from PIL import Image

    wanted = array(Image.open(comfy.base / "input" / "example.png")).mean((0, 1))
    # The reference is the negative of what was enlarged, and colours that leave sRGB are clipped.
    assert np.abs(mean - wanted).max() < 15


def test_lora_strength(comfy):
    pictures = {}
    for strength in (0.0, 0.5, 1.0):
        run = comfy.run(chain("tsdsr", "odd.png", lora_strength=strength, upscale=2.0))
        assert run.end == "execution_success", run.data
        pictures[strength] = array(comfy.pictures(run)[0])
    assert np.abs(pictures[0.0] - pictures[1.0]).mean() > 0.5
    assert np.abs(pictures[0.0] - pictures[0.5]).mean() < np.abs(pictures[0.0] - pictures[1.0]).mean()
    again = comfy.run(chain("tsdsr", "odd.png", lora_strength=1.0, upscale=2.0, seed=9))
    assert np.abs(array(comfy.pictures(again)[0]) - pictures[1.0]).max() <= 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
def test_dtypes(comfy, dtype):
    exact = array(comfy.pictures(comfy.run(chain(image="odd.png", upscale=2.0)))[0])
    run = comfy.run(chain(image="odd.png", upscale=2.0, loader={"dtype": dtype}))
    assert run.end == "execution_success", run.data
    assert np.abs(array(comfy.pictures(run)[0]) - exact).mean() < {"fp8": 3.0}.get(dtype, 1.0)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"model": "nonsense"}, ["nonsense", "models/tsdsr"]),
        ({"model": "loras/nonsense"}, ["nonsense", "models/loras"]),
        ({"base_model": "checkpoints/nonsense.safetensors"}, ["nonsense.safetensors", "models/checkpoints"]),
        ({"vae": "vae/nonsense.safetensors"}, ["nonsense.safetensors", "models/vae"]),
    ],
)
def test_missing_files_name_the_folder(comfy, inputs, said):
    graph = chain()
    graph["1"]["inputs"].update(inputs)
    status, answer = comfy.post("/prompt", {"prompt": graph})
    details = answer["node_errors"]["1"]["errors"][0]["details"].replace("\\", "/")
    assert status == 400 and all(word in details for word in said) and str(comfy.base) in details


def test_a_hub_model_is_not_fetched_without_the_switch(comfy):
    run = comfy.run(chain(loader={"hub_id": "someone/something"}))
    assert run.end == "execution_error"
    assert "switch download on" in run.data["exception_message"]


def test_a_wrong_base_says_what_it_is(comfy):
    import torch
    from safetensors.torch import save_file

    path = comfy.base / "models" / "diffusion_models" / "flux.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, path)
    comfy.get("/object_info/TSDSRLoader")
    run = comfy.run(chain("tsdsr", loader={"base_model": "diffusion_models/flux.safetensors"}))
    path.unlink()
    assert run.end == "execution_error"
    assert "a Flux-like transformer" in run.data["exception_message"] and str(path) in run.data["exception_message"]


def test_templates_help_and_languages_are_served(comfy):
    assert sorted(comfy.get("/workflow_templates")["ComfyUI-tsdsr"]) == WORKFLOWS
    translations = comfy.get("/i18n")
    for language in ("en", "zh", "ja", "ko"):
        assert set(translations[language]["nodeDefs"]) >= {"TSDSRLoader", "TSDSRUpscale"}
    import urllib.request

    for name in WORKFLOWS:
        for suffix in ("json", "jpg"):
            address = f"{comfy.url}/api/workflow_templates/ComfyUI-tsdsr/{name}.{suffix}"
            assert urllib.request.urlopen(address).status == 200
    for page in ("TSDSRLoader.md", "TSDSRUpscale/ja.md"):
        assert urllib.request.urlopen(f"{comfy.url}/extensions/ComfyUI-tsdsr/docs/{page}").status == 200


def test_workflows_agree_with_the_host(comfy):
    """Every UI workflow: known nodes, a value for every widget, links of matching types, all as in its API twin."""
    found = comfy.get("/object_info")
    for name in WORKFLOWS:
        workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
        nodes = {node["id"]: node for node in workflow["nodes"]}
        for node in nodes.values():
            if node["type"] == "MarkdownNote":
                continue
            schema = found[node["type"]]
            inputs = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
            sent = prompt[str(node["id"])]
            assert sent["class_type"] == node["type"] and set(sent["inputs"]) <= set(inputs), (name, node["type"])
            widgets = [key for key, (kind, *_) in inputs.items() if is_widget(kind)]
            values = copy.copy(node["widgets_values"])
            for key in widgets:
                value = values.pop(0)
                linked = isinstance(sent["inputs"][key], list)
                assert linked or sent["inputs"][key] == value, (name, node["type"], key)
                if key in ("seed",) and not node["type"].startswith("TSDSR"):
                    values.pop(0)
                if any(
                    option in (inputs[key][1] if len(inputs[key]) > 1 else {})
                    for option in ("image_upload", "video_upload")
                ):
                    values.pop(0)
            assert not values, (name, node["type"], values)
            assert [output["type"] for output in node["outputs"]] == [
                kind if isinstance(kind, str) else "COMBO" for kind in schema["output"]
            ]
        for _, source, slot, target, position, kind in workflow["links"]:
            assert nodes[source]["outputs"][slot]["type"] == kind
            socket = nodes[target]["inputs"][position]
            assert socket["type"] in (kind, "*")
            assert prompt[str(target)]["inputs"][socket["name"]] == [str(source), slot]


def is_widget(kind):
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
