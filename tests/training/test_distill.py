"""The trainer: it learns, it can be stopped at any moment, and what it writes is what it measured."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from tsdsr import TSDSRPipeline
from tsdsr.imaging import read
from tsdsr.training import distill as module
from tsdsr.training import terms
from tsdsr.training.config import ConfigError
from tsdsr.training.data import BatchSettings
from tsdsr.training.distill import TrainingError, distill
from tsdsr.training.families import RectifiedFlow
from tsdsr.training.inputs import open_photographs, read_batches
from tsdsr.training.losses import Reconstruction
from tsdsr.training.networks import DISCRIMINATOR, FAKE_SCORE, STUDENT, Networks
from tsdsr.training.optimisation import Optimisation
from tsdsr.training.validation import bicubic


def trained(output_dir, step):
    return load_file(output_dir / "checkpoints" / f"checkpoint-{step}" / "trained.safetensors")


def assert_equal(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


EXACTLY = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    metrics = distill(config(output))
    return output, metrics


def test_it_trains_student_and_fake_score(whole):
    output, _ = whole
    before, after = trained(output, 2), trained(output, 4)
    kinds = {"student", "fake_score"}
    for kind in kinds:
        moved = [name for name in after if f".{kind}." in name and not torch.equal(before[name], after[name])]
        assert moved, f"no weight of {kind} moved"
    assert all(any(f".{kind}." in name for kind in kinds) for name in after)
    assert any(name.startswith("vae.encoder") for name in after)
    assert not any("decoder" in name for name in after)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "phase" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all({"latent_mse", "tsd", "fake_score"} <= line.keys() for line in steps)


def test_a_second_run_repeats_the_first(whole, config, tmp_path, read_losses):
    distill(config(tmp_path, dataloader_num_workers=1))
    assert read_losses(tmp_path) == read_losses(whole[0])
    assert_equal(trained(tmp_path, 4), trained(whole[0], 4), **EXACTLY)


def test_another_seed_is_another_run(whole, config, tmp_path):
    distill(config(tmp_path, seed=1, max_train_steps=2))
    ours, theirs = trained(tmp_path, 2), trained(whole[0], 2)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_killed_and_resumed_follows_the_unbroken_run(whole, arguments, command, tmp_path, read_losses):
    """SIGKILL in the middle of step 4, after the checkpoint of step 2: losses and weights repeat to the last bit."""
    code = (
        "import os, signal, sys\n"
        "from tsdsr.training import distill as module, terms\n"
        "real, calls = terms.fake_score_term, []\n"
        "def killing(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "terms.fake_score_term = killing\n"
        "module.main(sys.argv[1:])\n"
    )
    killed = command("-c", code, *arguments(tmp_path))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["checkpoint-2"]
    resumed = command("-m", "tsdsr.training.distill", *arguments(tmp_path, resume_from_checkpoint="latest"))
    assert resumed.returncode == 0, resumed.stderr
    assert read_losses(tmp_path) == read_losses(whole[0])
    assert_equal(trained(tmp_path, 4), trained(whole[0], 4), **EXACTLY)
    for file in ("pipeline/transformer/diffusion_pytorch_model.safetensors", "lora/pytorch_lora_weights.safetensors"):
        assert_equal(load_file(tmp_path / file), load_file(whole[0] / file), **EXACTLY)


def test_everything_that_has_a_state_is_resumed(config, tmp_path, read_losses):
    """EMA, warm-up, accumulation, two updates of the fake score, ramps, a log line that spans the checkpoint."""
    more = {
        "ema_decay": 0.9,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 1,
        "gradient_accumulation_steps": 2,
        "fake_score_updates": 2,
        "tsd": [1, 2],
        "logging_steps": 3,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 5,
    }
    distill(config(tmp_path / "whole", **more))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in ("checkpoints/checkpoint-3", "checkpoints/checkpoint-4", "lora", "pipeline"):
        shutil.rmtree(tmp_path / "again" / path)
    distill(config(tmp_path / "again", **more, resume_from_checkpoint="latest"))
    assert read_losses(tmp_path / "again") == read_losses(tmp_path / "whole")
    assert_equal(trained(tmp_path / "again", 4), trained(tmp_path / "whole", 4), **EXACTLY)
    file = "lora/pytorch_lora_weights.safetensors"
    assert_equal(load_file(tmp_path / "again" / file), load_file(tmp_path / "whole" / file), **EXACTLY)


def test_sigterm_saves_and_stops(whole, arguments, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tsdsr.training.distill", *arguments(tmp_path, max_train_steps=10000, seed=0)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )
    checkpoints = tmp_path / "checkpoints"
    deadline = time.monotonic() + 120
    while not checkpoints.is_dir() or not any(path.name == "checkpoint-2" for path in checkpoints.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Stopped as asked to, after step" in errors
    last = max(int(path.name.split("-")[1]) for path in checkpoints.iterdir())
    logged = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged[-1] == last
    assert not (tmp_path / "pipeline").exists()


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    real, calls = terms.distillation, []

    def poisoned(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(terms, "distillation", poisoned)
    with pytest.raises(TrainingError, match=r"loss tsd became nan in step 4; .*checkpoint-2 is whole"):
        distill(config(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.setattr(terms, "distillation", real)
    assert distill(config(tmp_path, resume_from_checkpoint="latest"))["student"]


def test_a_full_disk_stops_the_run(arguments, tmp_path, capsys, monkeypatch):
    real, calls = Accelerator.save_state, []

    def full(self, folder):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(self, folder)

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(SystemExit) as stopped:
        module.main(arguments(tmp_path))
    assert stopped.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "step 4 could not be written" in message and "No space left" in message and "checkpoint-2" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_run_does_not_begin_over_another(whole, config):
    """Without being told to go on: its checkpoints, and what comes of them, would be mixed up."""
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")}
    with pytest.raises(ConfigError, match="holds checkpoints of another run: go on with it"):
        distill(config(whole[0], learning_rate=1e-4))
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*")} == before


def test_the_process_can_be_ended_afterwards(whole):
    """Only the loop listens for SIGTERM itself."""
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- what comes out


def test_the_results_are_what_the_trainer_measured(whole, command, tmp_path, base_folder):
    """In a fresh process, from the files: merged pipeline, and LoRA over the base."""
    output, metrics = whole
    code = """
