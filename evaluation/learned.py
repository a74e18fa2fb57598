"""Metrics with trained networks, through pyiqa (extra `eval`). Nothing is downloaded unless `fetch` is called."""

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from .metrics.metric import Column, Metric
from .published import LEARNED
from .results import Unavailable

INSTALL = "pip install 'tsdsr[eval]'"
_WEIGHTS = {".pth", ".pt", ".mat", ".npz", ".pkl", ".bin", ".ckpt", ".safetensors"}


class WeightsAbsentError(OSError):
    """Weights are not on this disk, and fetching them was not asked for."""


def learned_metric(name: str, device: torch.device) -> tuple[Metric, dict[str, str]] | Unavailable:
    """A metric of pyiqa with weights that are on this disk, and the SHA-256 of their files.

    Raises:
        ValueError: if pyiqa is here and has no metric of that name.
    """
    fetch = f"tsdsr evaluate --fetch {name}"
    try:
        configs = _configs()
    except ImportError as error:
        return Unavailable(name, f"pyiqa cannot be imported here ({_line(error)})", f"{INSTALL} && {fetch}")
    if name not in configs:
        raise ValueError(f"The metric {name!r} is not known; see `tsdsr evaluate --list`.")
    try:
        with _watched(network=False) as files:
            return _make(name, configs[name], device), _checksums(files)
    except WeightsAbsentError as error:
        return Unavailable(name, f"weights are not on this disk ({error})", fetch)
    except LocalEntryNotFoundError:
        return Unavailable(name, "weights are not on this disk (they are on the Hugging Face Hub)", fetch)
    except Exception as error:  # damaged files, packages that a metric wants beside pyiqa
        return Unavailable(name, f"pyiqa cannot make it ({type(error).__name__}: {_line(error)})", fetch)


def learned_names() -> list[str]:
    """All metrics that pyiqa knows; those of the papers where it is not installed."""
    try:
        return sorted(_configs())
    except ImportError:
        return list(LEARNED)


def fetch(name: str) -> dict[str, str]:
    """Download the weights of a metric to torch's and pyiqa's caches; returns the SHA-256 of their files.

    Raises:
        ValueError: if pyiqa is absent or has no metric of that name.
        OSError: if they cannot be had.
    """
    try:
        configs = _configs()
    except ImportError as error:
        raise ValueError(f"pyiqa cannot be imported here ({_line(error)}): {INSTALL}.") from error
    if name not in configs:
        raise ValueError(f"The metric {name!r} is not known; see `tsdsr evaluate --list`.")
    try:
        with _watched(network=True) as files:
            _make(name, configs[name], torch.device("cpu"))
    except Exception as error:
        raise OSError(f"the weights of {name} cannot be fetched ({_line(error)}); check the connection.") from error
    return _checksums(files)


def versions() -> dict[str, str]:
    """Of the packages that decide what the metrics give."""
    found = {}
    for package in ("torch", "torchvision", "pyiqa", "timm", "numpy", "pillow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _configs() -> dict[str, Any]:
    with _quiet():
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
    return DEFAULT_CONFIGS


def _make(name: str, config: dict[str, Any], device: torch.device) -> Metric:
    import pyiqa

    network = pyiqa.create_metric(name, device=device)
    of_set = name.startswith("fid")
    full = config.get("metric_mode") == "FR"
    column = LEARNED.get(name) or Column(
        name,
        name.upper(),
        "set" if of_set else "full-reference" if full else "no-reference",
        "lower" if config.get("lower_better") or of_set else "higher",
        "through pyiqa",
    )

    @torch.no_grad()
    def measure(sr: Tensor, hr: Tensor | None) -> float:
        pictures = [picture.to(device) for picture in (sr, hr) if picture is not None and (full or picture is sr)]
        with _failing_as_undefined(name):
            return float(network(*pictures).mean())

    def measure_folders(sr: Path, hr: Path) -> float:
        with _failing_as_undefined(name):
            return float(network(str(sr), str(hr), num_workers=0, verbose=False))

    return Metric(**vars(column), measure=measure_folders if of_set else measure)


@contextmanager
def _failing_as_undefined(name: str) -> Iterator[None]:
    """What goes wrong in a network that is measured with leaves this figure undefined, and the others as they are."""
    try:
        with _watched(network=False):
            yield
    except Exception as error:
        raise ValueError(f"{name} failed ({type(error).__name__}: {_line(error)}).") from error


# pyiqa fetches what it lacks from within constructors, by urllib, requests and the Hub's client. Python's audit events
# (PEP 578) see all of them, and which files are read. A hook cannot be taken away again, so this one is added once.
_watches: list[dict[str, Any]] = []
_hooked = False
# pyiqa reads what it fetched as pickles; torch then takes weights from them, never programs.
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watches:
        return
    watch = _watches[-1]
    if event == "open" and isinstance(arguments[0], str) and Path(arguments[0]).suffix in _WEIGHTS:
        watch["files"][arguments[0]] = None
    elif not watch["network"] and event in ("urllib.Request", "socket.getaddrinfo", "socket.connect"):
        raise WeightsAbsentError(arguments[0] if event == "urllib.Request" else "they lie on another machine")


@contextmanager
def _watched(network: bool) -> Iterator[dict[str, None]]:
    """Says which files of weights were read meanwhile; without `network`, what wants one raises WeightsAbsentError."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    watch: dict[str, Any] = {"network": network, "files": {}}
    before = os.environ.get(_WEIGHTS_ONLY), hub.HF_HUB_OFFLINE
    os.environ[_WEIGHTS_ONLY] = "1"
    hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE or not network  # its client would try again for a minute
    _watches.append(watch)
    try:
        with _quiet():
            yield watch["files"]
    finally:
        _watches.remove(watch)
        hub.HF_HUB_OFFLINE = before[1]
        if before[0] is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """What pyiqa prints and warns of goes nowhere; what it raises is passed on."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _checksums(files: dict[str, None]) -> dict[str, str]:
    """SHA-256 by file name."""
    found = {}
    for path in map(Path, files):
        if path.is_file():
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
