"""One base in three roles."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

from tsdsr.models import lora_targets
from tsdsr.training.discriminators import PatchDiscriminator
from tsdsr.training.families import RectifiedFlow
from tsdsr.training.networks import DISCRIMINATOR, FAKE_SCORE, STUDENT, TEACHER, Networks, SharedBase
from tsdsr.training.objectives import dasm_trajectory, tsd_gradient, tsd_loss

FAMILY = RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0))


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
        return FAMILY.velocity(base.network, prompt)(z, torch.full((2,), sigma))


def test_the_teacher_is_the_base_itself(make_pipeline, base, inputs):
    z, prompt = inputs
    with torch.no_grad():
        plain = FAMILY.velocity(make_pipeline().transformer, prompt)(z, torch.full((2,), 0.5))
    torch.testing.assert_close(run(base, TEACHER, inputs), plain, rtol=0, atol=1e-5)
    student, fake = run(base, STUDENT, inputs), run(base, FAKE_SCORE, inputs)
    assert (student - plain).abs().mean() > 1e-3 < (fake - plain).abs().mean()
    assert (student - fake).abs().mean() > 1e-3
    torch.testing.assert_close(run(base, TEACHER, inputs), plain, rtol=0, atol=1e-5)


def test_a_teacher_may_have_an_adapter(transformer, inputs):
    base = SharedBase(transformer, {TEACHER: lora(["to_q"]), STUDENT: lora(["to_q"]), FAKE_SCORE: lora(["to_q"])})
    results = [run(base, role, inputs) for role in (TEACHER, STUDENT, FAKE_SCORE)]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    assert not any(weight.requires_grad for weight in base.parameters(TEACHER))
    with base.role(TEACHER):  # nor where a gradient passes through it
        assert not any(weight.requires_grad for weight in base.parameters(TEACHER))
        assert all(weight.requires_grad for role in (STUDENT, FAKE_SCORE) for weight in base.parameters(role))


def test_roles_nest(base, inputs):
    with base.role(STUDENT):
        before = run(base, STUDENT, inputs)
        with base.role(TEACHER), base.role(FAKE_SCORE):
            pass
        z, prompt = inputs
        with torch.no_grad():
            assert torch.equal(FAMILY.velocity(base.network, prompt)(z, torch.full((2,), 0.5)), before)


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
    if checkpointing:
        base.network.enable_gradient_checkpointing()
        base.network.train()
    z, prompt = inputs
    sigmas = dasm_trajectory(FlowMatchEulerDiscreteScheduler(shift=3.0), 2, generator=torch.Generator().manual_seed(0))

    def as_role(role):
        def velocity(latents, sigma):
            with base.role(role):
                return FAMILY.velocity(base.network, prompt)(latents, sigma)

        return velocity

    with base.role(STUDENT):
        student = FAMILY.one_step(base.network, z, prompt)
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
            student = FAMILY.one_step(base.network, z, prompt)
            tsd_loss(student, gradient.gradient).backward()
        for ours, weight in zip(kept, plain, strict=True):
            torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-7)


def test_roles_are_named(transformer):
    with pytest.raises(ValueError, match="not critic"):
        SharedBase(transformer, {"critic": lora(["to_q"])})


def test_a_student_with_a_network_of_its_own(make_pipeline, inputs):
    own = make_pipeline().transformer
    base = SharedBase(make_pipeline().transformer, {FAKE_SCORE: lora(["to_q"])}, own)
    with base.role(STUDENT) as network:
        assert network is own
    with base.role(TEACHER) as network:
        assert network is base.network
    assert {id(weight) for weight in base.parameters(STUDENT)} == {id(weight) for weight in own.parameters()}
    assert all(".fake_score." in name for name in base.named_parameters(FAKE_SCORE))


@pytest.fixture
def networks(make_pipeline):
    pipeline = make_pipeline("kl")
    torch.manual_seed(5)
    loras = {STUDENT: lora(lora_targets.STUDENT), FAKE_SCORE: lora(lora_targets.FAKE_SCORE)}
    vae = SharedBase(pipeline.vae, {STUDENT: lora(["encoder.conv_in", "encoder.conv_out"])})
    return Networks(FAMILY, SharedBase(pipeline.transformer, loras), vae, shift=0.06), make_pipeline("kl")


def test_latents_are_the_pipelines(networks, inputs):
    """Scaling and shift as the pipeline applies them, and the base's own encoder for HQ pictures."""
    ours, pipeline = networks
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mode = pipeline.vae.encode(pictures).latent_dist.mode()
    torch.testing.assert_close(ours.hq_latents(pictures), (mode - 0.06) * 1.5, rtol=1e-5, atol=1e-5)
    with ours.role(STUDENT):
        student, nothing = ours(STUDENT, pictures, prompt=inputs[1])
        again, decoded = ours(STUDENT, pictures, prompt=inputs[1], decode=True)
        assert (ours._encode(ours.vae, pictures) - ours.hq_latents(pictures)).abs().max() > 1e-3
    assert student.shape == (2, 4, 8, 8) and nothing is None and torch.equal(student, again)
    with torch.no_grad():
        expected = pipeline.vae.decode(student / 1.5 + 0.06).sample
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