import sys, numpy as np, torch
from tsdsr import PromptEmbeddings, TSDSRPipeline
from tsdsr.imaging import read
output, base, target = sys.argv[1:]
merged = TSDSRPipeline.from_pretrained(output + "/pipeline", local_files_only=True)
prompt = PromptEmbeddings.from_pretrained(output + "/lora", subfolder="prompt_embeddings")
lora = TSDSRPipeline.from_pretrained(base, prompt_embeddings=prompt, local_files_only=True)
lora.load_lora_weights(output + "/lora")
name = "p_0000_00"
lq = torch.from_numpy(read(f"{output}/validation/final/{name}_lq.png").rgb).permute(2, 0, 1)[None]
for kind, pipeline in (("merged", merged), ("lora", lora)):
    pipeline.set_progress_bar_config(disable=True)
    np.save(f"{target}/{kind}.npy", pipeline(lq, process_size=0, color_fix="none", output_type="np").images[0])
"""
    result = command("-c", code, str(output), str(base_folder), str(tmp_path))
    assert result.returncode == 0, result.stderr
    expected = read(output / "validation" / "final" / "p_0000_00.png").rgb
    bare = TSDSRPipeline.from_pretrained(base_folder, local_files_only=True)
    bare.set_progress_bar_config(disable=True)
    lq = read(output / "validation" / "final" / "p_0000_00_lq.png").rgb
    start = bare(lq, process_size=0, color_fix="none", output_type="np").images[0]
    for kind in ("merged", "lora"):
        ours = np.load(tmp_path / f"{kind}.npy")
        assert ours.shape == expected.shape == (32, 32, 3)
        assert np.abs(ours - expected).max() <= 0.51 / 255
        assert np.abs(ours - start).max() > 2 / 255, "training changed nothing"
    assert metrics["student"]["psnr_y"] != metrics["start"]["psnr_y"]


def test_the_lora_file_says_what_it_is(whole):
    from safetensors import safe_open

    with safe_open(whole[0] / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        names, metadata = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    assert {name.split(".")[0] for name in names} == {"transformer", "vae"}
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == 2
    assert metadata["vae.r"] == 2 and all(name.startswith("encoder.") for name in metadata["vae.target_modules"])


def test_the_published_layout_goes_through_convert(whole, base_folder, tmp_path):
    """What ComfyUI's loader takes is what `tsdsr convert` takes: both read it by the same functions."""
    from tsdsr.checkpoints.assemble import assemble_tsdsr

    lora = whole[0] / "lora"
    pipeline = assemble_tsdsr(base_folder, base_folder, lora, lora)
    merged = TSDSRPipeline.from_pretrained(whole[0] / "pipeline", local_files_only=True)
    for part in ("transformer", "vae"):
        ours, theirs = (getattr(one, part).state_dict() for one in (pipeline, merged))
        assert_equal(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(pipeline.prompt_embeddings.prompt_embeds, merged.prompt_embeddings.prompt_embeds)


def test_the_model_card(whole, base_folder):
    for kind in ("lora", "pipeline"):
        text = (whole[0] / kind / "README.md").read_text()
        assert "library_name: diffusers" in text and "learning_rate: 0.001" in text and "PSNR-Y" in text
        assert "accelerate launch -m tsdsr.training.distill" in text
        assert str(base_folder.parent) not in text and base_folder.name in text
    assert "load_lora_weights" in (whole[0] / "lora" / "README.md").read_text()


def test_validation_sheets_are_there(whole):
    sheet = read(whole[0] / "validation" / "step-000004.png").rgb
    assert sheet.shape == (2 * 32, 3 * 32, 3)
    assert sorted(path.name for path in (whole[0] / "validation" / "final").iterdir())[:3] == [
        "p_0000_00.png",
        "p_0000_00_hq.png",
        "p_0000_00_lq.png",
    ]


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_one_kind_of_output(config, tmp_path, kind):
    distill(config(tmp_path, output=kind, max_train_steps=1))
    assert (tmp_path / "lora").is_dir() == (kind == "lora") and (tmp_path / "pipeline").is_dir() == (kind == "merged")


# --- what can be trained


@pytest.mark.parametrize("encoder", ["frozen", "full"])
def test_full_weights_and_the_encoder(config, tmp_path, encoder, base_folder):
    distill(config(tmp_path, train_type="full", vae_encoder=encoder, max_train_steps=2))
    weights = trained(tmp_path, 2)
    assert any(name.startswith("student_network.") for name in weights)
    assert any(name.startswith("student_vae.encoder") for name in weights) == (encoder == "full")
    assert not any("decoder" in name for name in weights)
    base = TSDSRPipeline.from_pretrained(base_folder, local_files_only=True)
    ours = TSDSRPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    assert not torch.equal(ours.transformer.state_dict()[name], base.transformer.state_dict()[name])
    assert torch.equal(ours.vae.encoder.conv_in.weight, base.vae.encoder.conv_in.weight) == (encoder == "frozen")
    assert torch.equal(ours.vae.decoder.conv_in.weight, base.vae.decoder.conv_in.weight)


def test_gradient_checkpointing_changes_nothing(whole, config, tmp_path):
    distill(config(tmp_path, gradient_checkpointing=True, max_train_steps=2))
    assert_equal(trained(tmp_path, 2), trained(whole[0], 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("asked", "written"), [(None, torch.bfloat16), ("fp16", torch.float16)])
def test_bf16(config, tmp_path, asked, written):
    metrics = distill(config(tmp_path, mixed_precision="bf16", max_train_steps=2, output_dtype=asked))
    assert metrics["student"]["psnr_y"] > 0
    assert all(tensor.dtype == torch.float32 for tensor in trained(tmp_path, 2).values())
    for part in ("vae", "transformer", "prompt_embeddings"):
        weights = load_file(tmp_path / "pipeline" / part / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {written}


def test_full_weights_are_written_as_they_were_trained(config, tmp_path):
    distill(
        config(
            tmp_path,
            mixed_precision="bf16",
            train_type="full",
            vae_encoder="full",
            output_dtype="fp32",
            max_train_steps=1,
            ema_decay=0,
        )
    )
    weights = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = {name: weight for name, weight in trained(tmp_path, 1).items() if name.startswith("student_network.")}
    assert kept and all(torch.equal(weights[name.partition(".")[2]], weight) for name, weight in kept.items())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_unet_students(make_pipeline, config, tmp_path, prediction):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.register_to_config(prediction_type=prediction)
    make_pipeline("kl", network="unet", scheduler=scheduler).save_pretrained(tmp_path / "base")
    metrics = distill(
        config(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "base", learning_rate=1e-4, max_train_steps=2)
    )
    assert metrics["student"]["psnr_y"] != metrics["start"]["psnr_y"]
    pipeline = TSDSRPipeline.from_pretrained(tmp_path / "run" / "pipeline", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    final = tmp_path / "run" / "validation" / "final"
    lq = read(final / "p_0000_00_lq.png").rgb
    result = pipeline(lq, process_size=0, color_fix="none", output_type="np").images[0]
    assert np.abs(result - read(final / "p_0000_00.png").rgb).max() <= 0.51 / 255
    base = TSDSRPipeline.from_pretrained(tmp_path / "base", local_files_only=True)
    base.load_lora_weights(tmp_path / "run" / "lora")
    assert base.get_list_adapters().keys() == {"unet", "vae"}


# --- a discriminator, and a decoder that is trained

AGAINST = {
    "pixel_l1": 1,
    "adversarial": [0.0, 0.1],
    "feature_matching": 0.1,
    "r1_weight": 0.1,
    "vae_decoder": "full",
    "discriminator_width": 4,
    "discriminator_layers": 2,
    "discriminator_learning_rate": 1e-3,
}


def moved(output_dir, before, after):
    before, after = trained(output_dir, before), trained(output_dir, after)
    return {name for name in after if not torch.equal(before[name], after[name])}, after.keys()


def test_the_discriminator_and_the_decoder_are_trained(whole, config, tmp_path):
    distill(config(tmp_path, **AGAINST))
    names, all_names = moved(tmp_path, 2, 4)
    assert {name for name in all_names if name.startswith(("discriminator.", "vae.decoder."))} <= names
    assert any(name.startswith("discriminator.") for name in names)
    assert any(name.startswith("vae.decoder.") for name in names)
    assert not any("discriminator" in name or "decoder" in name for name in trained(whole[0], 4))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "phase" in line]
    assert all({"adversarial", "feature_matching", "discriminator", "r1"} <= line.keys() for line in steps)
    assert steps[-1]["lr_discriminator"] == 1e-3


@pytest.mark.parametrize("kind", ["patch", "multiscale", "dino"])
def test_discriminator_and_decoder_are_resumed(config, tmp_path, read_losses, kind):
    """Its weights, what its norms remember, its optimiser and schedule; accumulation; an average over the decoder."""
    if kind == "dino":
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
        ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path / "vit")
    of_kind = {"discriminator_kind": kind, "discriminator_model": str(tmp_path / "vit"), "discriminator_scales": 2}
    more = {**AGAINST, **of_kind, "ema_decay": 0.9, "lr_scheduler": "cosine", "lr_warmup_steps": 1}
    more |= {"checkpointing_steps": 1}
    more |= {"gradient_accumulation_steps": 2, "logging_steps": 3, "adversarial_loss": "relativistic"}
    distill(config(tmp_path / "whole", **more))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in ("checkpoints/checkpoint-3", "checkpoints/checkpoint-4", "pipeline"):
        shutil.rmtree(tmp_path / "again" / path)
    distill(config(tmp_path / "again", **more, resume_from_checkpoint="latest"))
    assert read_losses(tmp_path / "again") == read_losses(tmp_path / "whole")
    assert_equal(trained(tmp_path / "again", 4), trained(tmp_path / "whole", 4), **EXACTLY)
    file = "pipeline/vae/diffusion_pytorch_model.safetensors"
    assert_equal(load_file(tmp_path / "again" / file), load_file(tmp_path / "whole" / file), **EXACTLY)


@pytest.mark.parametrize(
    ("vae", "encoder", "more"),
    [
        ("kl", "lora", {}),
        ("kl", "full", {"train_type": "full"}),
        ("kl", "frozen", {"gradient_checkpointing": True}),
        ("tiny", "full", {"mixed_precision": "bf16"}),
        ("tiny", "frozen", {"ema_decay": 0.5}),
    ],
)
def test_a_trained_decoder_is_what_is_measured_and_written(make_pipeline, config, tmp_path, vae, encoder, more):
    make_pipeline(vae).save_pretrained(tmp_path / "base")
    settings = {"pretrained_model_name_or_path": tmp_path / "base", "vae_encoder": encoder, "max_train_steps": 2}
    distill(config(tmp_path / "run", **settings, **AGAINST, **more))
    names = {name for name in trained(tmp_path / "run", 2) if "vae." in name}
    assert any(".decoder." in name for name in names)
    assert any(".encoder." in name for name in names) == (encoder != "frozen")
    half = more.get("mixed_precision") == "bf16"
    assert all(tensor.dtype == torch.float32 for tensor in trained(tmp_path / "run", 2).values())

    base = TSDSRPipeline.from_pretrained(tmp_path / "base", local_files_only=True)
    ours = TSDSRPipeline.from_pretrained(tmp_path / "run" / "pipeline", local_files_only=True)
    for part, same in (("encoder", encoder == "frozen"), ("decoder", False)):
        after = dict(getattr(ours.vae, part).named_parameters())
        pairs = [(weight, after[name]) for name, weight in getattr(base.vae, part).named_parameters()]
        assert all(torch.equal(weight.to(other.dtype), other) for weight, other in pairs) == same
    written = load_file(tmp_path / "run" / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16 if half else torch.float32}
    if not half:
        final = tmp_path / "run" / "validation" / "final"
        lq, expected = (read(final / f"p_0000_00{suffix}.png").rgb for suffix in ("_lq", ""))
        for pipeline, least in ((ours, 0), (base, 2)):
            pipeline.set_progress_bar_config(disable=True)
            result = pipeline(lq, process_size=0, color_fix="none", output_type="np").images[0]
            difference = np.abs(result - expected).max() * 255
            assert difference <= 0.51 if least == 0 else difference > least
    assert not (tmp_path / "run" / "lora").exists()
    assert "VAE decoder: full" in (tmp_path / "run" / "pipeline" / "README.md").read_text()


def test_there_is_a_discriminator_only_where_a_phase_has_one(config, tmp_path):
    """It stays as it was in the other phases, and its schedule counts its own steps alone."""
    settings = config(tmp_path, **AGAINST, lr_scheduler="linear", checkpointing_steps=1, tsd=0)
    phase = settings.phases[0]
    plain = dataclasses.replace(phase, name="plain", steps=2, adversarial=[0.0], feature_matching=[0.0])
    phases = [plain, dataclasses.replace(phase, name="against", steps=2)]
    distill(dataclasses.replace(settings, phases=phases))
    names, _ = moved(tmp_path, 1, 2)
    assert names and not any(name.startswith("discriminator.") for name in names)
    names, _ = moved(tmp_path, 2, 3)
    assert any(name.startswith("discriminator.") for name in names)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "phase" in line]
    assert ["discriminator" in line for line in steps] == [False, False, True, True]
    assert [line["lr_discriminator"] for line in steps] == pytest.approx([1e-3, 1e-3, 5e-4, 0])


def test_what_the_discriminator_sees(config, tmp_path, monkeypatch):
    """The pictures that the student was judged by, once more without gradient; and only its own update moves it."""
    judged, learned, states = [], [], []
    real = {name: getattr(terms, name) for name in ("adversarial_terms", "discriminator_terms")}
    real_step = Optimisation.step

    def adversarial_terms(settings, weights, judge, output, hq, counts, balance):
        judged.append((output.detach(), hq, counts, weights["adversarial"]))
        assert balance
        return real["adversarial_terms"](settings, weights, judge, output, hq, counts, balance)

    def discriminator_terms(settings, judge, output, hq, counts):
        assert not output.requires_grad
        learned.append((output, hq, counts))
        return real["discriminator_terms"](settings, judge, output, hq, counts=counts)

    def step(self, role):
        weights = self._networks.parameters_of(DISCRIMINATOR)
        states.append((role, any(weight.grad is not None for weight in weights), weights[0].detach().clone()))
        return real_step(self, role)

    monkeypatch.setattr(terms, "adversarial_terms", adversarial_terms)
    monkeypatch.setattr(terms, "discriminator_terms", discriminator_terms)
    monkeypatch.setattr(Optimisation, "step", step)
    more = {"gradient_accumulation_steps": 2, "max_train_steps": 2, "validation_photographs": 0, "output": "merged"}
    more |= {"adversarial_evidence": [5.0, 40.0], "adversarial_balance": True}
    distill(config(tmp_path, **AGAINST, **more))
    assert len(judged) == len(learned) == 4
    for (output, hq, counts, _), (again, photographs, counts_again) in zip(judged, learned, strict=True):
        assert torch.equal(output, again) and torch.equal(hq, photographs) and output.shape == hq.shape
        assert hq.min() < -0.5 and hq.max() > 0.5
        assert torch.equal(counts, counts_again) and counts.shape == (len(output),)
    assert len({float(count) for one in learned for count in one[2]}) > 4, "each picture has its own"
    assert [weight for *_, weight in judged] == pytest.approx([0, 0, 0.1, 0.1])
    roles = [STUDENT, FAKE_SCORE, DISCRIMINATOR]
    assert [(role, wanted) for role, wanted, _ in states] == [(role, role == DISCRIMINATOR) for role in roles] * 2
    weights = [weight for _, _, weight in states]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[3])


