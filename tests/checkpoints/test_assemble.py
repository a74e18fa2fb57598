"""The published weights over an SD3 base, in memory."""

import pytest
import torch

from tsdsr import TSDSRPipeline
from tsdsr.checkpoints import CheckpointError, assemble_tsdsr

SMALL = {"process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "pt"}


def run(pipeline, picture):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(picture(10, 12), **SMALL).images


@pytest.mark.parametrize("merge_lora", [True, False])
def test_agrees_with_the_converted_folder(published, merged, picture, merge_lora):
    pipeline = assemble_tsdsr(
        published.base, published.base, published.lora, published.embeddings, merge_lora=merge_lora
    )
    expected = run(TSDSRPipeline.from_pretrained(merged, local_files_only=True), picture)
    torch.testing.assert_close(run(pipeline, picture), expected, rtol=0, atol=2e-5)


def test_strength_of_a_kept_lora(published, picture):
    pipeline = assemble_tsdsr(published.base, published.base, published.lora, published.embeddings, merge_lora=False)
    whole = run(pipeline, picture)
    pipeline.set_adapters(["tsdsr"], [0.0])
    without = run(pipeline, picture)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(run(pipeline, picture), without, rtol=0, atol=1e-5)
    assert (whole - without).abs().max() > 1e-3


def test_single_files(networks, published, save_single_file, picture, tmp_path):
    """A base of one file gives what the same base as a folder gives."""
    from safetensors.torch import save_file

    models = {
        "transformer": networks.transformer(
            attention_head_dim=64, caption_projection_dim=128, in_channels=16, out_channels=16
        ),
        "vae": networks.vae(latent_channels=16, norm_num_groups=8),
    }
    base = tmp_path / "sd3"
    for seed, (side, model) in enumerate(models.items()):
        model.save_pretrained(base / side)
        lora = networks.random_lora(model, networks.modules[side], seed)
        (tmp_path / "lora").mkdir(exist_ok=True)
        save_file(lora, tmp_path / "lora" / f"{side}.safetensors")
    whole = save_single_file(tmp_path / "sd3.safetensors", models["transformer"], models["vae"])
    vae = save_single_file(tmp_path / "vae.safetensors", vae=models["vae"], prefixes=("", ""))
    results = [
        run(assemble_tsdsr(*parts, tmp_path / "lora", published.embeddings), picture)
        for parts in ((base, base), (whole, whole), (whole, vae))
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("part", "path", "said"),
    [
        ("transformer", "nowhere.safetensors", "is missing where the transformer of SD3"),
        ("vae", "nowhere.safetensors", "is missing where the vae of SD3"),
        ("transformer", ".", "has no transformer/config.json"),
        ("lora", "nowhere", "transformer.safetensors is missing"),
        ("embeddings", "nowhere", "prompt_embeds.pt"),
    ],
)
def test_missing_parts(published, tmp_path, one_sentence, part, path, said):
    parts = {
        "transformer": published.base,
        "vae": published.base,
        "lora": published.lora,
        "embeddings": published.embeddings,
    }
    with pytest.raises(CheckpointError) as caught:
        assemble_tsdsr(**{**parts, part: tmp_path / path})
    one_sentence(caught.value, said)


def test_vae_of_another_model(published, networks, tmp_path, one_sentence):
    networks.vae(latent_channels=8).save_pretrained(tmp_path / "other" / "vae")
    with pytest.raises(CheckpointError) as caught:
        assemble_tsdsr(published.base, tmp_path / "other", published.lora, published.embeddings)
    one_sentence(caught.value, "8 latent channels", "4")
