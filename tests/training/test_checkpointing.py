"""Checkpoints are whole or not there, and a run goes on from them as if nothing had been."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from accelerate import Accelerator

from tsdsr.training.checkpointing import Checkpoints, StopRequest


class Run:
    """A little training run: losses depend on weights, optimiser, schedule and random numbers."""

    def __init__(self, folder, total_limit=None):
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.checkpoints = Checkpoints(self.accelerator, folder, total_limit)

    def step(self):
        x = torch.randn(8, 4)
        loss = (self.model(x) - x.flip(1)).square().mean()
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        return float(loss)


def test_a_resumed_run_repeats_the_losses(tmp_path):
    run = Run(tmp_path)
    losses = []
    for step in range(1, 7):
        losses.append(run.step())
        if step == 3:
            run.checkpoints.save(step, note="half")
    again = Run(tmp_path)
    assert again.checkpoints.resume() == {"step": 3, "note": "half"}
    assert [again.step() for _ in range(3)] == losses[3:]


def test_the_newest_is_taken_and_the_oldest_go(tmp_path):
    run = Run(tmp_path, total_limit=2)
    for step in (2, 9, 10):
        run.step()
        assert run.checkpoints.save(step) == tmp_path / f"checkpoint-{step}"
    assert [path.name for path in run.checkpoints.all()] == ["checkpoint-9", "checkpoint-10"]
    assert run.checkpoints.resume()["step"] == 10
    assert run.checkpoints.resume(tmp_path / "checkpoint-9")["step"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_nothing_to_resume(tmp_path):
    run = Run(tmp_path / "none")
    assert run.checkpoints.resume() is None and run.checkpoints.latest() is None
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        run.checkpoints.resume(tmp_path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    run = Run(tmp_path, total_limit=1)
    run.step()
    run.checkpoints.save(1)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()}

    def full(folder):
        (run.checkpoints.folder / ".checkpoint-2.partial" / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"step 2 could not be written .*No space left.*checkpoint-1"):
        run.checkpoints.save(2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()} == whole


def test_a_kill_while_saving_leaves_the_last_one(tmp_path):
    """SIGKILL between the weights and the rename: what is half written does not count."""
    code = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_checkpointing import Run
        run = Run(Path({str(tmp_path)!r}))
        run.step()
        run.checkpoints.save(1)
        run.step()
        real = run.accelerator.save_state
        def killed(folder):
            real(folder)
            os.kill(os.getpid(), signal.SIGKILL)
        run.accelerator.save_state = killed
        run.checkpoints.save(2)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / ".checkpoint-2.partial").is_dir()
    run = Run(tmp_path)
    assert run.checkpoints.resume()["step"] == 1
    run.step()
    run.checkpoints.save(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_later_checkpoints_of_another_way_do_not_push_out_the_newest(tmp_path):
    """A run that went on from an earlier checkpoint: what it saves is kept, however far the way before had come."""
    run = Run(tmp_path)
    for step in (2, 4, 8):
        run.step()
        run.checkpoints.save(step)
    again = Run(tmp_path, total_limit=1)
    again.checkpoints.resume(tmp_path / "checkpoint-4")
    again.step()
    again.checkpoints.save(5)
    assert [path.name for path in again.checkpoints.all()] == ["checkpoint-5", "checkpoint-8"]


def test_a_stop_is_asked_for_once_and_only_while_it_is_listened_to():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest(Accelerator(cpu=True))
    assert not stop.requested()
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested()
    stop.close()
    assert signal.getsignal(signal.SIGTERM) == before
