"""Metrics with trained weights. Where pyiqa is installed, a small one runs with random weights, without network."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tsdsr
from tsdsr.evaluation import learned
from tsdsr.evaluation.published import LEARNED
from tsdsr.evaluation.results import Unavailable

CPU = torch.device("cpu")
needs_pyiqa = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("pyiqa", "torchvision")),
    reason="pyiqa is not installed: metrics with trained weights are NOT run",
)


def test_without_pyiqa_they_are_unavailable_and_say_how_to_get_them(monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", None)
    missing = learned.learned_metric("lpips", CPU)
    assert isinstance(missing, Unavailable) and missing.name == "lpips" and "pyiqa cannot be imported" in missing.reason
    assert missing.fetch == "pip install 'tsdsr[eval]' && tsdsr evaluate --fetch lpips"
    assert set(learned.learned_names()) == {"lpips", "dists", "fid", "musiq", "maniqa-pipal", "clipiqa"}
    with pytest.raises(ValueError) as refused:
        learned.fetch("lpips")
    one_sentence(refused.value, "pyiqa", "pip install 'tsdsr[eval]'")


def test_what_is_watched_reaches_no_network_and_is_recorded(tmp_path):
    import socket
    import urllib.request

    weights, other = tmp_path / "net.pth", tmp_path / "notes.txt"
    torch.save({"a": torch.zeros(2)}, weights)
    other.write_text("x")
    with learned._watched(network=False) as files:
        torch.load(weights, weights_only=False)
        other.read_text()
        with pytest.raises(learned.WeightsAbsentError, match=r"http://localhost/net\.pth"):
            urllib.request.urlopen("http://localhost/net.pth")
        with pytest.raises(learned.WeightsAbsentError):
            socket.create_connection(("localhost", 9))
    assert learned._checksums(files) == {"net.pth": hashlib.sha256(weights.read_bytes()).hexdigest()}
    with socket.socket() as server:  # afterwards everything is as it was
        server.bind(("localhost", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_weights_that_are_programs_are_not_run(tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save(Program(), tmp_path / "net.pth")
    with learned._watched(network=False), pytest.raises(Exception, match=r"[Ww]eights"):
        torch.load(tmp_path / "net.pth", weights_only=False)
    assert not (tmp_path / "made").exists()


def test_a_network_that_fails_leaves_its_figure_undefined(one_sentence):
    """And reaches for no network while it measures."""
    import urllib.request

    for wrong in (lambda: torch.ones(2) @ torch.ones(3), lambda: urllib.request.urlopen("http://localhost/x.pth")):
        with pytest.raises(ValueError) as undefined, learned._failing_as_undefined("lpips"):
            wrong()
        one_sentence(undefined.value, "lpips failed")
    assert not learned._watches


@needs_pyiqa
def test_an_unknown_name(one_sentence):
    for call in (lambda name: learned.learned_metric(name, CPU), learned.fetch):
        with pytest.raises(ValueError) as refused:
            call("lpipz")
        one_sentence(refused.value, "lpipz", "--list")


@needs_pyiqa
@pytest.mark.parametrize("name", list(LEARNED))
def test_absent_weights_are_named_with_their_mend(name, tmp_path):
    code = f"""
import json, torch
from tsdsr.evaluation.learned import learned_metric
found = learned_metric({name!r}, torch.device("cpu"))
print(json.dumps([found.name, found.reason, found.fetch]))
"""
    found = run(code, str(tmp_path))
    assert found[0] == name and found[1].startswith("weights are not on this disk (")
    assert found[2] == f"tsdsr evaluate --fetch {name}"


@needs_pyiqa
def test_a_metric_that_is_here_is_measured_and_its_file_recorded(tmp_path):
    code = """
import hashlib, json, os, pathlib, torch
from pyiqa.archs.cnniqa_arch import CNNIQA, default_model_urls
from pyiqa.utils.download_util import DEFAULT_CACHE_DIR
torch.manual_seed(0)
network = CNNIQA(pretrained=None)
(url,) = [url for key, url in default_model_urls.items() if "koniq" in key]
folder = pathlib.Path(DEFAULT_CACHE_DIR)
folder.mkdir(parents=True)
file = folder / url.rpartition("/")[2]
torch.save({"params": network.state_dict()}, file)
from tsdsr.evaluation.learned import learned_metric
metric, files = learned_metric("cnniqa", torch.device("cpu"))
picture = torch.rand(1, 3, 64, 64)
import pyiqa
value = float(pyiqa.create_metric("cnniqa", device="cpu")(picture))
print(json.dumps([metric.kind, metric.measure(picture, None), value, files,
                  {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}]))
"""
    kind, measured, expected, files, checksums = run(code, str(tmp_path))
    assert kind == "no-reference" and measured == pytest.approx(expected, abs=1e-6) and files == checksums


def run(code: str, cache: str):
    root = Path(tsdsr.__file__).parent
    environment = {**os.environ, "TORCH_HOME": cache, "HF_HOME": f"{cache}/hf", "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root.parent, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
