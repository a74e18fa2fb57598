"""Any size, any memory: strips, what is tried where memory runs out, what overflows, seams."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tsdsr.evaluation.metrics.artefacts import seam_score
from tsdsr.imaging import read
from tsdsr.pipelines import codec
from tsdsr.pipelines.loading import load_pipeline
from tsdsr.pipelines.memory import Tiles
from tsdsr.pipelines.pipeline_tsdsr import TSDSRPipeline
from tsdsr.pipelines.strips import Rows
from tsdsr.pipelines.tiling import TilePlan

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8}
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval" / "RealSR" / "test_LR"


class Lazy:
    """A picture that is read row by row, as `imaging.Picture` is."""

    def __init__(self, array):
        self.array, self.height, self.width, self.most = array, *array.shape[:2], 0

    def rows(self, top, bottom):
        assert 0 <= top < bottom <= self.height
        self.most = max(self.most, bottom - top)
        return np.ascontiguousarray(self.array[top:bottom])


def collect(pipeline, image, **arguments):
    """The strips that a call hands over, joined; checks that they come in order and whole."""
    parts = []

    def take(rows, top):
        assert rows.dtype == np.float32 and top == sum(part.shape[0] for part in parts)
        parts.append(rows.copy())

    assert pipeline(image, rows_callback=take, **arguments).images == []
    return np.concatenate(parts), len(parts)


@pytest.fixture
def photo():
    """(H, W, 3) float32."""

    def make(height, width):
        noise = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(height))
        image = torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 1)
        return image[0].movedim(0, -1).contiguous().numpy()

    return make


@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize("color_fix", ["wavelet", "adain", "lab", "none"])
def test_rows_that_are_handed_over_are_those_of_the_whole(make_pipeline, photo, kind, color_fix):
    pipeline, image = make_pipeline(kind), photo(45, 30)
    arguments = {"color_fix": color_fix, "degrid": 3, "grain": 20, **SMALL}
    whole = pipeline(image, output_type="np", **arguments).images[0]
    lazy = Lazy(image)
    rows, parts = collect(pipeline, lazy, vae_tile_size=16, **arguments)
    assert rows.shape == (180, 120, 3) and parts > 5
    np.testing.assert_allclose(rows, whole, rtol=0, atol=1e-3)
    if kind == "tiny" and color_fix in ("wavelet", "none"):
        assert lazy.most < 30  # never the whole picture
    at_once, parts = collect(pipeline, lazy, **arguments)
    assert parts == 1
    np.testing.assert_allclose(at_once, whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "arguments", [{"upscale": 2.5}, {"height": 77}, {"height": 20, "width": 90}, {"process_size": 96}]
)
def test_rows_of_other_sizes(make_pipeline, photo, arguments):
    pipeline, image = make_pipeline("kl"), photo(21, 34)
    arguments = {**SMALL, **arguments}
    whole = pipeline(image, output_type="np", **arguments).images[0]
    rows, _ = collect(pipeline, image, vae_tile_size=16, **arguments)
    np.testing.assert_allclose(rows, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_vae_strips_do_not_change_the_result(make_pipeline, picture, kind):
    pipeline = make_pipeline(kind)
    results = [
        pipeline(picture(23, 30), vae_tile_size=side, output_type="pt", **SMALL).images for side in (2048, 64, 16)
    ]
    for strips in results[1:]:
        torch.testing.assert_close(strips, results[0], rtol=0, atol=1e-4)
    latents = [
        pipeline(picture(23, 30), vae_tile_size=side, output_type="latent", **SMALL).images for side in (2048, 16)
    ]
    torch.testing.assert_close(latents[1], latents[0], rtol=0, atol=1e-4)


def test_strips_report_like_tiles(make_pipeline, photo):
    seen = []
    pipeline = make_pipeline("kl")
    collect(pipeline, photo(30, 20), vae_tile_size=32, tile_callback=seen.append, **SMALL)
    assert [event.done for event in seen] == sorted({event.done for event in seen}) and seen[-1].done == seen[-1].total
    for stage, scale in (("encode", pipeline.vae_scale_factor), ("decode", 1)):
        events = [event for event in seen if event.stage == stage]
        assert len(events) > 3 and all(event.inputs is None for event in events)
        bottom = 0
        for event in events:
            ((top, left, height, width),) = event.boxes
            assert (top, left, width) == (bottom, 0, event.size[1]) and height == event.outputs.shape[-2] * scale
            bottom = top + height
        assert bottom == event.size[0]


def test_a_sample_stands_for_pictures_beyond_the_limit(make_pipeline, photo, monkeypatch):
    pipeline, image = make_pipeline("kl"), photo(30, 24)
    exact = pipeline(image, output_type="np", **SMALL).images[0]
    monkeypatch.setattr(codec, "EXACT", 32)
    monkeypatch.setattr(codec, "KEPT", 0)
    monkeypatch.setattr(codec, "WINDOW", (24, 96))
    rows, _ = collect(pipeline, Lazy(image), vae_tile_size=32, **SMALL)
    again, _ = collect(pipeline, Lazy(image), vae_tile_size=16, **SMALL)
    assert 1e-6 < np.abs(rows - exact).mean() < 0.05
    np.testing.assert_allclose(again, rows, rtol=0, atol=1e-4)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
def test_maps_go_without_waiting_for_the_garbage_collector(make_pipeline, photo, monkeypatch, sampled):
    if sampled:
        monkeypatch.setattr(codec, "EXACT", 64)
        monkeypatch.setattr(codec, "KEPT", 32 * 32)
    pipeline, image, next_try, left = make_pipeline("kl"), photo(24, 24), TSDSRPipeline._with_less_memory, []

    def alive():
        return sum(isinstance(each, Rows) for each in gc.get_objects())

    def count(*args):
        left.append(alive())
        return next_try(*args)

    def fail_once(*_):
        hook.remove()
        raise MemoryError

    monkeypatch.setattr(TSDSRPipeline, "_with_less_memory", count)
    gc.collect()
    gc.disable()
    try:
        hook = pipeline.vae.decoder.conv_out.register_forward_pre_hook(fail_once)
        pipeline(image, vae_tile_size=32, tile_batch_size=2, **SMALL)
        assert left == [0]
        assert alive() == 0
    finally:
        gc.enable()


def test_smaller_things_are_tried_where_memory_runs_out(make_pipeline, photo, caplog):
    """Fewer tiles, then strips, each said once; the result stays what it was."""
    pipeline, image = make_pipeline("kl"), photo(150, 40)
    arguments = {**SMALL, "tile_size": 128, "tile_overlap": 16}
    expected = pipeline(image, output_type="np", **arguments).images[0]
    most_tiles, most_pixels = 1, 400 * 160

    def few(module, args, kwargs):
        if kwargs["hidden_states"].shape[0] > most_tiles:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def small(module, args):
        if args[0].shape[-2] * args[0].shape[-1] > most_pixels and isinstance(args[0], torch.Tensor):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    pipeline.transformer.register_forward_pre_hook(few, with_kwargs=True)
    pipeline.vae.encoder.register_forward_pre_hook(small)
    result = pipeline(image, output_type="np", tile_batch_size=4, **arguments).images[0]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)
    lines = [record.getMessage() for record in caplog.records if record.name == "tsdsr"]
    assert all(line.startswith("Out of memory: trying again with ") for line in lines)
    assert len(lines) == len(set(lines)) >= 3
    assert "tile_batch_size=2" in lines[0] and "tile_batch_size=1" in lines[1] and "vae_tile_size" in lines[-1]


def test_what_was_handed_over_is_not_handed_over_again(make_pipeline, photo):
    pipeline, image = make_pipeline("tiny"), photo(60, 20)
    expected, _ = collect(pipeline, image, vae_tile_size=32, **SMALL)
    calls = []

    def fail_once(module, args, kwargs):
        calls.append(1)
        if len(calls) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    pipeline.transformer.register_forward_pre_hook(fail_once, with_kwargs=True)
    rows, _ = collect(pipeline, image, vae_tile_size=32, tile_batch_size=2, **SMALL)
    assert len(calls) > 20
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-4)


def test_a_seeded_draw_is_the_same_after_another_try(make_pipeline, photo):
    pipeline, image, calls = make_pipeline("kl"), photo(20, 20), []

    def draw():
        generator = torch.Generator().manual_seed(5)
        return pipeline(image, sample_posterior=True, generator=generator, output_type="np", tile_batch_size=2, **SMALL)

    def fail_once(module, args, kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError

    expected = draw().images
    pipeline.transformer.register_forward_pre_hook(fail_once, with_kwargs=True)
    np.testing.assert_allclose(draw().images, expected, rtol=0, atol=3e-5)


def test_nothing_left_to_try_is_one_sentence(make_pipeline, picture):
    pipeline = make_pipeline()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more words")

    pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(
        MemoryError, match=r"^Not enough memory even with the smallest tiles \(CUDA out of memory[^\n]*\)"
    ):
        pipeline(picture(20, 20), **SMALL)
    pipeline.retries_smaller = False
    with pytest.raises(torch.OutOfMemoryError):
        pipeline(picture(20, 20), **SMALL)


def test_weights_leave_the_device_last(make_pipeline, monkeypatch, caplog):
    pipeline, offloaded = make_pipeline(), []
    monkeypatch.setattr(pipeline, "enable_model_cpu_offload", lambda device: offloaded.append(device))
    tiles = Tiles(256, 64, 1, 256)
    assert pipeline._with_less_memory(tiles, 5000, "full", torch.device("meta")) is tiles
    assert offloaded == [torch.device("meta")] and "weights kept on the CPU" in caplog.text
    with pytest.raises(MemoryError):
        pipeline._with_less_memory(tiles, 5000, "full", torch.device("meta"))


def test_strips_begin_as_small_as_free_memory_asks(make_pipeline, monkeypatch):
    vae, cpu = make_pipeline("kl").vae, torch.device("cpu")

    def plan(free, height=1024, width=1024, colors=False):
        monkeypatch.setattr(codec, "free_memory", lambda device: free)
        return codec.plan_codec(vae, height, width, 2048, 16, cpu, colors)

    assert plan(1e12) == codec.CodecPlan(1, False, False)
    widths, itemsize, _ = codec.needs(vae)
    few = plan(0.5 * 1024 * 1024 * 8 * widths[0] * itemsize)
    assert few.strips > 1 and not few.sampled and few.in_file
    assert plan(1e12, 4096, 4096) == codec.CodecPlan(4, True, False)
    assert plan(1e12, 4096, 4096, True).in_file is False and plan(1e8, 4096, 4096, True).in_file is True


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.fixture
def overflowing(make_pipeline):
    """A pipeline whose given part exceeds float16 (65504) within, with a finite result in float32."""

    def make(part):
        pipeline = make_pipeline("kl")
        if part == "step":
            block = pipeline.transformer.transformer_blocks[0].ff
            block.net[0].proj.bias.data += 6e4
            block.net[2].weight.data *= 30
        else:
            half = pipeline.vae.encoder if part == "encode" else pipeline.vae.decoder
            resnet = half.mid_block.resnets[0]
            resnet.norm2.weight.data *= 6e4
            resnet.norm2.bias.data *= 6e4
            resnet.conv2.weight.data /= 6e4
        return pipeline

    return make


@pytest.mark.parametrize("part", ["encode", "step", "decode"])
@pytest.mark.parametrize("vae_tile_size", [2048, 16])
def test_what_overflows_is_redone_in_float32(overflowing, photo, caplog, part, vae_tile_size):
    pipeline, image = overflowing(part), photo(20, 24)
    arguments = {"output_type": "np", "vae_tile_size": vae_tile_size, **SMALL}
    expected = pipeline(image, **arguments).images[0]
    pipeline.to(dtype=torch.float16)
    before = {name: value.clone() for name, value in pipeline.vae.state_dict().items()}
    caplog.clear()
    result = pipeline([image, image], **arguments).images
    assert np.isfinite(result).all() and np.abs(result[0] - expected).mean() < 0.02
    names = {"encode": "VAE's encoder", "step": "network of the one step", "decode": "VAE's decoder"}
    assert [record.getMessage() for record in caplog.records] == [
        f"The {names[part]} overflowed in float16; what failed is computed again in float32."
    ]
    after = pipeline.vae.state_dict()
    assert all(after[name].dtype == torch.float16 and torch.equal(after[name], value) for name, value in before.items())
    np.testing.assert_array_equal(result[0], result[1])


# --- seams -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    pipeline = load_pipeline("embedded")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def photographs():
    pictures = [read(Path(__file__).parents[1] / "fixtures" / "flower.webp").rgb]
    if SHARED.is_dir():
        names = sorted(os.listdir(SHARED))[:4]
        pictures += [read(SHARED / name).rgb for name in names]
    return [np.ascontiguousarray(picture[:104, :104]) for picture in pictures]


def step(result, lines):
    """The mean step of the grey picture (1, 3, H, W) into each of these rows."""
    return result[0].mean(0).diff(dim=0).abs().mean(1)[torch.tensor(lines) - 1].mean()


def test_tile_borders_do_not_show(embedded):
    """On photographs, the step across borders of tiles grows by tiling no more than that across other lines does."""
    # Sums over the photographs, with tiles and without. What tiles change in one picture they change on any line: the
    # others to compare with lie on the decoder's grid of 8 pixels too.
    across, elsewhere, scores = torch.zeros(2), torch.zeros(2), []
    for image in photographs():
        arguments = {"output_type": "pt", "process_size": 0, "color_fix": "none"}
        tiled = embedded(image, tile_size=128, tile_overlap=32, vae_tile_size=64, **arguments).images
        whole = embedded(image, **arguments).images
        plan = TilePlan.even(tuple(tiled.shape[-2:]), 128, 32, 8)
        assert len(plan.corners) >= 9
        for turn, starts in ((lambda x: x, plan.tops), (lambda x: x.mT, plan.lefts)):
            side = turn(tiled).shape[-2]
            borders = sorted({line for start in starts for line in (start, start + 128) if 6 < line < side - 6})
            others = sorted(set(range(8, side - 6, 8)) - set(borders))
            across += torch.stack([step(turn(result), borders) for result in (tiled, whole)])
            elsewhere += torch.stack([step(turn(result), others) for result in (tiled, whole)])
            scores.append([seam_score(turn(result).contiguous(), rows=borders) for result in (tiled, whole)])
    assert np.mean([tiled_score - whole_score for tiled_score, whole_score in scores]) < 0.02
    assert across[0] / across[1] < 1.02 * elsewhere[0] / elsewhere[1]
    # Both measures see a step of four levels.
    spoiled = turn(tiled).clone()
    for border in borders:
        spoiled[..., border:, :] += 4 / 255
    assert seam_score(spoiled, rows=borders) > 1.5
    assert step(spoiled, borders) > 1.2 * step(turn(tiled), borders)
