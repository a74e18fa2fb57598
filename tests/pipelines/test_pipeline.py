"""The pipeline call: sizes, types, what it must not change, and what it refuses."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import CLIPTextModelWithProjection

from tsdsr import TSDSRPipeline

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8}


@pytest.mark.parametrize("vae", ["tiny", "kl"])
@pytest.mark.parametrize(
    ("size", "upscale"), [((1, 1), 4), ((3, 40), 4), ((31, 17), 4), ((9, 8), 1), ((10, 11), 1.5), ((5, 7), 2.7)]
)
def test_result_has_exactly_the_rounded_size(make_pipeline, picture, vae, size, upscale):
    images = make_pipeline(vae)(picture(*size), upscale=upscale, output_type="np", **SMALL).images
    assert images.shape == (1, round(upscale * size[0]), round(upscale * size[1]), 3)
    assert images.dtype == np.float32 and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"height": 30, "width": 50}, (30, 50)),
        ({"height": 40}, (40, 80)),
        ({"width": 50}, (25, 50)),
        ({"height": 5}, (5, 10)),  # smaller than the picture
    ],
)
def test_target_size_in_pixels(make_pipeline, picture, arguments, expected):
    images = make_pipeline()(picture(10, 20), **arguments, output_type="pt", **SMALL).images
    assert images.shape == (1, 3, *expected)


def test_all_forms_of_one_picture_give_the_same_result(make_pipeline):
    pipeline = make_pipeline()
    array = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    chw = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        Image.fromarray(array),
        array,
        array[None],
        array.astype(np.float32) / 255,
        array.astype(np.uint16) * 257,
        chw,
        chw[None].float() / 255,
        [Image.fromarray(array)],
        Image.fromarray(array).convert("RGBA"),
    ]
    results = [pipeline(form, output_type="pt", **SMALL).images for form in forms]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=3e-5)


def test_16_bit_grey_is_not_clipped(make_pipeline):
    pipeline = make_pipeline()
    grey = np.linspace(0, 65535, 72).astype(np.uint16).reshape(8, 9)
    from_pil = pipeline(Image.fromarray(grey), output_type="pt", **SMALL).images
    from_float = pipeline(grey.astype(np.float32) / 65535, output_type="pt", **SMALL).images
    torch.testing.assert_close(from_pil, from_float)


def test_list_of_mixed_sizes_equals_single_calls(make_pipeline, picture):
    pipeline = make_pipeline()
    pictures = [picture(6, 9), picture(8, 5, seed=1)]
    together = pipeline(pictures, output_type="np", **SMALL).images
    for one, result in zip(pictures, together, strict=True):
        np.testing.assert_allclose(result, pipeline(one, output_type="np", **SMALL).images[0], atol=1e-6)
    assert [image.size for image in pipeline(pictures, **SMALL).images] == [(36, 24), (20, 32)]


def test_pil_output_is_rounded_not_truncated(make_pipeline, picture):
    pipeline = make_pipeline()
    values = pipeline(picture(8, 8), output_type="np", **SMALL).images[0]
    pil = pipeline(picture(8, 8), **SMALL).images[0]
    np.testing.assert_array_equal(np.asarray(pil), np.round(values * 255).astype(np.uint8))


def test_result_is_one_euler_step_from_sigma_1_to_0(make_pipeline, picture):
    """z0 = z - v at t = 1000, without the VAE's shift and without the scheduler's shift of sigmas."""
    pipeline = make_pipeline("kl")
    image = picture(8, 8)
    lq = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(lq, scale_factor=4, mode="bicubic") * 2 - 1
    latents = pipeline.vae.encode(pixels.clamp(-1, 1)).latent_dist.mode() * pipeline.vae.config.scaling_factor
    velocity = pipeline.transformer(
        hidden_states=latents,
        timestep=torch.tensor([1000.0]),
        encoder_hidden_states=pipeline.prompt_embeddings.prompt_embeds,
        pooled_projections=pipeline.prompt_embeddings.pooled_prompt_embeds,
    ).sample
    result = pipeline(image, output_type="latent", **SMALL).images
    torch.testing.assert_close(result, latents - velocity)
    decoded = pipeline.vae.decode(result / pipeline.vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline(image, output_type="pt", color_fix="none", **SMALL).images, expected)


def test_shift_factor_and_timestep_come_from_the_saved_config(make_pipeline, picture, tmp_path):
    plain = make_pipeline("kl")
    shifted = make_pipeline("kl", use_shift_factor=True, timestep=900.0)
    shifted.save_pretrained(tmp_path)
    loaded = TSDSRPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.use_shift_factor is True and loaded.config.timestep == 900
    image = picture(8, 8)
    expected = shifted(image, output_type="pt", **SMALL).images
    torch.testing.assert_close(loaded(image, output_type="pt", **SMALL).images, expected)
    assert (plain(image, output_type="pt", **SMALL).images - expected).abs().max() > 1e-3

    # v scaled by sigma = 0.9, latents shifted
    seen = {}
    shifted.transformer.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(kwargs, v=out[0]), with_kwargs=True
    )
    result = shifted(image, output_type="latent", **SMALL).images
    assert float(seen["timestep"]) == pytest.approx(900)
    torch.testing.assert_close(result, seen["hidden_states"] - 0.9 * seen["v"])

    # z = (mode - shift) * scale before the network, z / scale + shift behind it
    scale, shift = shifted.vae.config.scaling_factor, shifted.vae.config.shift_factor
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = (torch.nn.functional.interpolate(pixels, scale_factor=4, mode="bicubic") * 2 - 1).clamp(-1, 1)
    mode = shifted.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(seen["hidden_states"], (mode - shift) * scale)
    decoded = (shifted.vae.decode(result / scale + shift).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shifted(image, output_type="pt", color_fix="none", **SMALL).images, decoded)


def test_stock_loader_finds_the_class(make_pipeline, picture, tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is TSDSRPipeline
    expected = pipeline(picture(8, 8), output_type="pt", **SMALL).images
    torch.testing.assert_close(loaded(picture(8, 8), output_type="pt", **SMALL).images, expected)


def test_a_call_changes_no_component(make_pipeline, picture):
    pipeline = make_pipeline("kl")
    before = {
        name: {key: value.clone() for key, value in module.state_dict().items()}
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
    }
    configs = {name: dict(module.config) for name, module in pipeline.components.items() if module is not None}
    scheduler_state = dict(pipeline.scheduler.__dict__)
    pipeline(picture(20, 20), **SMALL)
    for name, state in before.items():
        for key, value in pipeline.components[name].state_dict().items():
            assert value.dtype == state[key].dtype and torch.equal(value, state[key]), (name, key)
    assert configs == {name: dict(module.config) for name, module in pipeline.components.items() if module is not None}
    assert pipeline.vae.use_tiling is False
    for key, value in scheduler_state.items():
        assert value is pipeline.scheduler.__dict__[key], key


def test_posterior_mode_by_default_and_seeded_draw_on_request(make_pipeline, picture):
    pipeline = make_pipeline("kl")

    def run(**arguments):
        return pipeline(picture(8, 8), output_type="pt", **SMALL, **arguments).images

    assert torch.equal(run(), run())
    draws = [run(sample_posterior=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], run())


@pytest.mark.parametrize("tile_batch_size", [2, 3, 100])
def test_tile_batch_size_does_not_change_the_result(make_pipeline, picture, tile_batch_size):
    pipeline = make_pipeline()
    arguments = {"output_type": "pt", "color_fix": "none", **SMALL}
    one = pipeline(picture(20, 26), tile_batch_size=1, **arguments).images
    more = pipeline(picture(20, 26), tile_batch_size=tile_batch_size, **arguments).images
    torch.testing.assert_close(more, one, rtol=0, atol=3e-5)


@pytest.mark.parametrize("tile_batch_size", [1, 3])
@pytest.mark.parametrize("output_type", ["pil", "latent"])
def test_tile_callback_counts_up_to_its_total(make_pipeline, picture, tile_batch_size, output_type):
    seen = []
    make_pipeline()(
        picture(20, 26),
        tile_batch_size=tile_batch_size,
        output_type=output_type,
        tile_callback=seen.append,
        **SMALL,
    )
    totals = {event.total for event in seen}
    assert len(totals) == 1 and seen[-1].done == totals.pop() > 4
    assert [event.done for event in seen] == sorted({event.done for event in seen})


def test_tile_callback_says_where_tiles_lie_and_what_came_out(make_pipeline, picture):
    seen = []
    pipeline = make_pipeline(vae="kl")
    pipeline(picture(20, 26), tile_callback=seen.append, **SMALL)
    assert {event.stage for event in seen} == {"encode", "step", "decode"}
    for stage in ("encode", "step", "decode"):
        covered = torch.zeros(seen[0].size)
        for event in (event for event in seen if event.stage == stage):
            assert len(event.boxes) == len(event.inputs) == len(event.outputs)
            # Pixels of the working picture over pixels of what the network was given.
            scale = 1 if stage == "encode" else pipeline.vae_scale_factor
            for top, left, height, width in event.boxes:
                covered[top : top + height, left : left + width] += 1
                assert (height, width) == tuple(side * scale for side in event.inputs.shape[-2:])
        assert covered.min() >= 1 and covered.shape == seen[0].size


@pytest.mark.parametrize("tile_batch_size", [1, 3])
def test_tile_callback_receives_where_the_step_leads(make_pipeline, picture, tile_batch_size):
    """Each tile by itself: z - v of that tile; and looking at it changes nothing."""
    pipeline, seen, velocities = make_pipeline("kl"), [], []
    arguments = {"tile_batch_size": tile_batch_size, "output_type": "latent", **SMALL}
    unseen = pipeline(picture(20, 26), **arguments).images
    pipeline.transformer.register_forward_hook(lambda _, __, result: velocities.append(result[0]))
    result = pipeline(picture(20, 26), tile_callback=seen.append, **arguments).images
    steps = [event for event in seen if event.stage == "step"]
    assert len(steps) == len(velocities) > 1 and torch.equal(result, unseen)
    for event, velocity in zip(steps, velocities, strict=True):
        torch.testing.assert_close(event.outputs, event.inputs - velocity)


def test_an_exception_of_the_tile_callback_ends_the_call(make_pipeline, picture):
    def stop(event):
        if event.stage == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pipeline()(picture(20, 26), tile_callback=stop, **SMALL)


def test_step_callback_may_replace_latents(make_pipeline, picture):
    pipeline = make_pipeline()
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append((pipe, index, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = pipeline(picture(8, 8), output_type="latent", callback_on_step_end=callback, **SMALL).images
    assert seen == [(pipeline, 0, 1000.0)] and not result.any()


def test_given_latents_replace_the_encoder(make_pipeline, picture):
    pipeline = make_pipeline("kl")
    captured = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: captured.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    expected = pipeline(picture(8, 8), output_type="pt", **SMALL).images
    handle.remove()
    result = pipeline(picture(8, 8), latents=captured[0], output_type="pt", **SMALL).images
    torch.testing.assert_close(result, expected)
    with pytest.raises(ValueError, match="must be 16x16"):
        pipeline(picture(8, 8), latents=captured[0][:, :, :4], **SMALL)


def test_prompt_embeds_take_the_place_of_the_fixed_prompt(make_pipeline, picture):
    pipeline = make_pipeline()
    fixed = pipeline.prompt_embeddings
    same = {"prompt_embeds": fixed.prompt_embeds.data, "pooled_prompt_embeds": fixed.pooled_prompt_embeds.data}
    other = {name: value + 1 for name, value in same.items()}
    results = [pipeline(picture(8, 8), output_type="latent", **SMALL, **prompt).images for prompt in ({}, same, other)]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)


def test_nan_of_damaged_weights_names_the_part_and_the_mend(make_pipeline, picture):
    pipeline = make_pipeline()
    pipeline.transformer.proj_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"network of the one step makes NaN or Inf even in float32.*download"):
        pipeline(picture(8, 8), **SMALL)


def test_half_precision_runs(make_pipeline, picture):
    pipeline = make_pipeline("kl")
    expected = pipeline(picture(8, 8), output_type="pt", **SMALL).images
    pipeline.to(dtype=torch.bfloat16)
    result = pipeline(picture(8, 8), output_type="pt", **SMALL).images
    assert result.dtype == torch.float32
    assert (result - expected).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"upscale": 0.5}, "upscale"),
        ({"upscale": float("nan")}, "upscale"),
        ({"upscale": "4"}, "upscale"),
        ({"height": 0}, "height"),
        ({"width": 1.5}, "width"),
        ({"color_fix": "sepia"}, "color_fix"),
        ({"tile_size": 4}, "tile_size"),
        ({"tile_overlap": 32, "tile_size": 32}, "tile_overlap"),
        ({"tile_overlap": -1}, "tile_overlap"),
        ({"tile_batch_size": 0}, "tile_batch_size"),
        ({"vae_tile_size": 0}, "vae_tile_size"),
        ({"process_size": -1}, "process_size"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"prompt": "sharp"}, "text encoders"),
        ({"prompt": "sharp", "prompt_embeds": torch.zeros(1, 3, 12)}, "not both"),
        ({"prompt_embeds": torch.zeros(1, 3, 12)}, "together"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_arguments_are_one_sentence(make_pipeline, picture, arguments, named):
    with pytest.raises(ValueError, match=named) as caught:
        make_pipeline()(picture(8, 8), **arguments)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize(
    "image",
    [
        "photo.jpg",
        [],
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
        np.full((4, 4, 3), 255.0),
        np.full((4, 4, 3), np.nan),
        torch.zeros(4),
    ],
)
def test_bad_images_are_one_sentence(make_pipeline, image):
    with pytest.raises(ValueError, match="`image`") as caught:
        make_pipeline()(image)
    assert "\n" not in str(caught.value)


def test_numpy_numbers_are_numbers(make_pipeline, picture):
    arguments = {name: np.int64(value) for name, value in SMALL.items()}
    assert make_pipeline()(picture(8, 8), upscale=np.float32(2), **arguments).images[0].size == (16, 16)


def test_tuple_instead_of_output(make_pipeline, picture):
    (images,) = make_pipeline()(picture(8, 8), return_dict=False, **SMALL)
    assert images[0].size == (32, 32)


def test_other_prompts_through_sd3_text_encoders(make_pipeline, picture, clip):
    """SD3's own text encoders and tokenizers, at tiny sizes, under SD3's names."""
    encoder, tokenizer = clip(CLIPTextModelWithProjection, 6)
    plain = make_pipeline()
    encoders = {"text_encoder": encoder, "text_encoder_2": encoder, "tokenizer": tokenizer, "tokenizer_2": tokenizer}
    pipeline = TSDSRPipeline(**(plain.components | encoders))
    pipeline.set_progress_bar_config(disable=True)
    results = [
        pipeline(picture(8, 8), output_type="latent", **prompt, **SMALL).images
        for prompt in ({}, {"prompt": "a b c"}, {"prompt": "a b c"}, {"prompt": "d e f"})
    ]
    assert torch.equal(results[0], plain(picture(8, 8), output_type="latent", **SMALL).images)
    assert torch.equal(results[1], results[2])
    assert not torch.allclose(results[0], results[1]) and not torch.allclose(results[1], results[3])


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_pictures_go_through_the_vae_in_one_layout(make_pipeline, picture, weights):
    """Channels last on a CPU, whatever the picture and the weights come in."""
    pipeline, seen = make_pipeline(vae="kl"), []
    pipeline.vae.to(memory_format=weights)
    hooks = [
        part.conv_in.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        for part in (pipeline.vae.encoder, pipeline.vae.decoder)
    ]
    for image in (picture(24, 24), torch.from_numpy(picture(24, 24)).movedim(-1, 0).contiguous()):
        pipeline(image, **SMALL)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 4 and all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)
