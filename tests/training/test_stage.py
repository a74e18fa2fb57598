"""The loop of a stage: accumulation, what checkpoints hold, what stops it."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tsdsr.imaging import Picture, write
from tsdsr.training.checkpointing import Checkpoints
from tsdsr.training.config import ConfigError, DistillConfig
from tsdsr.training.data import Folder
from tsdsr.training.discriminators import PatchDiscriminator
from tsdsr.training.distill import make_accelerator
from tsdsr.training.reporting import TrainingError
from tsdsr.training.stage import Adversary, Made, Stage, Task, changed_settings, run_stage


@pytest.fixture
def flat(tmp_path):
    """Eight pictures of one colour each, so that all crops of one are alike."""
    (tmp_path / "flat").mkdir()
    for index in range(8):
        colour = np.random.default_rng(index).random((1, 1, 3), dtype=np.float32)
        write(Picture(np.broadcast_to(colour, (16, 16, 3)).copy()), tmp_path / "flat" / f"{index}.png")
    return Folder(tmp_path / "flat")


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.learned = nn.Conv2d(3, 4, 1).requires_grad_(False), nn.Conv2d(4, 3, 1)

    def forward(self, pictures):
        return self.learned(self.frozen(pictures))


@pytest.fixture
def train(flat, tmp_path):
    """A function that trains a toy to turn colours around: `train(name, stage settings, **more)`; returns the toy."""

    def go(name, resume=False, about=None, judged=False, spoil=None, weights=(2.0, 0.0), **settings):
        stage = Stage(**{"steps": 3, "train_batch_size": 2, "resolution": 8, "warmup_steps": 0, **settings})
        config = DistillConfig(
            pretrained_model_name_or_path="x",
            train_data_dir="x",
            logging_steps=1,
            resume_from_checkpoint="latest" if resume else None,
            output_dir=str(tmp_path / name),
            phases=[],
            max_train_steps=1,
        )
        toy, go.terms = Toy(), []

        @contextmanager
        def terms(model, batch, progress):
            hq = batch["hq"] * 2 - 1
            output = model(hq)
            loss = (output + hq).square().mean()
            go.terms.append((progress, len(hq)))
            kept = (output - hq).square().mean()
            yield Made({"turned": loss if spoil is None else spoil(loss), "kept": kept}, output, hq)

        adversary = None
        if judged:
            torch.manual_seed(1)
            adversary = Adversary(config, PatchDiscriminator(4, 2).eval(), 0.1, begins=0.5)
        run_stage(
            Task("toy", toy, terms, dict(zip(("turned", "kept"), weights, strict=True)), adversary),
            stage,
            stage.batches(config, "toy"),
            config,
            make_accelerator(config),
            flat,
            tmp_path / name,
            checkpointing_steps=2,
            log=True,
            about=about,
        )
        return toy

    return go


@pytest.mark.parametrize("judged", [False, True])
def test_two_small_micro_batches_are_one_large_one(train, judged):
    whole = train("whole", train_batch_size=4, judged=judged)
    parts = train("parts", train_batch_size=2, gradient_accumulation_steps=2, judged=judged)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=1e-6)
    assert not torch.equal(whole.learned.weight, Toy().learned.weight)
    assert torch.equal(whole.frozen.weight, Toy().frozen.weight)


def test_progress_and_log(train, tmp_path):
    train("run", gradient_accumulation_steps=2)
    assert train.terms == [(0.0, 2)] * 2 + [(0.5, 2)] * 2 + [(1.0, 2)] * 2
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] and all(line["phase"] == "toy" for line in log)
    assert log[-1]["turned"] < log[0]["turned"] and log[-1]["learning_rate"] < log[0]["learning_rate"]


def test_weights_say_which_terms_count(train, tmp_path):
    """The two want opposite things; both are logged, without their weights."""
    ends = []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        train(str(weights), weights=weights, learning_rate=0.02, train_batch_size=8)
        ends.append(json.loads((tmp_path / str(weights) / "log.jsonl").read_text().splitlines()[-1]))
    assert ends[0]["turned"] < ends[1]["turned"] - 0.01 and ends[1]["kept"] < ends[0]["kept"] - 0.01


def test_an_adversary_is_listened_to(train):
    """Its loss is the weighted hinge loss, falling with what the discriminator likes, to the pictures alone."""
    config = DistillConfig(pretrained_model_name_or_path="x", train_data_dir="x", phases=[], max_train_steps=1)
    judge = PatchDiscriminator(4, 2).eval()
    adversary = Adversary(config, judge, 0.3, begins=0.25)
    pictures = torch.rand(2, 3, 8, 8).requires_grad_(True)
    loss = adversary.loss(pictures, torch.rand(2, 3, 8, 8))
    torch.testing.assert_close(loss, -0.3 * judge(pictures).mean())
    loss.backward()
    assert pictures.grad.abs().max() > 0 and all(weight.grad is None for weight in judge.parameters())
    assert float(adversary.unweighted({"adversarial": loss})["adversarial"]) == pytest.approx(float(loss) / 0.3)
    assert [adversary.begin(steps) for steps in (4, 5, 8)] == [1, 2, 2]

    pictures.grad = None
    config.adversarial_balance = True
    balanced = adversary.loss(pictures, torch.rand(2, 3, 8, 8))
    torch.testing.assert_close(balanced, loss)
    balanced.backward()
    assert float(pictures.grad.square().mean().sqrt() * pictures.numel()) == pytest.approx(0.3, rel=1e-4)


def test_a_checkpoint_holds_what_is_trained(train, tmp_path):
    train("run", judged=True)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["adversarial" in line for line in log] == ["discriminator" in line for line in log] == [False, False, True]
    (path,) = Checkpoints(None, tmp_path / "run").all()
    names = load_file(path / "trained.safetensors").keys()
    assert {"learned.weight", "learned.bias"} < names and not any(name.startswith("frozen") for name in names)
    assert any(name.startswith("discriminator.") for name in names) and not (path / "model.safetensors").exists()


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_it(train, tmp_path, kind):
    calls = []

    def spoil(loss):
        calls.append(1)
        return loss * kind if len(calls) == 3 else loss

    with pytest.raises(TrainingError) as ended:
        train("run", spoil=spoil)
    said = str(ended.value)
    assert (
        said.startswith(f"The loss turned became {kind} in step 3 of toy; ") and "checkpoint-2 is whole. Lower" in said
    )


def test_a_gradient_that_is_not_finite(train):
    def spoil(loss):
        return loss + (loss - loss.detach()).sqrt() * 0  # 0 with a gradient of inf * 0

    with pytest.raises(TrainingError, match=r"The gradient became nan in step 1 of toy; no checkpoint was written\."):
        train("run", spoil=spoil)


def test_other_settings_are_refused(train, tmp_path):
    train("run", about={"toy.steps": 3, "groups": (1, 2)})
    train("run", resume=True, about={"groups": (1, 2), "toy.steps": 3})
    with pytest.raises(ConfigError, match=r"other settings \(toy.steps 3, not 4\); go on with the same, or delete"):
        train("run", resume=True, about={"toy.steps": 4, "groups": (1, 2)})


def test_what_changed_in_words():
    assert changed_settings({"a": 1, "b": [1]}, {"b": (1,), "a": 1}) == ""
    assert changed_settings({"a": 1, "b": 2}, {"a": None, "c": 3}) == "a 1, not None; c None, not 3; b 2, not None"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "toy.steps must be at least 1, not 0."),
        ({"gradient_accumulation_steps": 0}, "toy.gradient_accumulation_steps must be at least 1, not 0."),
        ({"learning_rate": -1.0}, "toy.learning_rate must be at least 0, not -1.0."),
        ({"ema_decay": 1.0}, "toy.ema_decay must be from 0 to below 1, not 1.0."),
    ],
)
def test_numbers_that_cannot_be_used(settings, message):
    with pytest.raises(ConfigError) as refused:
        Stage(**{"steps": 1, **settings}).check("toy.")
    assert str(refused.value) == message


def test_a_schedule_that_does_not_exist(train):
    with pytest.raises(ConfigError, match=r"lr_scheduler zigzag cannot be used"):
        train("run", lr_scheduler="zigzag")
