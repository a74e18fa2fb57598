"""The upscalers and the colour match: pictures, masks, progress, interrupts, memory."""

import gc
import weakref

import pytest
import torch

from tsdsr.comfy_nodes import TSDSRColorMatch, TSDSRLoader, TSDSRTiledUpscale, TSDSRUpscale

TILES = {"tile_size": 64, "tile_overlap": 16, "tile_batch_size": 1}


def upscale(model, image, upscale=2.0, color_fix="wavelet", **more):
    arguments = {"process_size": 32, **more}
    return TSDSRUpscale.execute(
        model=model, image=image, upscale=upscale, color_fix=color_fix, seed=0, **arguments
    ).result


def tiled(model, image, upscale=2.0, color_fix="wavelet", **more):
    arguments = {**TILES, "process_size": 0, **more}
    return TSDSRTiledUpscale.execute(
        model=model, image=image, upscale=upscale, color_fix=color_fix, seed=0, **arguments
    ).result


@pytest.mark.parametrize("color_fix", ["wavelet", "adain", "lab", "none"])
def test_the_result_is_the_pipelines(embedded, pictures, color_fix):
    image = pictures()
    expected = embedded.pipeline(
        image.movedim(-1, 1), upscale=2.0, color_fix=color_fix, process_size=32, output_type="pt"
    ).images
    result, mask = upscale(embedded, image, color_fix=color_fix)
    assert torch.equal(result, expected.movedim(1, -1))
    assert result.dtype == torch.float32 and tuple(mask.shape) == (1, 40, 52) and not mask.any()
    # No 8-bit round trip: far more levels than 256.
    assert len(result.unique()) > 1000


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (37, 53)])
@pytest.mark.parametrize("factor", [1.0, 1.7, 4.0])
def test_sizes(embedded, pictures, size, factor):
    result, _ = upscale(embedded, pictures(1, *size), factor)
    assert tuple(result.shape) == (1, round(factor * size[0]), round(factor * size[1]), 3)


@pytest.mark.parametrize(("given", "expected"), [((60, 0), (46, 60)), ((0, 46), (46, 60)), ((70, 30), (30, 70))])
def test_target_size(embedded, pictures, given, expected):
    width, height = given
    result, mask = upscale(embedded, pictures(), width=width, height=height)
    assert tuple(result.shape[1:3]) == tuple(mask.shape[1:]) == expected


def test_batches_are_their_pictures(embedded, pictures):
    batch = pictures(3)
    results, _ = upscale(embedded, batch)
    for index in range(3):
        assert torch.equal(results[index : index + 1], upscale(embedded, batch[index : index + 1])[0])


def test_one_picture_at_a_time(embedded, pictures):
    """Whatever the number of pictures, the networks see one."""
    seen = []
    hook = embedded.pipeline.vae.encoder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    upscale(embedded, pictures(5))
    hook.remove()
    assert seen == [1] * 5


def test_alpha_is_enlarged_and_rejoined(embedded, pictures):
    image = pictures(2, channels=4)
    result, mask = upscale(embedded, image)
    assert tuple(result.shape) == (2, 40, 52, 4)
    assert torch.equal(result[..., :3], upscale(embedded, image[..., :3])[0])
    small = torch.nn.functional.interpolate(result[..., 3][:, None], (20, 26), mode="area")[:, 0]
    assert (small - image[..., 3]).abs().mean() < 0.02
    assert torch.equal(mask, 1 - result[..., 3])


@pytest.mark.parametrize("shape", [(1, 20, 26), (20, 26), (3, 64, 64), (1, 1, 1), (2, 1, 20, 26)])
def test_masks_of_any_shape(embedded, pictures, shape):
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    _, mask = upscale(embedded, pictures(), mask=given)
    count = given.numel() // (shape[-1] * shape[-2])
    assert tuple(mask.shape) == (count, 40, 52) and mask.min() >= 0 and mask.max() <= 1
    if shape == (1, 20, 26):
        small = torch.nn.functional.interpolate(mask[:, None], (20, 26), mode="area")[:, 0]
        assert (small - given).abs().mean() < 0.1