@pytest.mark.parametrize("kind", ["patch", "multiscale"])
def test_a_discriminator_that_sees_lq_pictures_shifted(config, tmp_path, monkeypatch, kind):
    """A place for each micro-batch, the same for the student's pictures, the photographs and what lies behind them."""
    seen, real = [], terms.Terms._shown

    def shown(self, one):
        seen.append((one, real(self, one)))
        return seen[-1][1]

    def offset(window, picture):
        """Where it lies in the picture."""
        places = picture.unfold(2, window.shape[-2], 1).unfold(3, window.shape[-1], 1)
        same = (places == window[:, :, None, None]).flatten(4).all(4).flatten(0, 1).all(0)
        return [tuple(place) for place in same.nonzero().tolist()]

    monkeypatch.setattr(terms.Terms, "_shown", shown)
    more = {"discriminator_kind": kind, "discriminator_scales": 2, "discriminator_sees_lq": True}
    distill(config(tmp_path, **AGAINST, **more, discriminator_shift=3, validation_photographs=0))
    before, after = trained(tmp_path, 2), trained(tmp_path, 4)
    (first, *_) = [name for name in after if name.startswith("discriminator.") and name.endswith("layers.0.weight")]
    assert (before[first] != after[first]).any(dim=(0, 2, 3)).tolist() == [True] * 6
    places = []
    for one, (output, hq) in seen:
        assert output.shape == hq.shape == (len(one.hq), 6, one.hq.shape[-2] - 3, one.hq.shape[-1] - 3)
        assert output.requires_grad == one.output.requires_grad
        (place,) = offset(hq[:, :3], one.hq)
        assert place in offset(output[:, :3], one.output)
        assert place in offset(output[:, 3:], one.pictures) and torch.equal(output[:, 3:], hq[:, 3:])
        places.append(place)
    assert places[::2] == places[1::2], "who is judged and who judges"
    assert all(len(set(along)) > 1 for along in zip(*places, strict=True)), "in both directions"


