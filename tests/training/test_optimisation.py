"""What moves the weights: separate rates and norms, schedules, the average."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator

from tsdsr.training.base import build_networks, load_base
from tsdsr.training.config import ConfigError
from tsdsr.training.networks import DISCRIMINATOR, FAKE_SCORE, STUDENT
from tsdsr.training.optimisation import Average, NotFiniteError, Optimisation, check_finite


@pytest.fixture
def make(config, tmp_path, base_folder):
    """A function that makes networks and what optimises them."""

    def go(**changed):
        settings = config(tmp_path, **changed)
        networks = build_networks(load_base(settings, str(base_folder)), settings, torch.float32)
        return networks, Optimisation(settings, networks, Accelerator(cpu=True))

    return go


def set_gradients(networks, role, value):
    weights = networks.parameters_of(role)
    for weight in weights:
        weight.grad = torch.full_like(weight, value)
    return weights


def test_roles_have_their_own_rates_and_weights(make):
    """Adam's first step is as long as the rate, whatever the gradient: once for each role, and only for its weights."""
    networks, optimisation = make(
        learning_rate=1e-3, fake_score_learning_rate=1e-4, adam_weight_decay=0, lr_scheduler="constant"
    )
    assert optimisation.rates() == {"lr_student": 1e-3, "lr_fake_score": 1e-4}
    before = {role: [w.detach().clone() for w in networks.parameters_of(role)] for role in (STUDENT, FAKE_SCORE)}
    set_gradients(networks, STUDENT, 1.0)
    other = set_gradients(networks, FAKE_SCORE, 1.0)
    for role, rate in ((STUDENT, 1e-3), (FAKE_SCORE, 1e-4)):
        optimisation.step(role)
        for was, weight in zip(before[role], networks.parameters_of(role), strict=True):
            torch.testing.assert_close(was - weight, torch.full_like(weight, rate), rtol=1e-2, atol=1e-6)
            assert weight.grad is None
        if role == STUDENT:
            assert all(w.grad is not None for w in other), "the other role's gradients were dropped"
            assert all(torch.equal(w, was) for w, was in zip(other, before[FAKE_SCORE], strict=True))


def test_every_role_is_clipped_to_the_norm_by_itself(make, monkeypatch):
    networks, optimisation = make(max_grad_norm=0.5)
    set_gradients(networks, STUDENT, 2.0)
    set_gradients(networks, FAKE_SCORE, 3.0)
    norms = {}
    for role in (STUDENT, FAKE_SCORE):
        optimizer = optimisation._optimizers[role]

        def step(role=role):
            norms[role] = math.sqrt(sum(float(w.grad.square().sum()) for w in networks.parameters_of(role)))

        monkeypatch.setattr(optimizer, "step", step)
        optimisation.step(role)
    assert norms == {STUDENT: pytest.approx(0.5, rel=1e-3), FAKE_SCORE: pytest.approx(0.5, rel=1e-3)}


def test_small_gradients_are_left_alone(make, monkeypatch):
    networks, optimisation = make(max_grad_norm=1e6)
    weights = set_gradients(networks, STUDENT, 2.0)
    monkeypatch.setattr(
        optimisation._optimizers[STUDENT],
        "step",
        lambda: pytest.fail("clipped") if any((w.grad != 2).any() for w in weights) else None,
    )
    optimisation.step(STUDENT)


