"""Pipelines over a DDPM's UNet: the one step, sizes, prompts, and that all else is as with a transformer."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from tsdsr import PromptEmbeddings, TSDSRPipeline
from tsdsr.pipelines.loading import load_pipeline
from tsdsr.pipelines.tiling import gaussian_weights

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def clean(z, predicted, prediction_type="epsilon", timestep=999):
    """z^ from the latents and the prediction (paper, table 5), with SD2's schedule of betas."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    cumulative = float(np.cumprod(1 - betas)[timestep])
    if prediction_type == "v_prediction":
        return cumulative**0.5 * z - (1 - cumulative) ** 0.5 * predicted
    return (z - (1 - cumulative) ** 0.5 * predicted) / cumulative**0.5


def encoded(pipeline, image):
    """Scaled latents of a picture (8, 8, 3) that is enlarged four times."""
    lq = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(lq, scale_factor=4, mode="bicubic") * 2 - 1
    return pipeline.vae.encode(pixels.clamp(-1, 1)).latent_dist.mode() * pipeline.vae.config.scaling_factor


@pytest.fixture
def deep(make_pipeline):
    """A pipeline whose UNet halves twice: 2 pixels a latent, sizes in multiples of 8."""
    plain = make_pipeline("kl", network="unet")
    config = {
        **plain.unet.config,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    }
    return make_pipeline("kl", network="unet", unet=UNet2DConditionModel.from_config(config).eval())


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_result_is_the_clean_sample_at_the_last_timestep(make_pipeline, picture, prediction_type):
    """LQ latents go in as they are, no noise is added, and nothing is clipped, whatever the scheduler would do."""
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction_type, clip_sample=True, clip_sample_range=0.01)
    pipeline = make_pipeline("kl", network="unet", scheduler=scheduler)
    image = picture(8, 8)
    latents = encoded(pipeline, image)
    prompt = pipeline.prompt_embeddings.prompt_embeds
    predicted = pipeline.unet(latents, 999, encoder_hidden_states=prompt).sample
    expected = clean(latents, predicted, prediction_type)
    assert expected.abs().max() > 0.1  # what clipping would show in
    result = pipeline(image, output_type="latent", **SMALL).images
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    decoded = (pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    images = pipeline(image, output_type="pt", color_fix="none", **SMALL).images
    torch.testing.assert_close(images, decoded, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_schedulers_of_sd2_folders_serve_too(make_pipeline, picture, scheduler):
    arguments = {"output_type": "latent", **SMALL}
    for prediction_type in ("epsilon", "v_prediction"):
        results = [
            make_pipeline("kl", network="unet", scheduler=cls(**BETAS, prediction_type=prediction_type))(
                picture(8, 8), **arguments
            ).images
            for cls in (DDPMScheduler, scheduler)
        ]
        assert torch.equal(*results)


def test_another_timestep(make_pipeline, picture, tmp_path):
    pipeline = make_pipeline("kl", network="unet", timestep=500)
    pipeline.save_pretrained(tmp_path)
    pipeline = TSDSRPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = encoded(pipeline, picture(8, 8))
    predicted = pipeline.unet(latents, 500, encoder_hidden_states=pipeline.prompt_embeddings.prompt_embeds).sample
    result = pipeline(picture(8, 8), output_type="latent", **SMALL).images
    torch.testing.assert_close(result, clean(latents, predicted, timestep=500), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("network", "expected"), [("transformer", 1000.0), ("unet", 999.0)])
def test_the_timestep_of_the_family_is_what_the_config_says(make_pipeline, picture, network, expected):
    pipeline = make_pipeline(network=network)
    seen = []
    pipeline.denoiser.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["timestep"].tolist()), with_kwargs=True
    )
    pipeline(picture(8, 8), **SMALL)
    assert pipeline.config.timestep == expected and seen == [[expected]]


