"""What diffusers' users expect of any pipeline: absent components, batches, number formats, all ways of loading."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline

from tsdsr import PromptEmbeddings, TSDSRPipeline

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "pt"}


@pytest.fixture
def folder(make_pipeline, tmp_path):
    make_pipeline("kl").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- components that are absent --------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["transformer", "unet"])
def test_what_a_pipeline_was_made_with_is_not_optional_in_it(make_pipeline, network):
    pipeline = make_pipeline(network=network)
    given = {name for name, component in pipeline.components.items() if component is not None}
    assert given == {"vae", network, "scheduler", "prompt_embeddings"}
    assert not given & set(pipeline._optional_components)
    assert given | set(pipeline._optional_components) == set(pipeline.components)


@pytest.mark.parametrize("missing", ["vae", "transformer", "scheduler"])
def test_a_call_names_what_is_missing(make_pipeline, picture, tmp_path, missing):
    make_pipeline().save_pretrained(tmp_path)
    pipeline = quiet(TSDSRPipeline.from_pretrained(tmp_path, **{missing: None}))
    with pytest.raises(ValueError, match=f"made without `{missing}`"):
        pipeline(picture(8, 8), **SMALL)


@pytest.mark.parametrize("vae", ["tiny", "kl"])
def test_what_was_saved_is_loaded_without_a_word(make_pipeline, tmp_path, caplog, vae):
    make_pipeline(vae).save_pretrained(tmp_path)
    TSDSRPipeline.from_pretrained(tmp_path)
    assert "not expected" not in caplog.text


def test_without_a_prompt_of_its_own(make_pipeline, picture, tmp_path):
    whole = make_pipeline()
    fixed = whole.prompt_embeddings
    make_pipeline(prompt_embeddings=None).save_pretrained(tmp_path)
    assert not (tmp_path / "prompt_embeddings").exists()
    pipeline = quiet(TSDSRPipeline.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="holds no `prompt_embeddings`"):
        pipeline(picture(8, 8), **SMALL)
    embeds = {"prompt_embeds": fixed.prompt_embeds.data, "pooled_prompt_embeds": fixed.pooled_prompt_embeds.data}
    torch.testing.assert_close(pipeline(picture(8, 8), **SMALL, **embeds).images, whole(picture(8, 8), **SMALL).images)


def test_a_vae_of_another_model_is_refused(make_pipeline, folder):
    vae = AutoencoderKL(latent_channels=3, norm_num_groups=1, block_out_channels=(8,))
    with pytest.raises(ValueError, match="latents have 3 channels, but the network reads 4"):
        TSDSRPipeline.from_pretrained(folder, vae=vae)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_generators_one_for_each_picture(make_pipeline, picture):
    pipeline = make_pipeline("kl")
    pictures = [picture(8, 8, seed=1), picture(8, 8, seed=2)]

    def run(image, generator):
        return pipeline(image, sample_posterior=True, generator=generator, **SMALL).images

    together = run(pictures, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    alone = [run(image, torch.Generator().manual_seed(seed)) for image, seed in zip(pictures, (3, 4), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)
    assert not torch.equal(run(pictures[0], torch.Generator().manual_seed(4)), alone[0])
    with pytest.raises(ValueError, match=r"as many as pictures \(2\), not 1"):
        run(pictures, [torch.Generator()])


def test_prompts_one_for_each_picture(make_pipeline, picture):
    pipeline = make_pipeline("kl")
    pictures = [picture(8, 8), picture(40, 10, seed=2)]  # the second in tiles
    embeds, pooled = torch.randn(2, 3, 12), torch.randn(2, 10)

    def run(image, which):
        prompt = {"prompt_embeds": embeds[which], "pooled_prompt_embeds": pooled[which]}
        return pipeline(image, tile_batch_size=2, **prompt, **SMALL).images

    together = run(pictures, slice(None))
    for index, image in enumerate(pictures):
        torch.testing.assert_close(together[index], run(image, slice(index, index + 1))[0], rtol=0, atol=0)
    assert not torch.equal(run(pictures[0], slice(1, 2))[0], together[0])
    with pytest.raises(ValueError, match="`prompt_embeds` must have a batch of 1 or 3, not 2"):
        run([*pictures, pictures[0]], slice(None))


def test_a_callback_can_tell_the_last_step(make_pipeline, picture):
    def last(pipeline, step, timestep, tensors):
        assert step == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = make_pipeline()(picture(8, 8), **{**SMALL, "output_type": "latent"}, callback_on_step_end=last).images
    assert latents.abs().sum() == 0


# --- loading ---------------------------------------------------------------------------------------------------------


def test_components_in_types_of_their_own(folder, picture):
    types = {"vae": torch.float32, "transformer": torch.bfloat16, "default": torch.float16}
    pipeline = quiet(TSDSRPipeline.from_pretrained(folder, dtype=types))
    assert pipeline.vae.dtype == torch.float32 and pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.prompt_embeddings.dtype == torch.float16
    exact = quiet(TSDSRPipeline.from_pretrained(folder))(picture(8, 8), **SMALL).images
    found = pipeline(picture(8, 8), **SMALL).images
    assert 0 < (found - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    "arguments",
    [{"device_map": "cpu"}, {"low_cpu_mem_usage": False}, {"use_safetensors": True}, {"local_files_only": True}],
    ids=str,
)
def test_ways_of_loading(folder, picture, make_pipeline, arguments):
    expected = make_pipeline("kl")(picture(8, 8), **SMALL).images
    for loader in (TSDSRPipeline, DiffusionPipeline):
        pipeline = quiet(loader.from_pretrained(folder, **arguments))
        assert type(pipeline) is TSDSRPipeline
        # Weights in a mapped file may be aligned otherwise, and then summed in another order.
        torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, expected, rtol=0, atol=3e-5)


def test_variants_and_shards(make_pipeline, picture, tmp_path):
    pipeline = make_pipeline("kl")
    expected = pipeline(picture(8, 8), **SMALL).images
    pipeline.save_pretrained(tmp_path, variant="other", max_shard_size="10KB")
    names = [path.name for path in (tmp_path / "transformer").iterdir()]
    assert sum(".other-000" in name for name in names) > 1
    loaded = quiet(TSDSRPipeline.from_pretrained(tmp_path, variant="other"))
    torch.testing.assert_close(loaded(picture(8, 8), **SMALL).images, expected, rtol=0, atol=3e-5)
    with pytest.raises(ValueError, match="no such modeling files are available"):
        TSDSRPipeline.from_pretrained(tmp_path, variant="fp16")


def test_components_given_to_from_pretrained(folder, picture):
    prompt = PromptEmbeddings.from_tensors(torch.randn(1, 3, 12), torch.randn(1, 10))
    pipeline = quiet(TSDSRPipeline.from_pretrained(folder, prompt_embeddings=prompt))
    assert pipeline.prompt_embeddings is prompt
    embeds = {"prompt_embeds": prompt.prompt_embeds.data, "pooled_prompt_embeds": prompt.pooled_prompt_embeds.data}
    expected = quiet(TSDSRPipeline.from_pretrained(folder))(picture(8, 8), **embeds, **SMALL).images
    torch.testing.assert_close(pipeline(picture(8, 8), **SMALL).images, expected, rtol=0, atol=0)


def test_to_stable_diffusion_3_and_back(make_pipeline, picture):
    first = make_pipeline("kl")
    expected = first(picture(8, 8), **SMALL).images
    sd3 = StableDiffusion3Pipeline.from_pipe(first)
    assert sd3.transformer is first.transformer and sd3.vae is first.vae
    back = quiet(TSDSRPipeline.from_pipe(sd3, prompt_embeddings=first.prompt_embeddings))
    torch.testing.assert_close(back(picture(8, 8), **SMALL).images, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds no `prompt_embeddings`"):
        TSDSRPipeline.from_pipe(sd3)(picture(8, 8), **SMALL)

    # A text-to-image pipeline made by itself: its own networks and schedule, no copy.
    other = StableDiffusion3Pipeline(
        transformer=first.transformer,
        scheduler=first.scheduler,
        vae=first.vae,
        **dict.fromkeys(f"{kind}{which}" for kind in ("text_encoder", "tokenizer") for which in ("", "_2", "_3")),
    )
    ours = quiet(TSDSRPipeline.from_pipe(other, prompt_embeddings=first.prompt_embeddings, dtype=torch.bfloat16))
    assert ours.transformer is first.transformer and ours.transformer.dtype == torch.bfloat16


def test_the_index_names_what_others_can_find(folder):
    """diffusers refuses to download components of libraries that it cannot find under the name in the index."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    library, name = index["prompt_embeddings"]
    assert (library, name) == ("tsdsr", "PromptEmbeddings")
    assert getattr(getattr(diffusers.pipelines, library), name) is PromptEmbeddings


def test_half_precision_of_everything(folder, picture):
    pipeline = quiet(TSDSRPipeline.from_pretrained(folder)).to(dtype=torch.float16)
    assert {pipeline.vae.dtype, pipeline.transformer.dtype, pipeline.prompt_embeddings.dtype} == {torch.float16}
    pipeline = pipeline.to(dtype=torch.bfloat16)
    assert np.isfinite(pipeline(picture(8, 8), **{**SMALL, "output_type": "np"}).images).all()


def test_models_of_a_folder_load_alone(folder):
    transformer = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert isinstance(AutoencoderKL.from_pretrained(folder, subfolder="vae"), AutoencoderKL)
    prompt = PromptEmbeddings.from_pretrained(folder, subfolder="prompt_embeddings")
    assert prompt.prompt_embeds.shape[2] == transformer.config.joint_attention_dim