@pytest.mark.parametrize("given", [None, torch.zeros(0, 20, 26), torch.zeros(1, 64, 64)])
def test_empty_masks(embedded, pictures, given):
    _, mask = upscale(embedded, pictures(), mask=given)
    assert tuple(mask.shape) == (1, 40, 52) and not mask.any()


def test_greyscale_half_precision_and_values_outside(embedded, pictures):
    grey = pictures(channels=1)
    result, _ = upscale(embedded, grey)
    assert torch.equal(result, upscale(embedded, grey.expand(-1, -1, -1, 3))[0])
    assert upscale(embedded, pictures().half())[0].dtype == torch.float32
    wild = pictures() * 3 - 1
    assert torch.equal(upscale(embedded, wild)[0], upscale(embedded, wild.clamp(0, 1))[0])
    assert wild.max() > 1  # the input itself is left as it was


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.full((1, 4, 4, 3), float("nan")), "NaN"),
        (torch.zeros(0, 4, 4, 3), "at least one pixel"),
        (torch.zeros(1, 4, 4, 7), "1, 3 or 4 channels"),
        ("text", "connect an IMAGE"),
    ],
)
def test_bad_pictures(embedded, image, said):
    with pytest.raises(ValueError, match=said):
        upscale(embedded, image)


@pytest.mark.parametrize("tile_batch_size", [1, 3])
def test_tiles(embedded, pictures, tile_batch_size):
    image = pictures(1, 50, 40)
    result, _ = tiled(embedded, image, tile_batch_size=tile_batch_size, vae_tile_size=256)
    expected = embedded.pipeline(
        image.movedim(-1, 1),
        upscale=2.0,
        process_size=0,
        output_type="pt",
        vae_tile_size=256,
        **{**TILES, "tile_batch_size": tile_batch_size},
    ).images
    assert torch.equal(result, expected.movedim(1, -1))


def test_overlap_is_validated():
    good = {"tile_size": 128, "tile_overlap": 32}
    assert TSDSRTiledUpscale.validate_inputs(**good) is True
    assert "tile_size (128)" in TSDSRTiledUpscale.validate_inputs(**{**good, "tile_overlap": 120})
    assert TSDSRTiledUpscale.validate_inputs(**{**good, "tile_size": None, "tile_overlap": 120}) is True


def test_sampled_posterior_follows_the_seed(make_pipeline, pictures):
    from tsdsr.comfy_nodes.hosting import HostedModel

    model = HostedModel(make_pipeline(vae="kl"), "")

    def draw(seed, **more):
        inputs = {"upscale": 2.0, "color_fix": "none", "seed": seed, "process_size": 32, **more}
        return TSDSRUpscale.execute(model=model, image=pictures(), **inputs).result[0]

    assert torch.equal(draw(1), draw(2))
    sampled = draw(1, sample_posterior=True)
    assert torch.equal(sampled, draw(1, sample_posterior=True))
    assert not torch.equal(sampled, draw(2, sample_posterior=True))


# --- progress, preview, interrupt ------------------------------------------------------------------------------------


def test_progress_counts_tiles_of_all_pictures(embedded, pictures, progress):
    tiled(embedded, pictures(3, 40, 40))
    values = [value for value, _, _ in progress]
    totals = {total for _, total, _ in progress}
    assert len(totals) == 1 and values[-1] == totals.pop() and values == sorted(set(values))


