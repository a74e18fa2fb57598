"""Both families behind one interface: velocities, the student's one step, guidance."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from tsdsr.training.families import Ddpm, RectifiedFlow, guided_velocity
from tsdsr.training.objectives import add_noise, noise_levels

TOKENS, POOLED = 12, 10


@pytest.fixture
def prompt():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, TOKENS, generator=generator), torch.randn(1, POOLED, generator=generator)


def ddpm(prediction_type):
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )
    return Ddpm(scheduler)


def case(make_pipeline, name):
    if name == "flow":
        return RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0)), make_pipeline("kl").transformer
    return ddpm(name), make_pipeline("kl", network="unet").unet


@pytest.mark.parametrize("timestep", [None, 800])
@pytest.mark.parametrize("name", ["flow", "epsilon", "v_prediction"])
def test_the_students_step_is_the_pipelines(make_pipeline, name, prompt, timestep):
    family, network = case(make_pipeline, name)
    family.timestep = timestep or family.timestep
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    kind = "transformer" if name == "flow" else "unet"
    pipeline = make_pipeline("kl", network=kind, scheduler=family.scheduler, timestep=timestep)
    embeds = pipeline.prompt_embeddings.prompt_embeds, pipeline.prompt_embeddings.pooled_prompt_embeds
    latents = pipeline(torch.zeros(2, 3, 16, 16), upscale=1, process_size=0, output_type="latent", latents=z).images
    with torch.no_grad():
        ours = family.one_step(network, z, embeds)
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4 * float(latents.abs().max()))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_ddpm_step_is_the_formula(make_pipeline, prediction_type, prompt):
    """z^ = (z - sqrt(1 - abar) eps) / sqrt(abar), or sqrt(abar) z - sqrt(1 - abar) v, at t = 999."""
    family, network = case(make_pipeline, prediction_type)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cumulative = float(family.scheduler.alphas_cumprod[999])
    with torch.no_grad():
        out = network(z, 999, encoder_hidden_states=prompt[0].expand(2, -1, -1)).sample
        ours = family.one_step(network, z, prompt)
    alpha, s = cumulative**0.5, (1 - cumulative) ** 0.5
    expected = (z - s * out) / alpha if prediction_type == "epsilon" else alpha * z - s * out
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_perfect_network_gives_the_velocity(prompt):
    """A network that knows the noise: the velocity is noise - clean in both families."""
    generator = torch.Generator().manual_seed(2)
    clean, noise = torch.randn(2, 2, 4, 4, 4, generator=generator)
    family = ddpm("epsilon")
    sigma = noise_levels(family.scheduler)[[100, 700]]

    class Knows:
        def __call__(self, z, timestep, encoder_hidden_states):
            self.timestep = timestep
            return type("Output", (), {"sample": noise})

    network = Knows()
    velocity = family.velocity(network, prompt)(add_noise(clean, noise, sigma), sigma)
    torch.testing.assert_close(velocity, noise - clean, rtol=1e-3, atol=1e-3)
    assert network.timestep.tolist() == [899, 299]


@pytest.mark.parametrize("name", ["flow", "epsilon"])
def test_guidance(make_pipeline, name, prompt):
    """One pass with both prompts equals two passes; each sample has its own prompt and level."""
    family, network = case(make_pipeline, name)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    own = torch.randn(2, 3, TOKENS, generator=generator), torch.randn(2, POOLED, generator=generator)
    null = tuple(torch.zeros_like(part) for part in prompt)
    if name == "epsilon":
        own, null = (own[0], None), (null[0], None)
    sigma = noise_levels(family.scheduler)[[400, 900]]
    with torch.no_grad():
        wanted = family.velocity(network, own)(z, sigma)
        empty = family.velocity(network, null)(z, sigma)
        guided = guided_velocity(family, network, own, null, 7.5)(z, sigma)
        alone = guided_velocity(family, network, own, None, 1.0)(z, sigma)
        first = family.velocity(network, tuple(part if part is None else part[:1] for part in own))(z[:1], sigma[:1])
    torch.testing.assert_close(guided, empty + 7.5 * (wanted - empty), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone, wanted, rtol=0, atol=0)
    torch.testing.assert_close(first, wanted[:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="null prompt"):
        guided_velocity(family, network, own, None, 7.5)
