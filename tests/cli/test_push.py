"""`tsdsr push`, to a Hub on this machine."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tsdsr import TSDSRPipeline
from tsdsr.pipelines.hub import SAMPLE
from tsdsr.pipelines.loading import EMBEDDED

NAME = "someone/test"


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the folder that would be uploaded


def test_a_dry_run(tsdsr, model, fake_hub, monkeypatch, tmp_path):
    """Every file with its size; no network, no token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    result = tsdsr("push", model, NAME, "--dry-run", "--no-sample")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "someone--test"
    *listed, last = result.stdout.splitlines()
    sizes = {name: int(size.replace(",", "")) for size, name in (line.split(maxsplit=1) for line in listed)}
    assert sizes == {name: len(content) for name, content in tree(folder).items()} and "vae/config.json" in sizes
    assert "someone--test" in last and fake_hub.paths == []
    assert not any(name.startswith("images") for name in sizes)


def test_where_a_dry_run_writes(tsdsr, model, assert_refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tsdsr("push", model, "test", "--dry-run", "--no-sample").exit_code == 0
    assert tsdsr("push", model, "test", "--dry-run", "--no-sample", "-o", "deep/out").exit_code == 0
    assert tree(tmp_path / "test") == tree(tmp_path / "deep" / "out")
    again = ("push", model, "test", "--dry-run", "--no-sample")
    (tmp_path / "test" / "old").touch()
    assert_refused(tsdsr(*again), "test exists")
    assert tsdsr(*again, "--overwrite").exit_code == 0
    assert tree(tmp_path / "test") == tree(tmp_path / "deep" / "out")


def test_samples(tsdsr, model, photo, assert_refused, tmp_path):
    photos = [photo(tmp_path / "a.png"), photo(tmp_path / "b.png", width=9)]
    given = [word for path in photos for word in ("--sample", path)]
    dry = ("push", model, NAME, "--dry-run", "-o", tmp_path / "out")
    assert tsdsr(*dry, *given).exit_code == 0
    assert [name for name in sorted(tree(tmp_path / "out")) if name.startswith("images/")] == [
        "images/before_after_1.jpg",
        "images/before_after_2.jpg",
    ]
    assert_refused(tsdsr(*dry, *given, "--no-sample"), "--no-sample")
    assert_refused(tsdsr(*dry, "--overwrite", "--sample", tmp_path / "none.png"), "none.png")
    (tmp_path / "text.png").write_text("no picture")
    assert_refused(tsdsr(*dry, "--overwrite", "--sample", tmp_path / "text.png"), "text.png")


def test_the_code_of_the_card_runs(tsdsr, photo, monkeypatch, tmp_path):
    """As it stands, but for the folder in place of the repository, with and without the package's own class."""
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "photo.jpg", width=24, height=24)
    result = tsdsr("push", "embedded", NAME, "--dry-run", "--no-sample", "--include-code", "-o", "out")
    assert result.exit_code == 0, result.output
    section = (tmp_path / "out" / "README.md").read_text().split("## Use\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    pictures = []
    for code in blocks:
        assert f'"{NAME}"' in code
        exec(code.replace(f'"{NAME}"', '"out"'), {})
        pictures.append(np.asarray(Image.open("photo_x4.png")))
        (tmp_path / "photo_x4.png").unlink()
    assert len(pictures) == 2 and pictures[0].shape == (96, 96, 3) and np.array_equal(*pictures)


# --- the upload


def test_there_and_back(tsdsr, fake_hub, tmp_path):
    """The command uploads what a dry run writes; whoever loads it from the Hub gets the same picture, with this package
    (whose own code then runs) or without."""
    assert tsdsr("push", "embedded", NAME, "--include-code", "--dry-run", "-o", tmp_path / "dry").exit_code == 0
    result = tsdsr("push", "embedded", NAME, "--include-code")
    assert result.stdout == f"Uploaded to {fake_hub.url}/{NAME}\n", result.output
    assert fake_hub.repositories == {NAME: tree(tmp_path / "dry")}
    assert {"crops.jpg", "training_curves.png"} <= fake_hub.repositories[NAME].keys()  # what the card shows
    photograph, picture = tmp_path / "photograph.png", tmp_path / "picture.npy"
    Image.open(SAMPLE).resize((40, 30)).save(photograph)
    expected = TSDSRPipeline.from_pretrained(EMBEDDED)(Image.open(photograph), process_size=0).images[0]
    with_package = f"from tsdsr import TSDSRPipeline\npipe = TSDSRPipeline.from_pretrained('{NAME}')\n"
    without = (
        "sys.modules['tsdsr'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained('{NAME}', trust_remote_code=True)\n"
    )
    for home, load in (("with", with_package), ("without", without)):
        code = (
            "import sys, numpy\n"
            f"{load}"
            "from diffusers.utils import load_image\n"
            "numpy.save(sys.argv[1], pipe(load_image(sys.argv[2]), process_size=0).images[0])\n"
        )
        fake_hub.paths.clear()
        subprocess.run(
            [sys.executable, "-c", code, str(picture), str(photograph)],
            check=True,
            cwd=tmp_path,
            env={**os.environ, **fake_hub.environment(tmp_path / home)},
        )
        assert f"GET /api/models/{NAME}" in fake_hub.paths
        assert np.array_equal(np.load(picture), np.asarray(expected))
        picture.unlink()


@pytest.fixture
def push(tsdsr, model, fake_hub):
    """A function that runs `tsdsr push` for a tiny pipeline, without pictures."""

    def run(*arguments, repo_id=NAME, source=model):
        return tsdsr("push", source, repo_id, "--no-sample", *arguments)

    return run


@pytest.mark.parametrize(("flag", "visibility"), [("--private", "private"), ("--no-private", "public"), (None, None)])
def test_privacy(push, fake_hub, flag, visibility):
    assert push(*[flag] if flag else []).exit_code == 0
    wanted = fake_hub.created[NAME]
    older = {"private": True, "public": False}.get(visibility)  # how earlier versions of huggingface_hub say it
    assert wanted.get("visibility") == visibility or (wanted.get("private") is older and "visibility" not in wanted)


def test_pull_requests_and_messages(push, fake_hub):
    result = push("--create-pr", "--message", "Better")
    assert result.stdout == f"Uploaded to {fake_hub.url}/{NAME}/discussions/1\n"
    assert fake_hub.commits == ["Better"] and fake_hub.repositories[NAME] == {}
    assert "model_index.json" in fake_hub.repositories[f"{NAME}@refs/pr/1"]


def test_a_name_in_ones_own_account(push, fake_hub):
    """The card names the owner, too: its code would not run otherwise."""
    assert push(repo_id="test").exit_code == 0
    assert f'"{NAME}"' in fake_hub.repositories[NAME]["README.md"].decode()


@pytest.mark.parametrize("repo_id", ["a/b/c", "a b", ".a/b", "someone/te..st"])
def test_names_that_are_none(push, assert_refused, fake_hub, repo_id):
    assert_refused(push(repo_id=repo_id), repr(repo_id), "owner/name")
    assert fake_hub.paths == []


def test_models_that_are_none(push, assert_refused, fake_hub, model, tmp_path):
    assert_refused(push(source=tmp_path / "none"), "none", "does not exist")
    assert_refused(push(source=tmp_path), tmp_path, "model_index.json")
    shutil.copytree(model, tmp_path / "broken")
    (tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert_refused(push(source=tmp_path / "broken"), "vae", "no weights")
    assert fake_hub.repositories == {}


def test_options_that_do_not_fit(push, assert_refused, fake_hub):
    for option in (["--output", "out"], ["--overwrite"]):
        assert_refused(push(*option), option[0], "--dry-run")
    assert fake_hub.paths == []


def test_without_a_login(push, assert_refused, fake_hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert_refused(push(), "not logged in", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert_refused(push(), NAME, "Invalid username or password")
    assert_refused(push(repo_id="test"), "test", "Invalid user token")
    assert fake_hub.repositories == {}


def test_a_hub_that_fails(push, assert_refused, fake_hub):
    fake_hub.failing = {"/api/repos/create": 500}
    assert_refused(push(), NAME, "hiccups")
    fake_hub.failing = {f"/api/models/{NAME}/commit": 403}
    assert_refused(push(), NAME, "hiccups")


def test_without_a_network(push, assert_refused, fake_hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused(push(), NAME, "the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(push(), NAME, "offline")
