"""The photographs a run trains on, and those it is validated on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..imaging import find_images
from .config import ConfigError, DistillConfig
from .data import Folder, Pairs, PreparedShards, Streamed, split_photographs
from .families import Prompt
from .validation import Pair, validation_pairs

# Files of `tsdsr prepare`.
PREPARED, NULL_PROMPT = "dataset.json", "null_prompt.safetensors"


@dataclass
class Photographs:
    """What a run reads.

    Attributes:
        source: for `data.training_batches`.
        paths: files of a plain folder; empty for other sources.
        validation: fixed pairs, on the CPU.
        null_prompt: the empty prompt's embeddings, where the photographs were prepared with them.
        facts: about them, for the model card.
    """

    source: Any
    paths: list[Path]
    validation: list[Pair]
    null_prompt: Prompt | None = None
    facts: dict[str, str] = field(default_factory=dict)


def open_photographs(config: DistillConfig) -> Photographs:
    """The photographs that a run's settings name.

    Raises:
        ConfigError: if there are none, or they cannot be told apart from those held aside.
    """
    try:
        return _open(config)
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(str(error)) from error


def _open(config: DistillConfig) -> Photographs:
    train: Any
    paths: list[Path] = []
    held: list[Path] = []
    null_prompt = None
    if not config.train_data_dir:
        train = Streamed(
            dataset_name=config.dataset_name,
            dataset_config_name=config.dataset_config_name,
            data_files=list(config.data_files) or None,
            image_column=config.image_column,
            caption_column=config.caption_column,
        )
        facts = {"photographs": config.dataset_name or f"{len(config.data_files)} shards, streamed"}
    else:
        folder = Path(config.train_data_dir)
        if not folder.is_dir():
            raise ConfigError(f"train_data_dir {folder} is not a folder.")
        if (folder / PREPARED).is_file():
            train = PreparedShards(folder)
            if (folder / NULL_PROMPT).is_file():
                tensors = load_file(folder / NULL_PROMPT)
                null_prompt = (tensors["prompt_embeds"], tensors.get("pooled_prompt_embeds"))
        elif config.train_lq_dir:
            train = Pairs(config.train_lq_dir, folder, config.scale)
        else:
            if config.validation_photographs:
                paths, held = split_photographs(folder, config.validation_photographs)
            else:
                paths = find_images(folder)
            if not paths:
                raise ConfigError(f"{folder} holds no pictures.")
            train = Folder(folder, paths)
        facts = {"photographs": f"{len(train)} pictures of the folder {folder.resolve().name}"}
    lq_dir = None
    if config.validation_dir:
        held = find_images(Path(config.validation_dir))
        lq_dir = Path(config.validation_lq_dir) if config.validation_lq_dir else None
        facts["validation"] = f"the folder {Path(config.validation_dir).resolve().name}"
    elif held:
        facts["validation"] = f"{config.validation_photographs} photographs of the folder, held aside"
    elif config.validation_photographs:
        raise ConfigError("validation_photographs holds pictures of a plain folder aside; use validation_dir instead.")
    held = held[: config.max_validation_images]
    pairs = validation_pairs(held, lq_dir, config.validation_size, config.scale, config.seed)
    return Photographs(train, paths, pairs, null_prompt, facts)
