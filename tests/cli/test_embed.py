"""`tsdsr embed`, and upscaling with what it writes."""

import json
import os
import shutil
import socket

import huggingface_hub
import pytest
import torch
import transformers

from tsdsr import PromptEmbeddings, TSDSRPipeline
from tsdsr.pipelines.text import embed_prompt


@pytest.fixture(scope="module")
def base(save_text_base, tmp_path_factory):
    """An SD3 base whose prompts fit the tiny pipeline."""
    return save_text_base(tmp_path_factory.mktemp("base"), "sd3")


@pytest.fixture(scope="module")
def embedded(tsdsr, base, tmp_path_factory):
    """The folder that the command writes for the prompt "red"."""
    folder = tmp_path_factory.mktemp("embedded") / "red"
    result = tsdsr("embed", "red", "--base", base, "-o", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return folder


def equal(left, right):
    return all(torch.equal(left.state_dict()[name], tensor) for name, tensor in right.state_dict().items())


def test_help(tsdsr, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = tsdsr("embed", "--help").stdout
    assert all(option in said for option in ("--base", "--output", "--dtype", "--device", "--variant", "--overwrite"))
    assert "embed" in tsdsr("--help").stdout and "--prompt-embeddings" in tsdsr("upscale", "--help").stdout


def test_the_folder_is_the_prompt_as_a_component(embedded, base):
    assert sorted(path.name for path in embedded.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert equal(PromptEmbeddings.from_pretrained(embedded), embed_prompt("red", base))
    assert [path.name for path in embedded.parent.iterdir()] == ["red"]


def test_what_is_printed(tsdsr, base, tmp_path, monkeypatch):
    """Sizes and both ways to use the folder, which is named so that it is found from anywhere."""
    monkeypatch.chdir(tmp_path)
    result = tsdsr("embed", "red", "--base", base, "-o", "out", "--device", "cpu")
    lines = result.stdout.splitlines()
    assert lines[0] == f"Wrote 264 tokens of 12 numbers and a pooled vector of 10 to {tmp_path / 'out'}"
    assert f"tsdsr upscale --prompt-embeddings {tmp_path / 'out'}" in lines[1]
    assert f"PromptEmbeddings.from_pretrained('{tmp_path / 'out'}')" in lines[2]


def test_printed_python_runs(tsdsr, embedded, base, model, tmp_path):
    result = tsdsr("embed", "red", "--base", base, "-o", tmp_path / "out", "--device", "cpu")
    names = {"TSDSRPipeline": TSDSRPipeline, "PromptEmbeddings": PromptEmbeddings, "MODEL": str(model)}
    pipeline = eval(result.stdout.splitlines()[2], names)
    assert equal(pipeline.prompt_embeddings, PromptEmbeddings.from_pretrained(embedded))


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_dtype(tsdsr, base, tmp_path, dtype, expected):
    result = tsdsr("embed", "", "--base", base, "-o", tmp_path / "out", "--device", "cpu", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    written = PromptEmbeddings.from_pretrained(tmp_path / "out", dtype=expected)
    assert equal(written, embed_prompt("", base, dtype=expected))
    size = (tmp_path / "out" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert (264 * 12 + 10) * expected.itemsize < size < (264 * 12 + 10) * expected.itemsize + 500


def test_sd2(tsdsr, save_text_base, tmp_path):
    base = save_text_base(tmp_path / "base", "sd2")
    result = tsdsr("embed", "red", "--base", base, "-o", tmp_path / "out", "--device", "cpu")
    assert f"Wrote 8 tokens of 12 numbers to {tmp_path / 'out'}" in result.stdout


def test_variant(tsdsr, save_text_base, base, tmp_path):
    """The files of that name are read, and are the only ones there."""
    there = save_text_base(tmp_path / "base", "sd3")
    for folder in there.glob("text_encoder*"):
        (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    arguments = ["embed", "red", "--base", there, "--device", "cpu"]
    assert tsdsr(*arguments, "-o", tmp_path / "plain").exit_code == 2
    result = tsdsr(*arguments, "-o", tmp_path / "fp16", "--variant", "fp16")
    assert result.exit_code == 0, result.output
    assert equal(PromptEmbeddings.from_pretrained(tmp_path / "fp16"), embed_prompt("red", base))
    assert not (tmp_path / "plain").exists()


def test_what_is_cut_is_said_on_stderr(tsdsr, base, tmp_path):
    result = tsdsr("embed", "many words", "--base", base, "-o", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0
    assert "CLIP reads 8 tokens and not the end of the prompt: rds" in result.stderr.splitlines()


def test_a_folder_that_is_there_is_kept(tsdsr, embedded, base, tmp_path):
    """--overwrite replaces embeddings and nothing else."""
    there = shutil.copytree(embedded, tmp_path / "there")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    arguments = ["embed", "blue", "--base", base, "--device", "cpu"]
    result = tsdsr(*arguments, "-o", there)
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert equal(PromptEmbeddings.from_pretrained(there), PromptEmbeddings.from_pretrained(embedded))
    for folder in (other, tmp_path):
        result = tsdsr(*arguments, "-o", folder, "--overwrite")
        assert result.exit_code == 2 and "holds no prompt embeddings" in result.stderr
    assert (other / "config.json").is_file()
    assert tsdsr(*arguments, "-o", there, "--overwrite").exit_code == 0
    assert equal(PromptEmbeddings.from_pretrained(there), embed_prompt("blue", base))


def test_what_breaks_off_while_writing_changes_nothing(tsdsr, embedded, base, tmp_path, monkeypatch, assert_refused):
    there = shutil.copytree(embedded, tmp_path / "there")
    save = PromptEmbeddings.save_pretrained

    def breaks_off(self, folder, **options):
        save(self, folder, **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(PromptEmbeddings, "save_pretrained", breaks_off)
    for output in (there, tmp_path / "new"):
        result = tsdsr("embed", "blue", "--base", base, "-o", output, "--device", "cpu", "--overwrite")
        assert_refused(result, "No space left")
    assert equal(PromptEmbeddings.from_pretrained(there), PromptEmbeddings.from_pretrained(embedded))
    assert list(tmp_path.iterdir()) == [there]


def test_failures_are_one_sentence_and_leave_nothing(tsdsr, base, model, tmp_path, assert_refused):
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "text_encoder_3" / "model.safetensors").write_bytes(b"not weights")
    for named, *arguments in (
        ("no text_encoder", "--base", model),
        ("is baked, so it reads no prompts", "--base", "embedded"),
        ("does not exist", "--base", tmp_path / "nowhere"),
        ("not available", "--base", base, "--device", "abacus"),
    ):
        assert_refused(tsdsr("embed", "red", "-o", tmp_path / "out", *arguments), named)
    result = tsdsr("embed", "red", "-o", tmp_path / "out", "--base", broken)
    assert result.exit_code in (1, 2) and "tsdsr: " in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_local_base_needs_no_network(tsdsr, base, tmp_path, monkeypatch):
    """Although libraries that are loaded already may use it."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    tried = []
    for library, name in ((huggingface_hub.constants, "HF_HUB_OFFLINE"), (transformers.utils.hub, "_is_offline_mode")):
        monkeypatch.setattr(library, name, False, raising=False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *arguments: tried.append(arguments))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: tried.append(arguments) or [])
    result = tsdsr("embed", "red", "--base", base, "-o", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert tried == [] and os.environ["HF_HUB_OFFLINE"] == "1"


def test_upscaling_with_it(upscale, embedded, model, photo, tmp_path):
    """The picture is that of the pipeline with this prompt, not that of the model's own."""
    source = photo(tmp_path / "red.png")
    assert upscale(source, "-o", tmp_path / "own.png").exit_code == 0
    result = upscale(source, "-o", tmp_path / "embedded.png", "--prompt-embeddings", embedded)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "own.png").read_bytes() != (tmp_path / "embedded.png").read_bytes()
    pipeline = TSDSRPipeline.from_pretrained(model, prompt_embeddings=PromptEmbeddings.from_pretrained(embedded))
    pipeline.save_pretrained(tmp_path / "model")
    assert upscale(source, "-o", tmp_path / "saved.png", "--model", tmp_path / "model").exit_code == 0
    assert (tmp_path / "saved.png").read_bytes() == (tmp_path / "embedded.png").read_bytes()


def test_embeddings_that_do_not_fit(upscale, photo, tmp_path):
    torch.manual_seed(0)
    wrong = {
        "width": PromptEmbeddings(4, 13, 10),
        "pooled": PromptEmbeddings(4, 12, 9),
        "sd2": PromptEmbeddings(4, 12, 0),
    }
    for name, embeddings in wrong.items():
        embeddings.save_pretrained(tmp_path / name)
        result = upscale(
            photo(tmp_path / "red.png"), "-o", tmp_path / "out.png", "--prompt-embeddings", tmp_path / name
        )
        assert result.exit_code == 2 and "takes 12 and 10" in result.stderr
        assert not (tmp_path / "out.png").exists()
    for name in ("nowhere", "."):
        result = upscale(
            photo(tmp_path / "red.png"), "-o", tmp_path / "out.png", "--prompt-embeddings", tmp_path / name
        )
        assert result.exit_code == 2 and "holds no prompt embeddings" in result.stderr