def test_half_precision_keeps_the_timestep(make_pipeline, picture):
    """999 has no place in bfloat16."""
    pipeline, seen = make_pipeline("kl", network="unet"), []
    expected = pipeline(picture(8, 8), output_type="pt", **SMALL).images
    pipeline.unet.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    for dtype in (torch.bfloat16, torch.float16):
        pipeline.to(dtype=dtype)
        result = pipeline(picture(8, 8), output_type="pt", **SMALL).images
        assert result.dtype == torch.float32 and (result - expected).abs().mean() < 0.02
        assert pipeline(picture(8, 8), output_type="latent", **SMALL).images.dtype == dtype
    assert {timestep.item() for timestep in seen} == {999}


def test_global_random_state_is_neither_used_nor_changed(make_pipeline, picture):
    pipeline, results = make_pipeline("kl", network="unet"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(pipeline(picture(20, 26), output_type="pt", tile_callback=lambda _: None, **SMALL).images)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


def test_a_call_changes_no_component(make_pipeline, picture):
    pipeline = make_pipeline("kl", network="unet")
    weights = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    scheduler, config = dict(pipeline.scheduler.__dict__), dict(pipeline.scheduler.config)
    timesteps = pipeline.scheduler.timesteps.clone()
    pipeline(picture(20, 20), **SMALL)
    assert all(value is pipeline.scheduler.__dict__[key] for key, value in scheduler.items())
    assert config == dict(pipeline.scheduler.config) and torch.equal(pipeline.scheduler.timesteps, timesteps)
    assert all(torch.equal(weights[name], weight) for name, weight in pipeline.unet.state_dict().items())


# --- sizes and tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", ["tiny", "kl"])
@pytest.mark.parametrize(("size", "upscale"), [((1, 1), 4), ((3, 40), 4), ((31, 17), 4), ((10, 11), 1.5)])
def test_result_has_exactly_the_rounded_size(make_pipeline, picture, vae, size, upscale):
    pipeline = make_pipeline(vae, network="unet")
    images = pipeline(picture(*size), upscale=upscale, output_type="np", **SMALL).images
    assert images.shape == (1, round(upscale * size[0]), round(upscale * size[1]), 3)
    assert images.min() >= 0 and images.max() <= 1


def test_sides_are_multiples_of_what_the_unet_halves(deep, picture):
    assert deep.size_multiple == 8
    seen = []
    deep.unet.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["sample"].shape[-2:])), with_kwargs=True
    )
    (image,) = deep(picture(9, 11), **SMALL).images
    assert image.size == (44, 36)
    # 44 x 36 pixels are padded to 48 x 40, and cut into tiles of 32.
    assert set(seen) == {(16, 16)}
    seen.clear()
    deep(picture(9, 11), process_size=0)
    assert seen == [(20, 24)]


def test_no_table_of_positions_bounds_the_tiles(make_pipeline, picture):
    seen = {}
    for network, name in (("transformer", "hidden_states"), ("unet", "sample")):
        pipeline = make_pipeline("kl", network=network)
        pipeline.denoiser.register_forward_pre_hook(
            lambda _, __, kwargs, network=network, name=name: seen.setdefault(network, []).append(
                tuple(kwargs[name].shape[-2:])
            ),
            with_kwargs=True,
        )
        pipeline(picture(20, 20), process_size=0, tile_size=128)
    assert seen["unet"] == [(40, 40)]
    assert set(seen["transformer"]) == {(32, 32)}


def test_the_overlap_is_not_rounded_to_what_the_unet_halves(deep, picture):
    seen = []
    deep(picture(20, 8), process_size=0, tile_size=32, tile_overlap=10, tile_callback=seen.append)
    boxes = [box for event in seen if event.stage == "step" for box in event.boxes]
    # Latent rows 0..40 in tiles of 16 that overlap by 5 at least (by 4, three tiles would do), in pixels.
    assert boxes == [(0, 0, 32, 32), (16, 0, 32, 32), (32, 0, 32, 32), (48, 0, 32, 32)]