def test_accumulation_after_pretraining(config, tmp_path, monkeypatch):
    """A base that is trained here has its own accelerator: the loss is still a mean over micro-batches."""
    seen, real = [], Accelerator.backward

    def backward(self, loss):
        seen.append(self.gradient_accumulation_steps)
        return real(self, loss)

    settings = config(tmp_path, gradient_accumulation_steps=2, max_train_steps=1)
    base, settings.pretrained_model_name_or_path = settings.pretrained_model_name_or_path, None
    monkeypatch.setattr(Accelerator, "backward", backward)
    monkeypatch.setattr(module, "pretrain", lambda *_: Accelerator() and base)
    distill(settings)
    assert set(seen) == {2}


# --- what the settings do


def first_losses(config, folder, **changed):
    distill(config(folder, max_train_steps=1, output="lora", validation_photographs=0, **changed))
    return json.loads((folder / "log.jsonl").read_text().splitlines()[0])


def test_switches_change_what_they_say(config, tmp_path):
    """The first step's losses: the student and the fake score begin as the base, so that TSD's parts are known."""
    plain = first_losses(config, tmp_path / "plain")
    assert {"latent_mse", "tsd", "fake_score"} <= plain.keys()
    # Student and fake score are the base itself in the first step: psi - phi = 0.
    vsd = first_losses(config, tmp_path / "vsd", vsd_weight=1.0)
    assert vsd["tsd"] == pytest.approx(0, abs=1e-10)
    tsm = first_losses(config, tmp_path / "tsm", vsd_weight=0.0)
    assert tsm["tsd"] > plain["tsd"] > 0
    assert plain["tsd"] == pytest.approx(0.3**2 * tsm["tsd"], rel=1e-3)  # half the square of 0.3 times the gradient
    one_point = first_losses(config, tmp_path / "one", vsd_weight=0.0, dasm_steps=1)
    assert 0 < one_point["tsd"] < tsm["tsd"]
    without = first_losses(config, tmp_path / "without", tsd=0)
    assert "tsd" not in without and "fake_score" not in without
    assert without["latent_mse"] == plain["latent_mse"]
    pixels = first_losses(
        config,
        tmp_path / "pixels",
        latent_mse=0,
        pixel_l1=1,
        gradient_l1=1,
        frequency_l1=1,
        grid_l1=1,
        encoder_features=1,
    )
    assert {"pixel_l1", "gradient_l1", "frequency_l1", "grid_l1", "encoder_features"} <= pixels.keys()
    assert "latent_mse" not in pixels


