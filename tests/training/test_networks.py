"""One base in three roles."""

import pytest
import torch
from peft import LoraConfig

from tsdsr.models import lora_targets
from tsdsr.training.networks import (
    FAKE_SCORE,
    STUDENT,
    TEACHER,
    SharedBase,
    flow_velocity,
    one_step,
)
from tsdsr.training.objectives import dasm_trajectory, tsd_gradient, tsd_loss


def lora(targets):
    return LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=list(targets))


@pytest.fixture
def transformer(make_pipeline):
    return make_pipeline().transformer


@pytest.fixture
def base(transformer):
    torch.manual_seed(3)
    return SharedBase(transformer, {STUDENT: lora(lora_targets.STUDENT), FAKE_SCORE: lora(lora_targets.FAKE_SCORE)})


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    return z, (torch.randn(1, 3, 12, generator=generator), torch.randn(1, 10, generator=generator))


def run(base, role, inputs, sigma=0.5):
    z, prompt = inputs
    with torch.no_grad(), base.role(role):
        return flow_velocity(base.network, prompt)(z, torch.full((2,), sigma))


def test_the_teacher_is_the_base_itself(make_pipeline, base, inputs):
    z, prompt = inputs
    with torch.no_grad():
        plain = flow_velocity(make_pipeline().transformer, prompt)(z, torch.full((2,), 0.5))
    torch.testing.assert_close(run(base, TEACHER, inputs), plain, rtol=0, atol=1e-6)
    student, fake = run(base, STUDENT, inputs), run(base, FAKE_SCORE, inputs)
    assert (student - plain).abs().mean() > 1e-3 < (fake - plain).abs().mean()
    assert (student - fake).abs().mean() > 1e-3
    torch.testing.assert_close(run(base, TEACHER, inputs), plain, rtol=0, atol=1e-6)


def test_a_teacher_may_have_an_adapter(transformer, inputs):
    base = SharedBase(transformer, {TEACHER: lora(["to_q"]), STUDENT: lora(["to_q"]), FAKE_SCORE: lora(["to_q"])})
    results = [run(base, role, inputs) for role in (TEACHER, STUDENT, FAKE_SCORE)]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    assert not any(weight.requires_grad for weight in base.parameters(TEACHER))


def test_roles_nest(base, inputs):
    with base.role(STUDENT):
        before = run(base, STUDENT, inputs)
        with base.role(TEACHER), base.role(FAKE_SCORE):
            pass
        z, prompt = inputs
        with torch.no_grad():
            assert torch.equal(flow_velocity(base.network, prompt)(z, torch.full((2,), 0.5)), before)


def test_trainable_weights_are_those_of_the_adapters_in_every_role(base):
    def trainable():
        return {name for name, weight in base.network.named_parameters() if weight.requires_grad}

    expected = {
        name for name, _ in base.network.named_parameters() if f".{STUDENT}." in name or f".{FAKE_SCORE}." in name
    }
    assert trainable() == expected
    for role in (STUDENT, TEACHER, FAKE_SCORE):
        with base.role(role):
            assert trainable() == expected
    assert not {id(w) for w in base.parameters(STUDENT)} & {id(w) for w in base.parameters(FAKE_SCORE)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_each_role_reaches_its_own_weights(base, inputs, checkpointing):
    """With the networks switched in between, as a training step does it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if checkpointing:
        base.network.enable_gradient_checkpointing()
        base.network.train()
    z, prompt = inputs
    sigmas = dasm_trajectory(FlowMatchEulerDiscreteScheduler(shift=3.0), 2, generator=torch.Generator().manual_seed(0))

    def as_role(role):
        def velocity(latents, sigma):
            with base.role(role):
                return flow_velocity(base.network, prompt)(latents, sigma)

        return velocity

    with base.role(STUDENT):
        student = one_step(base.network, z, prompt)
        gradient = tsd_gradient(student, z, torch.ones_like(z), sigmas, as_role(TEACHER), as_role(FAKE_SCORE))
        tsd_loss(student, gradient.gradient).backward()
    grads = [weight.grad for weight in base.parameters(STUDENT)]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    assert sum(float(grad.abs().sum()) for grad in grads) > 0
    assert all(weight.grad is None for weight in base.parameters(FAKE_SCORE))
    if checkpointing:
        base.network.disable_gradient_checkpointing()
        plain = SharedBase.parameters(base, STUDENT)
        kept = [grad.clone() for grad in grads]
        for weight in plain:
            weight.grad = None
        with base.role(STUDENT):
            student = one_step(base.network, z, prompt)
            tsd_loss(student, gradient.gradient).backward()
        for ours, weight in zip(kept, plain, strict=True):
            torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-7)


def test_guidance(base, inputs):
    z, prompt = inputs
    null = tuple(torch.zeros_like(part) for part in prompt)
    sigma = torch.tensor([0.3, 0.9])
    with torch.no_grad(), base.role(TEACHER):
        with_prompt = flow_velocity(base.network, prompt)(z, sigma)
        without = flow_velocity(base.network, null)(z, sigma)
        guided = flow_velocity(base.network, prompt, null, 7.5)(z, sigma)
    torch.testing.assert_close(guided, without + 7.5 * (with_prompt - without), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="null prompt"):
        flow_velocity(base.network, prompt, None, 7.5)


def test_the_students_step_is_the_pipelines(make_pipeline, inputs):
    pipeline = make_pipeline()
    z, _ = inputs
    prompt = pipeline.prompt_embeddings(1)
    picture = torch.zeros(2, 3, 32, 32)
    latents = pipeline(picture, upscale=1, process_size=0, output_type="latent", latents=z).images
    with torch.no_grad():
        torch.testing.assert_close(one_step(pipeline.transformer, z, prompt), latents, rtol=1e-5, atol=1e-6)


def test_roles_are_named(transformer):
    with pytest.raises(ValueError, match="not critic"):
        SharedBase(transformer, {"critic": lora(["to_q"])})
