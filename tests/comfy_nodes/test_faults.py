"""What other nodes and damaged files may hand to the upscalers: a picture of the right size, or one sentence."""

import gc
import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, ImageSequence

from tsdsr.comfy_nodes import TSDSRTiledUpscale, TSDSRUpscale

SMALL = {"process_size": 32}
TILED = {"tile_size": 64, "tile_overlap": 16, "tile_batch_size": 1, "vae_tile_size": 256}


def run(node, model, image, upscale=2.0, **more):
    arguments = {"color_fix": "wavelet", "seed": 0, **SMALL, **(TILED if node is TSDSRTiledUpscale else {}), **more}
    return node.execute(model=model, image=image, upscale=upscale, **arguments).result


def check(result, size, batch=1, channels=3):
    image, mask = result
    assert tuple(image.shape) == (batch, *size, channels) and image.dtype == torch.float32
    assert tuple(mask.shape[1:]) == size
    for tensor in (image, mask):
        assert torch.isfinite(tensor).all() and tensor.min() >= 0 and tensor.max() <= 1


@pytest.fixture(scope="module", autouse=True)
def quick_collections(embedded):
    """The host collects garbage at every run: what is there already need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=[TSDSRUpscale, TSDSRTiledUpscale], ids=["upscale", "tiled"])
def node(request):
    return request.param


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 33), (33, 1), (1, 300), (300, 1), (2, 200), (5, 7)])
@pytest.mark.parametrize("factor", [1.0, 2.3])
def test_narrow_pictures(embedded, node, pictures, size, factor):
    result = run(node, embedded, pictures(1, *size), factor)
    check(result, (round(factor * size[0]), round(factor * size[1])))


@pytest.mark.parametrize(("width", "height"), [(1, 0), (0, 1), (1, 1), (3, 200), (200, 3)])
def test_extreme_sizes_of_the_result(embedded, node, pictures, width, height):
    image, _ = run(node, embedded, pictures(1, 24, 32), width=width, height=height)
    if width and height:
        assert tuple(image.shape[1:3]) == (height, width)
    assert min(image.shape[1:3]) >= 1 and torch.isfinite(image).all()


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 0, 8, 3), (1, 8, 0, 3), (0, 0, 0, 3), (1, 8, 8, 0), (1, 8, 8, 2),
                                   (1, 8, 8, 5), (1, 3, 8, 8), (8, 8), (8,), (), (1, 1, 8, 8, 3)], ids=str)  # fmt: skip
def test_what_is_no_picture_is_refused(embedded, node, one_sentence, shape):
    with pytest.raises(ValueError) as error:
        run(node, embedded, torch.zeros(shape))
    one_sentence(error.value, "image")


@pytest.mark.parametrize("image", [None, "picture.png", [torch.zeros(1, 8, 8, 3)], np.zeros((1, 8, 8, 3), np.float32)])
def test_other_types_are_refused(embedded, node, one_sentence, image):
    with pytest.raises(ValueError) as error:
        run(node, embedded, image)
    one_sentence(error.value, "image", type(image).__name__)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused(embedded, node, pictures, one_sentence, value):
    image = pictures(2, channels=4)
    for place in ((1, 3, 4, 1), (1, 3, 4, 3)):
        broken = image.clone()
        broken[place] = value
        with pytest.raises(ValueError) as error:
            run(node, embedded, broken)
        one_sentence(error.value, "image", "NaN")


@pytest.mark.parametrize("largest", [1e4, 1e30, torch.finfo(torch.float32).max])
def test_values_far_out_of_range_are_as_clamped(embedded, node, pictures, largest):
    image = pictures()
    image[0, 3, 4], image[0, 5, 6] = largest, -largest
    result = run(node, embedded, image)
    check(result, (40, 52))
    assert torch.equal(result[0], run(node, embedded, image.clamp(0, 1))[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(embedded, node, pictures, dtype):
    image = pictures().to(dtype)
    result = run(node, embedded, image)
    check(result, (40, 52))
    assert torch.equal(result[0], run(node, embedded, image.float())[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64])
def test_types_that_are_not_0_to_1_are_refused(embedded, node, pictures, one_sentence, dtype):
    # Clamped to 0..1, levels of 255 would be a white picture.
    with pytest.raises(ValueError) as error:
        run(node, embedded, (255 * pictures()).to(dtype))
    one_sentence(error.value, "image", str(dtype).removeprefix("torch."))


def test_any_layout_of_memory(embedded, node, pictures):
    image = pictures(2, 20, 26)
    expected = run(node, embedded, image)[0]
    padded = torch.zeros(2, 40, 52, 6)
    padded[:, ::2, ::2, ::2] = image
    for other in (
        image.movedim(-1, 1).contiguous().movedim(1, -1),
        padded[:, ::2, ::2, ::2],
        image.flip(2).flip(2),
        image.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert torch.equal(run(node, embedded, other)[0], expected)
    one = image[:1].expand(2, -1, -1, -1)
    assert torch.equal(run(node, embedded, one)[0], expected[:1].expand(2, -1, -1, -1))


def test_the_input_is_left_as_it_was(embedded, node, pictures):
    image, mask = 3 * pictures(channels=4) - 1, 3 * pictures(channels=1)[..., 0] - 1
    before = image.clone(), mask.clone()
    run(node, embedded, image, mask=mask)
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (64, 64), (1, 64, 64), (3, 7, 500), (1, 20, 26), (0, 20, 26), (1, 0, 0), (2, 1, 3)], ids=str
)
def test_masks_of_other_sizes(embedded, node, pictures, shape):
    result = run(node, embedded, pictures(), mask=torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    check(result, (40, 52))
    expected = shape[0] if len(shape) == 3 and 0 not in shape else 1
    assert result[1].shape[0] == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.float64])
def test_masks_of_other_types(embedded, node, pictures, dtype):
    mask = torch.zeros(1, 20, 26)
    mask[:, :10] = 1
    _, enlarged = run(node, embedded, pictures(), mask=mask.to(dtype))
    assert torch.allclose(enlarged, run(node, embedded, pictures(), mask=mask)[1])


@pytest.mark.parametrize("kind", ["one axis", "none", "NaN", "words"])
def test_what_is_no_mask_is_refused_before_anything_is_enlarged(embedded, node, pictures, one_sentence, progress, kind):
    mask = {"one axis": torch.zeros(3), "none": torch.tensor(0.0), "words": "mask"}.get(kind)
    with pytest.raises(ValueError) as error:
        run(node, embedded, pictures(), mask=torch.full((1, 8, 8), float("nan")) if mask is None else mask)
    one_sentence(error.value, "mask")
    assert not any(value for value, *_ in progress)


def test_memory_does_not_grow_with_what_is_refused(embedded, node, pictures):
    def refused(times):
        for _ in range(times):
            broken = torch.full((1, 400, 400, 3), float("nan"))
            with pytest.raises(ValueError):
                run(node, embedded, broken)
        gc.collect()
        return psutil.Process().memory_info().rss

    before = refused(3)
    assert refused(40) - before < 20e6  # of 77 MB


# Files


def load_image(path):
    """IMAGE and MASK of a file, as ComfyUI's LoadImage makes them; broken files are read as far as they go."""
    images, masks, size = [], [], None
    with Image.open(path) as opened:
        for frame in ImageSequence.Iterator(opened):
            frame = ImageOps.exif_transpose(frame)
            if frame.mode == "I":
                frame = frame.point(lambda value: value * (1 / 255))
            rgb = frame.convert("RGB")
            size = size or rgb.size
            if rgb.size != size:
                continue
            images.append(torch.from_numpy(np.asarray(rgb).astype(np.float32) / 255)[None])
            if "A" in frame.getbands():
                masks.append(1 - torch.from_numpy(np.asarray(frame.getchannel("A")).astype(np.float32) / 255)[None])
            else:
                masks.append(torch.zeros(1, 64, 64))
            if opened.format == "MPO":
                break
    return torch.cat(images), torch.cat(masks)


def mutated_files(folder, count, seed):
    path = Path(__file__).parents[1] / "fuzz" / "mutations.py"
    if not path.exists():
        pytest.skip("tests/fuzz/mutations.py is not there: damaged files are NOT tried")
    spec = importlib.util.spec_from_file_location("mutations", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module
    spec.loader.exec_module(module)
    return module.mutated_files(folder, count, seed)


def test_damaged_files_give_a_picture_or_are_refused_by_the_loader(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    before, loaded = psutil.Process().memory_info().rss, 0
    for number, path in enumerate(mutated_files(tmp_path, 200, seed=0)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image, mask = load_image(path)
        except Exception:
            # What Pillow refuses never reaches a node; HEIC and some kinds of TIFF it cannot read at all.
            assert not path.name.startswith("whole") or path.suffix in (".heic", ".tif"), path.name
            continue
        loaded += 1
        image, mask = image[:2, :64, :64], mask[:2]
        result = run((TSDSRUpscale, TSDSRTiledUpscale)[number % 2], embedded, image, 1.5, mask=mask)
        size = round(1.5 * image.shape[1]), round(1.5 * image.shape[2])
        check(result, size, batch=len(image))
    assert loaded > 50
    assert psutil.Process().memory_info().rss - before < 500e6
