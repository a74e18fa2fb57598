"""Pipelines from the Hugging Face Hub, where a user asks for one: resumed, verified, and visible only when whole."""

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger("tsdsr")

# Configs, weights, the card and its licence; never code.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.md", "LICENSE*"]


def hub_folder(hub_id: str, home: Path) -> Path:
    """Where a Hub model lies under `home`, whether it does or not."""
    return home / hub_id.replace("/", "--")


def local_folder(hub_id: str, home: Path, download: bool) -> Path:
    """The folder of a Hub model under `home`, fetched first where that is allowed and it is not there.

    Raises:
        FileNotFoundError: if it is not there and may not be fetched.
        FileExistsError: if something else lies where it would go.
        ValueError: for something other than owner/name.
        ConnectionError: if it cannot be fetched; what came is kept, and the next try goes on from there.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) or ".." in hub_id:
        raise ValueError(f"hub_id must read owner/name, not {hub_id!r}.")
    folder = hub_folder(hub_id, home)
    if (folder / "model_index.json").is_file():
        return folder
    if not download:
        raise FileNotFoundError(
            f"{hub_id} is not in {folder}, and nothing is fetched without being asked; switch download on, or put the "
            "model's files there."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} is in the way of the download and has no model_index.json, so it is no pipeline; move it."
        )
    from huggingface_hub import snapshot_download

    logger.info("[tsdsr] Downloading %s into %s", hub_id, folder)
    partial = home / f".{folder.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    try:
        # Sizes and checksums are checked file by file, and unfinished files are continued.
        snapshot_download(hub_id, local_dir=partial, allow_patterns=PATTERNS)
    except Exception as error:  # the Hub's own errors, those of its HTTP library, and full disks
        raise ConnectionError(
            f"{hub_id} could not be downloaded ({_reason(error)}); run again to go on where it stopped, or put the "
            f"model's files into {folder}."
        ) from error
    if not (partial / "model_index.json").is_file():
        raise ValueError(f"{hub_id} on the Hub is not a pipeline (it has no model_index.json); choose another hub_id.")
    if folder.exists():  # empty: not every system renames onto it
        folder.rmdir()
    os.replace(partial, folder)
    return folder


def _reason(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return first.split(". ")[0].rstrip(".")