def test_preview_shows_the_finished_tiles(embedded, pictures, progress, monkeypatch):
    from tsdsr.comfy_nodes import preview

    monkeypatch.setattr(preview, "INTERVAL", 0.0)
    image = pictures(1, 40, 60)
    result, _ = tiled(embedded, image, color_fix="none")
    previews = [shown for _, _, shown in progress if shown]
    kind, last, longest = previews[-1]
    assert kind == "JPEG" and max(last.size) == longest == preview.LONGEST
    import numpy as np

    shown = torch.from_numpy(np.asarray(last)).float().movedim(-1, 0)[None] / 255
    whole = torch.nn.functional.interpolate(result.movedim(-1, 1), shown.shape[-2:], mode="bicubic", antialias=True)
    assert (shown - whole).abs().mean() < 0.02
    # Tile after tile, the preview changes.
    assert len({shown.tobytes() for _, shown, _ in previews}) >= 4


def test_latents_are_shown_in_about_the_right_colours(embedded, pictures):
    from tsdsr.comfy_nodes.preview import latents_to_rgb

    smooth = pictures(1, 64, 64).movedim(-1, 1)
    # Noise, which the model takes away, sets input and result apart.
    noise = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    image = (smooth + 0.05 * noise).clamp(0, 1)
    events = []
    result = embedded.pipeline(
        image, upscale=2.0, process_size=0, color_fix="none", output_type="pt", tile_callback=events.append
    )
    step = next(event for event in events if event.stage == "step")
    guess = latents_to_rgb(step.inputs, step.outputs, image)
    truth = torch.nn.functional.interpolate(result.images, guess.shape[-2:], mode="area")
    error = (guess - truth).abs().mean()
    assert error < 0.06
    # It is the result that is shown, not the input, and not what is as far on the other side of it.
    assert error < (latents_to_rgb(step.inputs, step.inputs, image) - truth).abs().mean()
    assert error < (latents_to_rgb(step.inputs, 2 * step.inputs - step.outputs, image) - truth).abs().mean()


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_the_preview_of_a_step_is_of_its_result(make_pipeline, picture, progress, monkeypatch, network):
    """The colours come from the result's latents, whatever the network predicts."""
    from tsdsr.comfy_nodes import preview

    pipeline, seen, events = make_pipeline("kl", network=network), [], []
    real = preview.latents_to_rgb
    monkeypatch.setattr(preview, "latents_to_rgb", lambda *tensors: (seen.append(tensors), real(*tensors))[1])
    shown = preview.Progress(1)
    image = torch.from_numpy(picture(16, 16)).movedim(-1, 0)[None]
    shown.start(image)

    def watch(event):
        events.append(event)
        shown.tiles_done(event)

    result = pipeline(image, process_size=0, output_type="latent", tile_callback=watch).images
    ((latents, painted, _),) = seen
    step = next(event for event in events if event.stage == "step")
    torch.testing.assert_close(painted, result)
    assert torch.equal(latents, step.inputs) and not torch.allclose(painted, latents, atol=1e-2)


def test_a_unet_runs_in_tiles(make_pipeline, pictures, progress):
    from tsdsr.comfy_nodes.hosting import HostedModel

    pipeline = make_pipeline("kl", network="unet")
    model, image = HostedModel(pipeline, ""), pictures(1, 50, 40)
    result, _ = tiled(model, image)
    expected = pipeline(image.movedim(-1, 1), upscale=2.0, process_size=0, output_type="pt", **TILES).images
    assert torch.equal(result, expected.movedim(1, -1))
    assert progress and progress[-1][0] == progress[-1][1]


def test_interrupt_between_tiles(embedded, pictures, progress, monkeypatch):
    from comfy import model_management

    calls = []

    def forward(_, __):
        calls.append(1)
        if len(calls) == 2:
            model_management.interrupt_current_processing(True)

    hook = embedded.pipeline.transformer.register_forward_pre_hook(forward)
    try:
        with pytest.raises(model_management.InterruptProcessingException):
            tiled(embedded, pictures(4, 60, 60))
    finally:
        hook.remove()
        model_management.interrupt_current_processing(False)
    assert len(calls) == 2  # the tile in work is finished, the next is not begun
    assert tuple(tiled(embedded, pictures(1, 40, 40))[0].shape) == (1, 80, 80, 3)