def test_tile_batch_size_does_not_change_the_result(make_pipeline, picture):
    pipeline, counts = make_pipeline("kl", network="unet"), []
    pipeline.unet.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["sample"].shape[0]), with_kwargs=True
    )
    arguments = {"output_type": "latent", **SMALL}
    one = pipeline(picture(20, 26), tile_batch_size=1, **arguments).images
    assert set(counts) == {1} and len(counts) > 4
    for size in (2, 100):
        more = pipeline(picture(20, 26), tile_batch_size=size, **arguments).images
        torch.testing.assert_close(more, one, rtol=0, atol=3e-4)
    assert max(counts) > 4


def test_tiles_are_blended(make_pipeline, picture):
    pipeline, seen, predicted = make_pipeline("kl", network="unet"), [], []
    pipeline.unet.register_forward_hook(lambda _, __, result: predicted.append(result[0]))
    latents = torch.randn(1, 4, 40, 52, generator=torch.Generator().manual_seed(0))
    arguments = {"latents": latents, "output_type": "latent", **SMALL}
    result = pipeline(picture(20, 26), tile_callback=seen.append, **arguments).images
    total, weights = torch.zeros(1, 4, 40, 52), torch.zeros(40, 52)
    assert len(seen) == len(predicted) > 4
    for event, epsilon in zip(seen, predicted, strict=True):
        top, left = (edge // 2 for edge in event.boxes[0][:2])
        tile_weights = torch.outer(gaussian_weights(16), gaussian_weights(16))
        total[..., top : top + 16, left : left + 16] += epsilon * tile_weights
        weights[top : top + 16, left : left + 16] += tile_weights
    torch.testing.assert_close(result, clean(latents, total / weights), rtol=1e-4, atol=1e-3)
    whole = pipeline(picture(20, 26), **{**arguments, "tile_size": 128}).images
    assert (result - whole).abs().max() > 1e-2


@pytest.mark.parametrize("tile_batch_size", [1, 3])
def test_tile_callback_receives_where_the_step_leads(make_pipeline, picture, tile_batch_size):
    pipeline, seen, predicted = make_pipeline("kl", network="unet"), [], []
    arguments = {"tile_batch_size": tile_batch_size, "output_type": "latent", **SMALL}
    unseen = pipeline(picture(20, 26), **arguments).images
    pipeline.unet.register_forward_hook(lambda _, __, result: predicted.append(result[0]))
    result = pipeline(picture(20, 26), tile_callback=seen.append, **arguments).images
    steps = [event for event in seen if event.stage == "step"]
    assert len(steps) == len(predicted) > 1 and torch.equal(result, unseen)
    for event, epsilon in zip(steps, predicted, strict=True):
        torch.testing.assert_close(event.outputs, clean(event.inputs, epsilon), rtol=1e-4, atol=1e-4)
    seen.clear()
    whole = pipeline(picture(8, 8), tile_callback=seen.append, **arguments).images
    (step,) = [event for event in seen if event.stage == "step"]
    torch.testing.assert_close(step.outputs, whole)


# --- construction, saving, loading -----------------------------------------------------------------------------------


def test_one_network(make_pipeline):
    unet, transformer = make_pipeline(network="unet"), make_pipeline()
    with pytest.raises(ValueError, match=r"one network.*not both\.$"):
        TSDSRPipeline(**{**unet.components, "transformer": transformer.transformer})
    assert unet.denoiser is unet.unet and unet.transformer is None
    assert transformer.denoiser is transformer.transformer and transformer.unet is None


@pytest.mark.parametrize("timestep", [1000, -1, 998.5])
def test_a_timestep_outside_the_schedule_is_refused(make_pipeline, timestep):
    with pytest.raises(ValueError, match="from 0 to 999"):
        make_pipeline(network="unet", timestep=timestep)


def test_a_flow_matching_scheduler_is_refused(make_pipeline):
    with pytest.raises(ValueError, match="not FlowMatchEulerDiscreteScheduler"):
        make_pipeline(network="unet", scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: TSDSRPipeline.from_pretrained(folder, local_files_only=True),
        lambda folder: DiffusionPipeline.from_pretrained(folder, local_files_only=True),
        lambda folder: load_pipeline(folder, device="cpu"),
    ],
    ids=["ours", "stock", "load_pipeline"],
)
def test_saved_and_loaded(make_pipeline, picture, tmp_path, load):
    pipeline = make_pipeline("kl", network="unet", use_shift_factor=True)
    pipeline.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is TSDSRPipeline and type(loaded.unet) is UNet2DConditionModel and loaded.transformer is None
    assert loaded.config.timestep == 999 and loaded.config.use_shift_factor is True
    assert tuple(loaded.prompt_embeddings.pooled_prompt_embeds.shape) == (1, 0)
    expected = pipeline(picture(8, 8), output_type="pt", **SMALL).images
    torch.testing.assert_close(loaded(picture(8, 8), output_type="pt", **SMALL).images, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_loaded_in_half_precision(make_pipeline, picture, tmp_path, dtype):
    pipeline = make_pipeline("kl", network="unet")
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, dtype=dtype, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.prompt_embeddings.dtype} == {
        {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    }
    expected = pipeline(picture(8, 8), output_type="pt", **SMALL).images
    assert (loaded(picture(8, 8), output_type="pt", **SMALL).images - expected).abs().mean() < 0.02


def test_a_nan_names_the_part(make_pipeline, picture):
    pipeline = make_pipeline(network="unet")
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or Inf even in float32"):
        pipeline(picture(8, 8), **SMALL)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompt_embeds_alone(make_pipeline, picture):
    pipeline = make_pipeline("kl", network="unet")
    fixed = pipeline.prompt_embeddings.prompt_embeds.data
    results = [
        pipeline(picture(8, 8), output_type="latent", **SMALL, **prompt).images
        for prompt in ({}, {"prompt_embeds": fixed}, {"prompt_embeds": fixed + 1})
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompt": "sharp"}, "text encoders.*without text_encoder;"),
        ({"pooled_prompt_embeds": torch.zeros(1, 10)}, "A UNet takes no `pooled_prompt_embeds`"),
        (
            {"prompt_embeds": torch.zeros(1, 3, 12), "pooled_prompt_embeds": torch.zeros(1, 10)},
            "A UNet takes no `pooled_prompt_embeds`",
        ),
        ({"prompt": "sharp", "prompt_embeds": torch.zeros(1, 3, 12)}, "not both"),
    ],
)
def test_bad_prompts_are_one_sentence(make_pipeline, picture, arguments, named):
    with pytest.raises(ValueError, match=named) as caught:
        make_pipeline(network="unet")(picture(8, 8), **arguments)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and "SD3" not in message


