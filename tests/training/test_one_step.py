"""A whole model as a teacher: what the pipeline itself computes."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tsdsr import TSDSRPipeline
from tsdsr.training.config import ConfigError
from tsdsr.training.one_step import OneStepModel, baked_step, decoded


@pytest.mark.parametrize(("kind", "shifted"), [("kl", True), ("kl", False), ("tiny", False)])
def test_it_computes_what_the_pipeline_does(make_pipeline, tmp_path, kind, shifted):
    make_pipeline(kind, use_shift_factor=shifted, timestep=700.0).save_pretrained(tmp_path)
    pipeline = TSDSRPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    model = OneStepModel.load(tmp_path)
    side = model.size_multiple
    pictures = torch.rand(1, 3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(0))
    given = {"upscale": 1, "process_size": 0, "sample_posterior": False, "color_fix": "none"}
    latents = pipeline(pictures, **given, output_type="latent").images
    images = pipeline(pictures, **given, output_type="pt").images
    lq_latents = model.lq_latents(pictures * 2 - 1)
    restored = model.restored(lq_latents)
    torch.testing.assert_close(restored, latents, rtol=0, atol=3e-5)
    torch.testing.assert_close(
        (decoded(model.vae, restored, model.shift) / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=3e-5
    )
    assert (restored - lq_latents).abs().max() > 1e-3
    assert (model.shift == 0.06) == shifted and torch.equal(model.plain_latents(pictures * 2 - 1), lq_latents)
    pipeline.bake()
    with torch.no_grad():
        torch.testing.assert_close(baked_step(pipeline.transformer, lq_latents), restored, rtol=0, atol=3e-5)


def test_loras_beside_the_weights_are_added(make_pipeline, tmp_path):
    """To the transformer and the encoder; HQ latents stay those of the base's own encoder."""
    pipeline = make_pipeline("kl")
    pipeline.save_pretrained(tmp_path)
    plain = OneStepModel.load(tmp_path)
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    torch.manual_seed(3)
    for network, targets in ((pipeline.transformer, ["to_q"]), (pipeline.vae, ["conv_in"])):
        network.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="beside")
    layers = {
        f"{name}_lora_layers": {
            key.replace(".beside", ""): tensor for key, tensor in network.state_dict().items() if ".lora_" in key
        }
        for name, network in (("transformer", pipeline.transformer), ("vae", pipeline.vae))
    }
    TSDSRPipeline.save_lora_weights(tmp_path, **layers)
    model = OneStepModel.load(tmp_path)
    assert not getattr(model.transformer, "peft_config", None) and model.fingerprint() != plain.fingerprint()
    assert torch.equal(model.plain_latents(pictures), plain.plain_latents(pictures))
    assert not torch.allclose(model.lq_latents(pictures), plain.lq_latents(pictures), atol=1e-3)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(model.transformer.state_dict()[name], plain.transformer.state_dict()[name])


def test_models_differ_by_their_fingerprint(make_pipeline, tmp_path):
    pipeline = make_pipeline("kl")
    pipeline.save_pretrained(tmp_path / "a")
    nn.init.ones_(pipeline.transformer.proj_out.bias)
    pipeline.save_pretrained(tmp_path / "b")
    first, again, other = (OneStepModel.load(tmp_path / name).fingerprint() for name in "aab")
    assert first == again != other


def test_without_a_prompt_it_is_none(make_pipeline, tmp_path):
    pipeline = make_pipeline("kl", prompt_embeddings=None)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no fixed prompt: save it with prompt_embeddings"):
        OneStepModel.load(tmp_path)