# --- memory ----------------------------------------------------------------------------------------------------------


def hungry(model, limit):
    """Let the transformer run out of memory for more than `limit` latents at once."""

    def forward(_, __, arguments):
        latents = arguments["hidden_states"]
        if latents.shape[0] * latents.shape[-1] * latents.shape[-2] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")

    return model.pipeline.transformer.register_forward_pre_hook(forward, with_kwargs=True)


def test_out_of_memory_first_runs_fewer_tiles_then_smaller_ones(embedded, pictures, caplog):
    image = pictures(1, 130, 70)
    arguments = {"upscale": 4.0, "tile_size": 512, "tile_overlap": 64, "tile_batch_size": 4}
    hook = hungry(embedded, 64 * 64)  # tiles of 256 pixels at f = 4, one at a time
    try:
        result, _ = tiled(embedded, image, **arguments)
    finally:
        hook.remove()
    said = [record.getMessage() for record in caplog.records if "Out of memory" in record.getMessage()]
    assert [int(line.split("tile_batch_size ")[1].split(",")[0]) for line in said[:2]] == [2, 1]
    assert "tile_size 256" in said[-1]
    same, _ = tiled(embedded, image, **{**arguments, "tile_size": 256, "vae_tile_size": 256, "tile_batch_size": 1})
    assert torch.equal(result, same)


def test_out_of_memory_for_good_gives_advice(embedded, pictures):
    hook = hungry(embedded, 1)
    try:
        with pytest.raises(MemoryError, match=r"Not enough memory for 104x80 .* fp8"):
            tiled(embedded, pictures(1, 40, 52))
    finally:
        hook.remove()
    assert tuple(tiled(embedded, pictures(1, 40, 52))[0].shape) == (1, 80, 104, 3)


def test_results_that_do_not_fit_give_advice(embedded, pictures, monkeypatch):
    real = torch.empty

    def full(*size, **options):
        if size[1:3] == (40, 52):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match=r"hold 2 results of 52x40 .* fewer pictures"):
        upscale(embedded, pictures(2))


def test_weights_that_do_not_fit_give_advice(embedded, pictures, monkeypatch):
    from comfy import model_management

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_management, "load_models_gpu", full)
    with pytest.raises(MemoryError, match="weights do not fit into memory; choose dtype fp8"):
        upscale(embedded, pictures())


def test_weights_the_host_leaves_behind_are_moved_for_the_run(embedded, pictures, monkeypatch):
    """With --novram the host loads nothing that it cannot cast layer by layer."""
    from comfy import model_management

    moved = []
    networks = embedded.patcher.model
    monkeypatch.setattr(model_management, "load_models_gpu", lambda *_, **__: None)
    monkeypatch.setattr(embedded.patcher, "load_device", torch.device("meta"))
    monkeypatch.setattr(type(networks), "to", lambda self, device: moved.append(str(device)))
    with embedded.ready(0):
        assert moved == ["meta"]
    assert moved == ["meta", "cpu"]


def test_other_errors_are_not_taken_for_memory(embedded, pictures):
    hook = embedded.pipeline.transformer.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            tiled(embedded, pictures())
    finally:
        hook.remove()


