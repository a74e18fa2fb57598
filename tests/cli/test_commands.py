"""The command as a whole, `tsdsr info`, and how `tsdsr convert` refuses."""

import json
import subprocess
import sys

import pytest

import tsdsr as package


@pytest.mark.parametrize("arguments", [("--help",), ("-h",)])
def test_help(tsdsr, arguments):
    result = tsdsr(*arguments)
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("upscale", "convert", "info"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "upscale",
            ["--output", "--model", "--upscale", "--color-fix", "--tile-size", "--dtype", "--device", "--seed"],
        ),
        ("upscale", ["--overwrite", "--allow-large", "--format", "--quality", "--process-size"]),
        ("convert", ["--base", "--lora", "--embeddings", "--tinysr", "--output", "--keep-lora", "--dtype"]),
        ("info", ["--json"]),
    ],
)
def test_help_of_each_command(tsdsr, monkeypatch, name, options):
    monkeypatch.setenv("COLUMNS", "200")
    result = tsdsr(name, "--help")
    assert result.exit_code == 0
    assert all(option in result.stdout for option in options)


def test_no_command_shows_the_help(tsdsr):
    assert "upscale" in tsdsr().output


def test_version(tsdsr):
    result = tsdsr("--version")
    assert result.exit_code == 0
    assert result.stdout == f"tsdsr {package.__version__}\n"


def test_unknown_command(tsdsr):
    result = tsdsr("downscale")
    assert result.exit_code == 2
    assert "downscale" in result.stderr


def test_help_loads_no_heavy_library():
    """It has to answer at once: torch alone takes seconds."""
    code = (
        "import sys; from typer.testing import CliRunner; from tsdsr.cli import app\n"
        "assert CliRunner().invoke(app, ['upscale', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


# info


def test_info_as_json(tsdsr, model):
    result = tsdsr("info", model, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    facts = json.loads(result.stdout)
    assert facts["kind"] == "TSD-SR pipeline folder"
    assert facts["dtype"] == "float32"
    assert (facts["latent_channels"], facts["vae_scale"], facts["patch_size"]) == (4, 4, 2)
    assert (facts["layers"], facts["heads"], facts["width"]) == (2, 2, 16)
    assert facts["parameters"]["prompt_embeddings"] == 3 * 12 + 10
    assert facts["size_bytes"] == sum(path.stat().st_size for path in model.rglob("*") if path.is_file())


def test_info_as_a_table(tsdsr, model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = tsdsr("info", model)
    assert result.exit_code == 0 and result.stderr == ""
    rows = dict(line.split(None, 1) for line in result.stdout.splitlines() if len(line.split(None, 1)) == 2)
    assert rows["path"].strip() == str(model)
    assert rows["kind"].strip() == "TSD-SR pipeline folder"
    assert rows["heads"].strip() == "2"
    assert "lora" not in result.stdout  # what does not apply is left out


def test_info_on_a_pipeline_over_a_unet(tsdsr, make_pipeline, tmp_path):
    pipeline = make_pipeline("kl", network="unet")
    pipeline.save_pretrained(tmp_path)
    result = tsdsr("info", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["family"] == "TSD-SR on a UNet" and facts["dtype"] == "float32"
    assert facts["parameters"]["unet"] == sum(weight.numel() for weight in pipeline.unet.parameters())


def test_info_on_what_is_no_model(tsdsr, assert_refused, tmp_path):
    (tmp_path / "notes.txt").write_text("not a model")
    (tmp_path / "page.safetensors").write_text("<html><body>404</body></html>")
    for path in (tmp_path / "none", tmp_path, tmp_path / "notes.txt", tmp_path / "page.safetensors"):
        assert_refused(tsdsr("info", path), path)
        assert_refused(tsdsr("info", path, "--json"), path)


# convert


@pytest.fixture
def converted(tsdsr, tmp_path):
    """Function that runs `tsdsr convert` on three folders into tmp_path/out."""

    def run(base, lora, embeddings, *options):
        folders = ("--base", base, "--lora", lora, "--embeddings", embeddings)
        return tsdsr("convert", *folders, "-o", tmp_path / "out", *options)

    return run


def test_convert_refuses_in_one_sentence_and_leaves_nothing(converted, assert_refused, model, tmp_path):
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for base in (tmp_path / "none", tmp_path / "empty", model):
        assert_refused(converted(base, tmp_path / "empty", tmp_path / "empty"))
    assert sorted(tmp_path.rglob("*")) == before


def test_convert_needs_its_folders(tsdsr, assert_refused, tmp_path):
    def refused(options, *words):
        assert_refused(tsdsr("convert", "-o", tmp_path / "out", *options), *words)

    refused((), "--base and --lora and --embeddings", "--tinysr")
    refused(("--base", tmp_path, "--embeddings", tmp_path), "--lora must")
    for more in (("--base", tmp_path), ("--lora", tmp_path), ("--keep-lora",)):
        refused(("--tinysr", tmp_path, *more), f"{more[0]} must be left out")
    refused(("--tinysr", tmp_path / "none"), tmp_path / "none", "checkpoint/")
    assert not list(tmp_path.iterdir())


def test_convert_with_debug_shows_where(converted, tmp_path):
    result = converted(tmp_path / "none", tmp_path, tmp_path, "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