def test_schedules_are_counted_in_steps_of_the_student(make):
    """With three updates of the fake score for one of the student, both warm up and end together."""
    more = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "max_train_steps": 4, "fake_score_updates": 3}
    _, optimisation = make(learning_rate=1.0, fake_score_learning_rate=1.0, **more)
    seen = [optimisation.rates()]
    for _ in range(4):
        optimisation.step(STUDENT)
        for _ in range(3):
            optimisation.step(FAKE_SCORE)
        seen.append(optimisation.rates())
    assert [rates["lr_student"] for rates in seen] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [rates["lr_fake_score"] for rates in seen] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_the_discriminator_has_an_optimiser_of_its_own(make):
    """Where there is one: with a rate, a momentum and a schedule that the others do not share."""
    _, without = make()
    assert without.rates().keys() == {"lr_student", "lr_fake_score"}
    more = {"adversarial": 0.1, "discriminator_width": 4, "discriminator_layers": 1, "discriminator_beta1": 0.25}
    networks, optimisation = make(**more, discriminator_learning_rate=3e-3, lr_scheduler="constant")
    assert optimisation.rates()["lr_discriminator"] == 3e-3
    (group,) = optimisation._optimizers[DISCRIMINATOR].param_groups
    assert group["betas"] == (0.25, 0.999)
    assert {id(w) for w in group["params"]} == {id(w) for w in networks.discriminator.parameters()}
    norms = {name: buffer.clone() for name, buffer in networks.discriminator.named_buffers()}
    other = set_gradients(networks, STUDENT, 1.0)
    before = [weight.detach().clone() for weight in set_gradients(networks, DISCRIMINATOR, 1.0)]
    optimisation.step(DISCRIMINATOR)
    assert all(not torch.equal(was, w) for was, w in zip(before, networks.parameters_of(DISCRIMINATOR), strict=True))
    assert all(weight.grad is not None for weight in other)
    assert not any(torch.equal(buffer, norms[name]) for name, buffer in networks.discriminator.named_buffers())


@pytest.mark.parametrize("name", ["sometimes", "piecewise_constant"])
def test_schedules_that_cannot_be_used(make, name):
    with pytest.raises(ConfigError, match=f"lr_scheduler {name} cannot be used"):
        make(lr_scheduler=name)


def test_the_average_is_lent(make):
    """diffusers' average: in step n it decays by n / (9 + n), until that is the decay asked for; in the first by 0."""
    networks, optimisation = make(ema_decay=0.9, lr_scheduler="constant", learning_rate=0.1)
    weights = networks.parameters_of(STUDENT)
    shadow = [weight.detach().clone() for weight in weights]
    for step in range(1, 4):
        set_gradients(networks, STUDENT, 1.0)
        optimisation.step(STUDENT)
        decay = step / (9 + step) if step > 1 else 0
        shadow = [decay * s + (1 - decay) * w.detach() for s, w in zip(shadow, weights, strict=True)]
        set_gradients(networks, FAKE_SCORE, 1.0)
        optimisation.step(FAKE_SCORE)
    raw = [weight.detach().clone() for weight in weights]
    with pytest.raises(ZeroDivisionError), optimisation.averaged():
        for weight, expected, was in zip(weights, shadow, raw, strict=True):
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-3, atol=1e-4)
            assert not torch.equal(weight, was)
        raise ZeroDivisionError
    assert all(torch.equal(weight, was) for weight, was in zip(weights, raw, strict=True))


def test_without_an_average_the_weights_are_themselves(make):
    networks, optimisation = make()
    before = [weight.detach().clone() for weight in networks.parameters_of(STUDENT)]
    with optimisation.averaged():
        assert all(torch.equal(*pair) for pair in zip(before, networks.parameters_of(STUDENT), strict=True))


def test_a_loaded_average_stays_on_its_device():
    """accelerate reads checkpoints to the CPU. The device "meta" stands for a GPU."""
    saved = copy.deepcopy(Average([torch.ones(2)], decay=0.9).state_dict())
    average = Average([torch.ones(2, device="meta")], decay=0.5)
    average.load_state_dict(saved)
    assert average.shadow_params[0].device.type == "meta" and average.decay == 0.9
    on_cpu = Average([torch.zeros(2)], decay=0.5)
    on_cpu.load_state_dict(saved)
    assert torch.equal(on_cpu.shadow_params[0], torch.ones(2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(make, value):
    with pytest.raises(NotFiniteError, match=f"The loss tsd became {value}"):
        check_finite("The loss tsd", torch.tensor(value))
    check_finite("The loss tsd", torch.tensor(1e30))
    networks, optimisation = make()
    before = [weight.detach().clone() for weight in networks.parameters_of(FAKE_SCORE)]
    set_gradients(networks, FAKE_SCORE, 1.0)[0].grad[0, 0] = value
    with pytest.raises(NotFiniteError, match="The gradient of the fake score became"):
        optimisation.step(FAKE_SCORE)
    assert all(torch.equal(*pair) for pair in zip(before, networks.parameters_of(FAKE_SCORE), strict=True))