def test_a_text_encoder_without_its_tokenizer(make_pipeline, picture, clip):
    encoder, _ = clip(CLIPTextModel, 12)
    with pytest.raises(ValueError, match="without tokenizer;"):
        make_pipeline(network="unet", text_encoder=encoder)(picture(8, 8), prompt="a")


def test_other_prompts_through_sd2_text_encoder(make_pipeline, picture, clip, tmp_path):
    """77 tokens, padded, and the last hidden state of them."""
    encoder, tokenizer = clip(CLIPTextModel, 12)
    pipeline = make_pipeline("kl", network="unet", text_encoder=encoder, tokenizer=tokenizer)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline = TSDSRPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)

    tokens = tokenizer("a b c", padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert tokens.shape == (1, 77)
    embeds = encoder(tokens).last_hidden_state.detach()
    results = [
        pipeline(picture(8, 8), output_type="latent", **prompt, **SMALL).images
        for prompt in ({"prompt": "a b c"}, {"prompt_embeds": embeds}, {"prompt": "d e f"}, {})
    ]
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], results[2]) and not torch.allclose(results[0], results[3])


def test_the_prompt_is_part_of_what_the_unet_sees(make_pipeline, picture):
    pipeline = make_pipeline("kl", network="unet")
    other = make_pipeline(
        "kl", network="unet", prompt_embeddings=PromptEmbeddings.from_tensors(torch.ones(1, 77, 12), None)
    )
    results = [pipe(picture(8, 8), output_type="latent", **SMALL).images for pipe in (pipeline, other)]
    assert not torch.allclose(*results, atol=1e-3)