def test_a_failing_compiler_is_left_out(embedded, pictures, caplog):
    from tsdsr.comfy_nodes.hosting import _stop_compiling

    expected = upscale(embedded, pictures())[0]
    model = TSDSRLoader.execute("embedded", "auto").result[0]
    failure = type("BackendFailure", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def broken(*_, **__):
        raise failure("no compiler")

    model.pipeline.transformer._compiled_call_impl = broken
    assert torch.equal(upscale(model, pictures())[0], expected)
    assert "going on without" in caplog.text and not _stop_compiling(model.pipeline)


def test_compile_is_asked_for_what_is_called(pictures, monkeypatch):
    """Compiling itself takes minutes; that it is in the way of every call of the networks is checked instead."""
    asked, called = [], []

    def compiled(self, **options):
        asked.append((type(self).__name__, options))
        self._compiled_call_impl = lambda *args, **kwargs: (
            called.append(type(self).__name__),
            self.forward(*args, **kwargs),
        )[1]

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    model = TSDSRLoader.execute("embedded", "auto", compile=True).result[0]
    upscale(model, pictures())
    names = ["EncoderTiny", "OneStepSD3Transformer2DModel", "DecoderTiny"]
    assert asked == [(name, {"dynamic": True}) for name in names] and called == names


def test_a_model_that_nobody_holds_is_freed(pictures):
    from comfy import model_management

    model = TSDSRLoader.execute("embedded", "auto").result[0]
    upscale(model, pictures())
    networks = weakref.ref(model.patcher.model)
    model_management.unload_all_models()
    del model
    gc.collect()
    assert networks() is None


def test_evicted_and_back(embedded, pictures):
    from comfy import model_management

    first = upscale(embedded, pictures())[0]
    model_management.unload_all_models()
    assert embedded.patcher not in model_management.loaded_models()
    assert torch.equal(upscale(embedded, pictures())[0], first)


def test_runs_leave_nothing_behind(make_pipeline, pictures):
    from tsdsr.comfy_nodes.hosting import HostedModel

    model = HostedModel(make_pipeline(), "")

    def tensors():
        gc.collect()
        return sum(1 for thing in gc.get_objects() if isinstance(thing, torch.Tensor))

    image = pictures(1, 8, 8)
    for _ in range(3):
        upscale(model, image, process_size=0)
    before = tensors()
    for _ in range(50):
        upscale(model, image, process_size=0)
    assert tensors() <= before


def test_inference_mode_of_the_host(pictures):
    """The host runs nodes in inference mode, and frees models outside of it."""
    from comfy import model_management

    with torch.inference_mode():
        model = TSDSRLoader.execute("embedded", "auto").result[0]
        first = upscale(model, pictures())[0]
    model_management.unload_all_models()
    assert not any(weight.is_inference() for weight in model.patcher.model.parameters())
    with torch.inference_mode():
        assert torch.equal(upscale(model, pictures())[0], first)


# --- colour match ----------------------------------------------------------------------------------------------------


def match(image, reference, method="adain", strength=1.0):
    return TSDSRColorMatch.execute(image, reference, method, strength).result[0]


@pytest.mark.parametrize("method", ["wavelet", "adain", "lab"])
@pytest.mark.parametrize("size", [(8, 9), (20, 26), (50, 70)])
def test_color_match(pictures, method, size):
    image = pictures()
    reference = torch.nn.functional.interpolate(image.movedim(-1, 1), size, mode="area").movedim(1, -1) * 0.5 + 0.2
    result = match(image, reference, method)
    assert result.shape == image.shape
    wanted, before = reference.mean((1, 2)), image.mean((1, 2))
    # wavelet only moves the coarse colours, and near the borders these are not quite the mean.
    bound = 0.7 if method == "wavelet" else 0.25
    assert (result.mean((1, 2)) - wanted).abs().max() < bound * (before - wanted).abs().max()


def test_color_match_strength_alpha_and_batches(pictures):
    image, reference = pictures(2, channels=4), pictures(1, seed=3)
    result = match(image, reference)
    assert torch.equal(result[..., 3], image[..., 3])
    torch.testing.assert_close(match(image, reference, strength=0.0), image)
    half = match(image, reference, strength=0.5)[..., :3]
    torch.testing.assert_close(half, (image + result)[..., :3] / 2)
    each = match(image, pictures(2, seed=3))
    assert not torch.equal(each[1], result[1])
    with pytest.raises(ValueError, match="3 pictures for 2"):
        match(image, pictures(3))