def test_what_a_step_puts_where(config, tmp_path, monkeypatch, base_folder):
    """Teacher: the base, for good. Fake score: it follows, on the student's latents. Pictures go in as -1..1."""
    batches, distilled, followed, pictures, reconstructed, passed = [], [], [], [], [], []
    real = {"read_batches": module.read_batches}
    real |= {name: getattr(terms, name) for name in ("distillation", "fake_score_term")}
    real_forward, real_losses, real_backward = Networks.forward, Reconstruction.__call__, Accelerator.backward
    z, sigma = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((1,), 0.5)

    def read_batches(*arguments, **more):
        for batch in real["read_batches"](*arguments, **more):
            batches.append(batch)
            yield batch

    def distillation(phase, scheduler, latents, hq_latents, teacher, fake, generator):
        with torch.no_grad():
            distilled.append((latents.detach(), hq_latents, teacher(z, sigma), fake(z, sigma)))
        return real["distillation"](phase, scheduler, latents, hq_latents, teacher, fake, generator)

    def fake_score_term(scheduler, latents, predict, generator):
        followed.append((latents, generator.initial_seed()))
        return real["fake_score_term"](scheduler, latents, predict, generator)

    def forward(self, role, inputs, *arguments, **more):
        if role == STUDENT:
            pictures.append(inputs)
        return real_forward(self, role, inputs, *arguments, **more)

    def losses(self, weights, latents, hq_latents, output, hq):
        found = real_losses(self, weights, latents, hq_latents, output, hq)
        reconstructed.append((hq, weights, found["latent_mse"].detach()))
        return found

    def backward(self, loss):
        passed.append(loss.detach())
        return real_backward(self, loss)

    monkeypatch.setattr(module, "read_batches", read_batches)
    monkeypatch.setattr(terms, "distillation", distillation)
    monkeypatch.setattr(terms, "fake_score_term", fake_score_term)
    monkeypatch.setattr(Networks, "forward", forward)
    monkeypatch.setattr(Reconstruction, "__call__", losses)
    monkeypatch.setattr(Accelerator, "backward", backward)
    more = {"vsd_weight": 0.0, "tsd": [1.0, 3.0], "latent_mse": 5, "fake_score_updates": 2, "output": "lora"}
    distill(config(tmp_path, **more, max_train_steps=3, validation_photographs=0))

    base = TSDSRPipeline.from_pretrained(base_folder, local_files_only=True)
    prompt = base.prompt_embeddings.prompt_embeds, base.prompt_embeddings.pooled_prompt_embeds
    with torch.no_grad():
        expected = RectifiedFlow(base.scheduler).velocity(base.transformer, prompt)(z, sigma)
    for _, _, teacher, _ in distilled:
        torch.testing.assert_close(teacher, expected, rtol=1e-4, atol=1e-5)
    fakes = [fake for _, _, _, fake in distilled]
    torch.testing.assert_close(fakes[0], expected, rtol=1e-4, atol=1e-5)
    assert (fakes[1] - expected).abs().max() > 1e-4 < (fakes[2] - fakes[1]).abs().max()

    assert len(batches) == len(distilled) == len(pictures) == 3 and len(followed) == 6 and len(passed) == 9
    for step, (batch, (latents, hq_latents, _, _)) in enumerate(zip(batches, distilled, strict=True)):
        hq = batch["hq"] * 2 - 1
        torch.testing.assert_close(pictures[step], bicubic(batch["lq"], (32, 32)) * 2 - 1)
        torch.testing.assert_close(reconstructed[step][0], hq)
        with torch.no_grad():
            torch.testing.assert_close(hq_latents, base.vae.encode(hq).latent_dist.mode() * 1.5, rtol=1e-4, atol=1e-4)
        updates = followed[2 * step : 2 * step + 2]
        assert all(torch.equal(found, latents) for found, _ in updates) and updates[0][1] != updates[1][1]
        _, weights, mse = reconstructed[step]
        assert weights == {"latent_mse": 5.0, "tsd": 1.0 + step}
        line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[step])
        assert float(passed[3 * step]) == pytest.approx(5 * float(mse) + weights["tsd"] * line["tsd"], rel=1e-4)


