"""Writes the workflows: `python workflows/build.py`. UI files and their API twins come from one description.

The thumbnails beside them are pictures of the real front end (`tests/comfyui/test_front_end.py` takes them).
"""

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# Sockets of the nodes used, in the order of their schemas: inputs, outputs. Widgets are named where a node is used, in
# the same order; the test compares all of it with the running host.
SOCKETS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "TSDSRLoader": ({}, {"model": "TSDSR_MODEL", "info": "STRING"}),
    "TSDSRUpscale": (
        {"model": "TSDSR_MODEL", "image": "IMAGE", "mask": "MASK"},
        {"image": "IMAGE", "mask": "MASK"},
    ),
    "TSDSRTiledUpscale": (
        {"model": "TSDSR_MODEL", "image": "IMAGE", "mask": "MASK"},
        {"image": "IMAGE", "mask": "MASK"},
    ),
    "TSDSRColorMatch": ({"image": "IMAGE", "reference": "IMAGE"}, {"IMAGE": "IMAGE"}),
    "LoadImage": ({}, {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "SaveImage": ({"images": "IMAGE"}, {}),
    "PreviewImage": ({"images": "IMAGE"}, {}),
    "PreviewAny": ({"source": "*"}, {}),
    "ImageScaleBy": ({"image": "IMAGE"}, {"IMAGE": "IMAGE"}),
    "ImageBatch": ({"image1": "IMAGE", "image2": "IMAGE"}, {"IMAGE": "IMAGE"}),
    "ImageStitch": ({"image1": "IMAGE", "image2": "IMAGE"}, {"IMAGE": "IMAGE"}),
    "JoinImageWithAlpha": ({"image": "IMAGE", "alpha": "MASK"}, {"IMAGE": "IMAGE"}),
    "LoadVideo": ({}, {"VIDEO": "VIDEO"}),
    "GetVideoComponents": ({"video": "VIDEO"}, {"images": "IMAGE", "audio": "AUDIO", "fps": "FLOAT"}),
    "CreateVideo": ({"images": "IMAGE", "audio": "AUDIO"}, {"VIDEO": "VIDEO"}),
    "SaveVideo": ({"video": "VIDEO"}, {}),
    "CheckpointLoaderSimple": ({}, {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "CLIPTextEncode": ({"clip": "CLIP"}, {"CONDITIONING": "CONDITIONING"}),
    "EmptySD3LatentImage": ({}, {"LATENT": "LATENT"}),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {"LATENT": "LATENT"},
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, {"IMAGE": "IMAGE"}),
}
# Widgets that only the front end has, by the widget they stand behind.
FRONT_END_WIDGETS = {("KSampler", "seed"): "randomize", ("LoadImage", "image"): "image", ("LoadVideo", "file"): "image"}
WIDTH, GAP = 320, 60


@dataclass
class Graph:
    """A workflow in the making; nodes are placed where they are added."""

    name: str
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    prompt: dict[str, Any] = field(default_factory=dict)

    def note(self, column: float, row: float, text: str, height: int = 260) -> None:
        """Markdown for the reader, in the UI file alone."""
        self.nodes.append(
            {
                **self._frame("MarkdownNote", column, row, height),
                "title": "Note",
                "widgets_values": [text],
                "color": "#432",
                "bgcolor": "#653",
            }
        )

    def add(
        self, kind: str, column: float, row: float, *, tall: int = 120, title: str | None = None, **values: Any
    ) -> dict[str, tuple[dict, int]]:
        """A node; `values` are its widgets in order, and links as what another `add` returned under an output's name.

        Returns:
            Its outputs by name.
        """
        inputs, outputs = SOCKETS[kind]
        node = self._frame(kind, column, row, tall)
        if title:
            node["title"] = title
        sockets, widgets, sent = [], [], {}
        for name, value in values.items():
            if isinstance(value, tuple):
                source, slot = value
                link = [
                    len(self.links) + 1,
                    source["id"],
                    slot,
                    node["id"],
                    len(sockets),
                    source["outputs"][slot]["type"],
                ]
                self.links.append(link)
                source["outputs"][slot]["links"].append(link[0])
                socket = {"name": name, "type": inputs.get(name, link[5]), "link": link[0]}
                if name not in inputs:
                    # A widget that something is linked to keeps its place among the values.
                    socket["widget"] = {"name": name}
                    widgets.append(30)
                sockets.append(socket)
                sent[name] = [str(source["id"]), slot]
            else:
                widgets.append(value)
                sent[name] = value
                if (kind, name) in FRONT_END_WIDGETS:
                    widgets.append(FRONT_END_WIDGETS[kind, name])
        for name, socket_type in inputs.items():
            if name not in values:
                sockets.append(
                    {"name": name, "type": socket_type, "link": None, **({"shape": 7} if name == "mask" else {})}
                )
        node["inputs"] = sockets
        node["outputs"] = [{"name": name, "type": kind_, "links": []} for name, kind_ in outputs.items()]
        node["widgets_values"] = widgets
        self.nodes.append(node)
        self.prompt[str(node["id"])] = {
            "class_type": kind,
            "inputs": sent,
            **({"_meta": {"title": title}} if title else {}),
        }
        return {name: (node, slot) for slot, name in enumerate(outputs)}

    def _frame(self, kind: str, column: float, row: float, height: int) -> dict[str, Any]:
        ours = kind.startswith("TSDSR")
        pack = {"cnr_id": "tsdsr" if ours else "comfy-core"}
        return {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [round(column * (WIDTH + GAP)), round(row)],
            "size": [WIDTH, height],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {} if kind == "MarkdownNote" else {**pack, "Node name for S&R": kind},
            "widgets_values": [],
        }

    def write(self) -> None:
        """Both files."""
        workflow = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"tsdsr/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {"ds": {"scale": 0.8, "offset": [80, 120]}},
            "version": 0.4,
        }
        for path, content in ((HERE, workflow), (HERE / "api", self.prompt)):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (path / f"{self.name}.json").write_text(text, encoding="utf-8")


def loader(graph: Graph, row: float = 0, **changes: Any) -> dict[str, tuple[dict, int]]:
    values = {
        "model": "embedded",
        "dtype": "auto",
        "base_model": "automatic",
        "vae": "automatic",
        "merge_lora": False,
        "compile": False,
        "hub_id": "",
        "download": False,
    }
    made = graph.add("TSDSRLoader", 0, row, tall=270, **{**values, **changes})
    graph.add("PreviewAny", 0, row + 330, tall=190, title="What the model is", source=made["info"])
    return made


def upscale(
    graph: Graph, column: float, row: float, model: Any, image: Any, upscale: float = 4.0, **more: Any
) -> dict[str, tuple[dict, int]]:
    links = {key: value for key, value in more.items() if isinstance(value, tuple)}
    values = {
        "upscale": upscale,
        "color_fix": "wavelet",
        "seed": 0,
        "width": 0,
        "height": 0,
        "lora_strength": 1.0,
        "process_size": 512,
        "sample_posterior": False,
    }
    return graph.add("TSDSRUpscale", column, row, tall=560, model=model, image=image, **links, **values)


def one_photo() -> Graph:
    graph = Graph("upscale_one_photo")
    model = loader(graph)["model"]
    photo = graph.add("LoadImage", 0, 580, tall=330, image="example.png")
    graph.note(
        1,
        620,
        "## Upscale one photo\n\nChoose your photograph in **Load Image** and run. The **embedded** model ships with the "
        "nodes: nothing is downloaded, and it runs without a GPU.\n\nThe models are made for a factor of 4. **color_fix** "
        "keeps the colours of the photograph. **width** and **height** ask for an exact size instead of a factor; some "
        "versions of ComfyUI hide them until you right-click the node and show its advanced inputs.",
        320,
    )
    big = upscale(graph, 1, 0, model, photo["IMAGE"])
    graph.add("SaveImage", 2, 0, tall=590, images=big["image"], filename_prefix="tsdsr/photo")
    return graph


def published_weights() -> Graph:
    graph = Graph("published_tsdsr_weights")
    model = loader(graph, model="tsdsr")["model"]
    photo = graph.add("LoadImage", 0, 580, tall=330, image="example.png")
    graph.note(
        1,
        620,
        "## Published TSD-SR weights\n\n1. Put `transformer.safetensors`, `vae.safetensors`, `prompt_embeds.pt` and "
        "`pool_embeds.pt` of the TSD-SR release (github.com/Microtreei/TSD-SR) into the folder `models/tsdsr/tsdsr`.\n2. "
        "Put Stable Diffusion 3 medium, for example `sd3_medium.safetensors`, into `models/checkpoints`.\n3. Press R, "
        "choose **tsdsr** in the loader, run.\n\nThe base is found by itself, or chosen in **base_model**. SD3 is under "
        "the Stability AI Community License. On 8 GB of GPU memory choose dtype **fp8**.\n\n**lora_strength** (advanced) "
        "goes from 0, plain SD3, to 1, TSD-SR.",
        420,
    )
    big = upscale(graph, 1, 0, model, photo["IMAGE"])
    graph.add("SaveImage", 2, 0, tall=590, images=big["image"], filename_prefix="tsdsr/published")
    return graph


def tiled() -> Graph:
    graph = Graph("large_picture_tiled_4k")
    model = loader(graph)["model"]
    photo = graph.add("LoadImage", 0, 580, tall=330, image="example.png")
    graph.note(
        1,
        710,
        "## Large pictures, tiled: 4K and beyond\n\n**width** (advanced) asks for 4096 pixels here; set it to 0 to go by "
        "**upscale** instead. Any size works: tiles are blended with smooth weights, and colours are corrected once for "
        "the whole picture.\n\n**tile_batch_size** runs several tiles at once: faster on a large GPU. Where memory runs "
        "out it is halved, then tiles become smaller; the console says so. Cancel stops between two tiles.",
        360,
    )
    big = graph.add(
        "TSDSRTiledUpscale",
        1,
        0,
        tall=650,
        model=model,
        image=photo["IMAGE"],
        upscale=4.0,
        color_fix="wavelet",
        seed=0,
        tile_size=512,
        tile_overlap=64,
        tile_batch_size=4,
        vae_tile_size=2048,
        width=4096,
        height=0,
        lora_strength=1.0,
        process_size=512,
        sample_posterior=False,
    )
    graph.add("SaveImage", 2, 0, tall=590, images=big["image"], filename_prefix="tsdsr/4k")
    return graph


def video() -> Graph:
    graph = Graph("video_frames")
    model = loader(graph)["model"]
    film = graph.add("LoadVideo", 0, 580, tall=340, file="video.mp4")
    parts = graph.add("GetVideoComponents", 0, 980, tall=80, video=film["VIDEO"])
    graph.note(
        1,
        620,
        "## Video, frame by frame\n\nChoose a short clip in **Load Video**. Frames are enlarged one after the other, so "
        "the memory that is needed does not grow with their number; the enlarged frames themselves are held until the "
        "video is written.\n\nThe same graph serves any batch of pictures of one size. Every frame is treated the same "
        "way, with no draw of chance, so that still parts stay still.",
        330,
    )
    big = upscale(graph, 1, 0, model, parts["images"], 2.0)
    made = graph.add("CreateVideo", 2, 0, tall=80, images=big["image"], audio=parts["audio"], fps=parts["fps"])
    graph.add(
        "SaveVideo", 2, 140, tall=300, video=made["VIDEO"], filename_prefix="tsdsr/video", format="auto", codec="auto"
    )
    return graph


def batch() -> Graph:
    graph = Graph("batch_of_pictures")
    model = loader(graph)["model"]
    first = graph.add("LoadImage", 0, 580, tall=330, image="example.png")
    second = graph.add("LoadImage", 0, 970, tall=330, image="example.png")
    both = graph.add("ImageBatch", 1, 620, tall=60, image1=first["IMAGE"], image2=second["IMAGE"])
    graph.note(
        1,
        740,
        "## A batch of pictures\n\nA batch holds pictures of one size (**Batch Images** fits the second to the first). "
        "They are enlarged one after the other, in constant memory, with one progress bar.",
        200,
    )
    big = upscale(graph, 1, 0, model, both["IMAGE"], 2.0)
    graph.add("SaveImage", 2, 0, tall=590, images=big["image"], filename_prefix="tsdsr/batch")
    return graph


def before_after() -> Graph:
    graph = Graph("before_after_comparison")
    model = loader(graph)["model"]
    photo = graph.add("LoadImage", 0, 580, tall=330, image="example.png")
    small = graph.add(
        "ImageScaleBy",
        1,
        620,
        tall=90,
        title="Make it small",
        image=photo["IMAGE"],
        upscale_method="area",
        scale_by=0.25,
    )
    graph.note(
        2,
        690,
        "## Before and after\n\nThe picture is made four times smaller, then enlarged again: by bicubic interpolation "
        "(left) and by TSD-SR (right). Bypass **Make it small** (Ctrl+B) to compare on a photograph that is small by "
        "itself.",
        230,
    )
    big = upscale(graph, 1, 0, model, small["IMAGE"])
    bicubic = graph.add(
        "ImageScaleBy",
        1,
        770,
        tall=90,
        title="Bicubic",
        image=small["IMAGE"],
        upscale_method="bicubic",
        scale_by=4.0,
    )
    pair = graph.add(
        "ImageStitch",
        2,
        0,
        tall=150,
        image1=bicubic["IMAGE"],
        image2=big["image"],
        direction="right",
        match_image_size=True,
        spacing_width=8,
        spacing_color="white",
    )
    graph.add("SaveImage", 2, 210, tall=420, images=pair["IMAGE"], filename_prefix="tsdsr/before_after")
    return graph


def text_to_image() -> Graph:
    graph = Graph("after_text_to_image")
    made = graph.add("CheckpointLoaderSimple", 0, 580, tall=100, ckpt_name="sd3_medium_incl_clips_t5xxlfp8.safetensors")
    positive = graph.add(
        "CLIPTextEncode",
        1,
        620,
        tall=140,
        title="What to show",
        clip=made["CLIP"],
        text="a photograph of an old fisherman mending a net in the morning light, harbour behind him, 35 mm",
    )
    negative = graph.add("CLIPTextEncode", 1, 810, tall=100, title="What to avoid", clip=made["CLIP"], text="")
    empty = graph.add("EmptySD3LatentImage", 1, 960, tall=110, width=1024, height=1024, batch_size=1)
    sampled = graph.add(
        "KSampler",
        2,
        460,
        tall=270,
        model=made["MODEL"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=empty["LATENT"],
        seed=0,
        steps=28,
        cfg=4.5,
        sampler_name="dpmpp_2m",
        scheduler="sgm_uniform",
        denoise=1.0,
    )
    decoded = graph.add("VAEDecode", 2, 800, tall=60, samples=sampled["LATENT"], vae=made["VAE"])
    model = loader(graph)["model"]
    graph.note(
        0,
        740,
        "## After text to image\n\nAny graph that ends in an image can go on like this: connect the image to **TSD-SR "
        "Upscale**. Here Stable Diffusion 3 makes 1024x1024, and one more step makes 4096x4096.\n\nThe image model is "
        "moved out of the GPU's memory by ComfyUI when the upscaler needs the room.",
        280,
    )
    big = upscale(graph, 1, 0, model, decoded["IMAGE"])
    graph.add("SaveImage", 3, 0, tall=590, images=big["image"], filename_prefix="tsdsr/text_to_image")
    graph.add("PreviewImage", 2, 0, tall=400, title="Before", images=decoded["IMAGE"])
    return graph


def main() -> None:
    (HERE / "api").mkdir(exist_ok=True)
    for make in (one_photo, published_weights, tiled, video, batch, before_after, text_to_image):
        make().write()


if __name__ == "__main__":
    main()