def test_the_decoder_passes_gradients_and_has_none(networks, inputs):
    ours, _ = networks
    latents = torch.zeros(1, 4, 8, 8, requires_grad=True)
    ours.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in ours.vae.decoder.parameters())


def test_a_decoder_that_is_trained(make_pipeline, inputs):
    """It belongs to the student alone, stays trainable in every role, and a pass through `forward` reaches it."""
    pipeline = make_pipeline("kl")
    vae = SharedBase(pipeline.vae, {STUDENT: lora(["encoder.conv_in"])}, trained=("decoder",))
    ours = Networks(FAMILY, SharedBase(pipeline.transformer, {STUDENT: lora(["to_q"])}), vae)
    decoder = {id(weight) for weight in pipeline.vae.decoder.parameters()}
    assert decoder < {id(weight) for weight in ours.parameters_of(STUDENT)}
    assert not decoder & {id(weight) for role in (TEACHER, FAKE_SCORE) for weight in ours.parameters_of(role)}
    names = {name for name in ours.trained() if "lora" not in name}
    assert names == {f"vae.decoder.{name}" for name, _ in pipeline.vae.decoder.named_parameters()}
    for role in (TEACHER, FAKE_SCORE, STUDENT):
        with ours.role(role):
            assert all(weight.requires_grad for weight in pipeline.vae.decoder.parameters())
            assert not any(w.requires_grad for n, w in pipeline.vae.encoder.named_parameters() if "lora" not in n)
    with ours.role(STUDENT):
        _, pictures = ours(STUDENT, torch.rand(1, 3, 16, 16), prompt=inputs[1], decode=True)
        pictures.square().sum().backward()
    assert all(weight.grad is not None for weight in pipeline.vae.decoder.parameters())


def test_the_discriminator_is_a_role_of_its_own(networks, inputs):
    ours, _ = networks
    assert ours.parameters_of(DISCRIMINATOR) == [] and not any("discriminator" in name for name in ours.trained())
    plain = ours.trained().keys()
    torch.manual_seed(0)
    ours.discriminator = PatchDiscriminator(width=4, layers=1).eval()
    weights = ours.parameters_of(DISCRIMINATOR)
    assert weights and not {id(w) for w in weights} & {id(w) for w in ours.parameters_of(STUDENT)}
    more = ours.trained().keys() - plain
    assert {name for name in more if name.endswith(("._u", "._v"))} and all("discriminator." in name for name in more)
    pictures = torch.rand(2, 3, 16, 16)
    assert ours(DISCRIMINATOR, pictures).shape == (2, 1, 8, 8)
    torch.testing.assert_close(ours.judge(DISCRIMINATOR, pictures)[-1], ours(DISCRIMINATOR, pictures))
    before = {name: buffer.clone() for name, buffer in ours.discriminator.named_buffers()}
    with torch.no_grad():
        for weight in weights:
            weight += 0.1 * torch.randn_like(weight)
    ours.stepped(STUDENT)
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.discriminator.named_buffers())
    ours.stepped(DISCRIMINATOR)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in ours.discriminator.named_buffers())