def test_accumulated_micro_batches_count_as_their_mean(config, tmp_path, monkeypatch):
    """What is clipped is no longer than with one micro-batch of the same pictures."""
    norms = []
    real = Accelerator.clip_grad_norm_

    def clip(self, weights, most):
        norms.append(float(real(self, weights, most)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    same = {"train_batch_size": 1, "max_train_steps": 1, "validation_photographs": 0, "output": "lora", "tsd": 0}
    monkeypatch.setattr(module, "read_batches", lambda source, settings, **_: itertools.repeat(first))
    (first,) = itertools.islice(read_batches(*source_of(config(tmp_path, **same)), stop=1), 1)
    for accumulation in (1, 3):
        distill(config(tmp_path / str(accumulation), **same, gradient_accumulation_steps=accumulation))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_every_micro_batch_has_draws_of_its_own(config, tmp_path, monkeypatch):
    real, seeds = terms.distillation, []

    def distillation(*arguments):
        seeds.append(arguments[-1].initial_seed())
        return real(*arguments)

    monkeypatch.setattr(terms, "distillation", distillation)
    same = {"max_train_steps": 2, "gradient_accumulation_steps": 2, "validation_photographs": 0, "output": "lora"}
    distill(config(tmp_path, **same))
    assert len(seeds) == len(set(seeds)) == 4


def source_of(settings):
    return open_photographs(settings).source, BatchSettings(train_batch_size=1, resolution=settings.resolution)


def test_two_updates_of_the_fake_score_move_it_further(config, tmp_path):
    for updates in (1, 2):
        distill(config(tmp_path / str(updates), fake_score_updates=updates, max_train_steps=1, checkpointing_steps=1))
    once, twice = (trained(tmp_path / str(updates), 1) for updates in (1, 2))
    fake = [name for name in once if ".fake_score." in name and "lora_B" in name]
    moved = [sum(float(weights[name].abs().sum()) for name in fake) for weights in (once, twice)]
    assert moved[1] > 1.3 * moved[0]
    student = [name for name in once if ".student." in name]
    assert all(torch.equal(once[name], twice[name]) for name in student)


def test_learning_rates_are_separate(config, tmp_path):
    distill(config(tmp_path, fake_score_learning_rate=0.0, max_train_steps=2))
    weights = trained(tmp_path, 2)
    assert all(not weights[name].any() for name in weights if ".fake_score." in name and "lora_B" in name)
    assert any(weights[name].any() for name in weights if ".student." in name and "lora_B" in name)


def test_the_average_is_what_is_measured_and_written(config, tmp_path):
    distill(config(tmp_path, ema_decay=0.9, learning_rate=1e-2))
    written = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    raw = trained(tmp_path, 4)
    name = "transformer_blocks.0.attn.to_q.lora_B"
    ours = written[f"transformer.{name}.weight"]
    last = raw[f"network.{name}.student.weight"]
    assert ours.abs().sum() > 0 and not torch.allclose(ours, last, rtol=1e-3, atol=0)
    pipeline = TSDSRPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    final = tmp_path / "validation" / "final"
    lq, measured = read(final / "p_0000_00_lq.png").rgb, read(final / "p_0000_00.png").rgb
    result = pipeline(lq, process_size=0, color_fix="none", output_type="np").images[0]
    assert np.abs(result - measured).max() <= 0.51 / 255


def test_images_on_the_device(whole, config, tmp_path):
    distill(config(tmp_path, degrade_on="device", max_train_steps=2))
    assert_equal(trained(tmp_path, 2), trained(whole[0], 2), rtol=1e-4, atol=1e-6)


def test_corrupt_pictures_are_named(photographs, config, tmp_path, caplog):
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    for name in ("p_0001_00.png", "p_0002_00.png", "p_0003_00.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    with caplog.at_level("WARNING", logger="tsdsr.training"):
        distill(config(tmp_path / "run", train_data_dir=folder))
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-2])
    assert last["skipped"] >= 1
    assert "p_000" in caplog.text and "could not be read and were skipped" in caplog.text


def test_a_failed_upload_leaves_everything_written(config, tmp_path, monkeypatch):
    class Api:
        def create_repo(self, name, **_):
            return type("Repository", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **_):
            raise ConnectionError("no route")

    monkeypatch.setattr("tsdsr.training.export.HfApi", lambda token: Api())
    with pytest.raises(OSError, match=r"could not be uploaded to me/run \(no route\); it lies in"):
        distill(config(tmp_path / "run", push_to_hub=True, max_train_steps=1))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["student"]
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file() and (tmp_path / "run" / "lora").is_dir()


def test_a_tracker_that_is_not_installed_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.warns(UserWarning, match="no supported trackers"), pytest.raises(ConfigError, match="install wandb"):
        distill(config(tmp_path, report_to="wandb", validation_photographs=0))


def test_tensorboard(config, tmp_path):
    pytest.importorskip("tensorboard")
    distill(config(tmp_path, report_to="tensorboard", max_train_steps=2, validation_steps=1))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents*") if path.stat().st_size > 2000)
    events = EventAccumulator(str(folder)).Reload()
    assert {"latent_mse", "tsd", "validation/psnr_y"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["LQ, student, HQ"]


# --- what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"guidance_scale": 7.5}, "Guidance needs the empty prompt"),
        ({"pretrained_model_name_or_path": "/nowhere"}, "base /nowhere cannot be loaded"),
        ({"train_data_dir": "/nowhere"}, "train_data_dir /nowhere is not a folder"),
        ({"train_lq_dir": "/nowhere"}, "/nowhere"),
        ({"validation_photographs": 8}, "more than 8 are needed"),
        ({"lpips": 1}, "encoder_features, which needs no download"),
        ({"validation_metrics": ["nonsense"]}, "The validation metric nonsense"),
        ({"prompt_embeds": "/nowhere"}, "/nowhere holds no prompt_embeds"),
        ({"resume_from_checkpoint": "/nowhere"}, "/nowhere is no whole checkpoint"),
        ({"teacher_lora": "/nowhere"}, "teacher_lora /nowhere"),
    ],
)
def test_bad_settings_are_one_sentence(arguments, tmp_path, capsys, changed, message):
    with pytest.raises(SystemExit) as stopped:
        module.main(arguments(tmp_path, **changed))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_base_of_another_family(tmp_path, arguments, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    with pytest.raises(SystemExit):
        module.main(arguments(tmp_path / "run", pretrained_model_name_or_path=tmp_path / "base"))
    assert "neither an SD3 transformer nor an SD2 UNet" in capsys.readouterr().err


def test_settings_of_another_run_are_not_resumed(whole, config, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(ValueError, match="trained other weights"):
        distill(config(tmp_path / "run", rank=4, resume_from_checkpoint="latest"))
