"""The photographs a run trains on, and those it is validated on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..imaging import find_images
from .config import ConfigError, DistillConfig, Phase
from .data import BatchSettings, Folder, Pairs, PreparedShards, Streamed, split_photographs, training_batches
from .data.sources import DATASET_FILE, NULL_PROMPT_FILE
from .families import Prompt
from .validation import Pair, validation_pairs


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


def read_batches(source: Any, settings: BatchSettings, **where: Any) -> Iterator[dict[str, Any]]:
    """`data.training_batches`, with what is wrong with the photographs as a `ConfigError`."""
    try:
        yield from training_batches(source, settings, **where)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def batch_settings(config: DistillConfig) -> BatchSettings:
    """What the batches of a run are like.

    Raises:
        ConfigError: for crops that cannot be cut so.
    """
    try:
        settings = BatchSettings(
            train_batch_size=config.train_batch_size,
            resolution=config.resolution,
            scale=config.scale,
            seed=config.seed,
            random_flip=config.random_flip,
            mild_degradation=config.mild_degradation,
            degrade_on=config.degrade_on,
            other_resolutions=config.other_resolutions or {},
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.uses(*Phase.ADVERSARIAL):
        config.check_judged(min(settings.resolutions))
    return settings


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
        name = config.dataset_name
        if name and Path(name).exists():  # a card travels; the folders of the machine it was made on do not
            name = Path(name).resolve().name
        facts = {"photographs": name or f"{len(config.data_files)} shards, streamed"}
    else:
        folder = Path(config.train_data_dir)
        if not folder.is_dir():
            raise ConfigError(f"train_data_dir {folder} is not a folder.")
        if (folder / DATASET_FILE).is_file():
            train = PreparedShards(folder)
            _check_prepared(train, config)
            if (folder / NULL_PROMPT_FILE).is_file():
                null_prompt = _null_prompt(folder / NULL_PROMPT_FILE)
        elif config.train_lq_dir:
            train = Pairs(config.train_lq_dir, folder, config.scale)
        else:
            if config.validation_photographs and not config.validation_dir:
                paths, held = split_photographs(folder, config.validation_photographs)
            else:
                paths = find_images(folder)
            if not paths:
                raise ConfigError(f"{folder} holds no pictures.")
            train = Folder(folder, paths, config.keep_photographs_gb * 1e9)
        facts = {"photographs": f"{len(train)} pictures of the folder {folder.resolve().name}"}
    lq_dir = None
    if config.validation_dir:
        held = find_images(Path(config.validation_dir))
        if not held:
            raise ConfigError(f"validation_dir {config.validation_dir} holds no pictures.")
        lq_dir = Path(config.validation_lq_dir) if config.validation_lq_dir else None
        facts["validation"] = f"the folder {Path(config.validation_dir).resolve().name}"
    elif held:
        facts["validation"] = f"{config.validation_photographs} photographs of the folder, held aside"
    elif config.validation_photographs:
        raise ConfigError("validation_photographs holds pictures of a plain folder aside; use validation_dir instead.")
    held = held[: config.max_validation_images]
    pairs = validation_pairs(held, lq_dir, config.validation_size, config.scale, config.seed)
    return Photographs(train, paths, pairs, null_prompt, facts)


def _check_prepared(shards: PreparedShards, config: DistillConfig) -> None:
    folder = shards.folder
    if config.train_lq_dir:
        raise ConfigError(f"{folder} holds prepared shards, which have no partners: leave out train_lq_dir.")
    if config.pretrain:
        raise ConfigError(
            f"{folder} holds latents of another autoencoder than the one that is trained here (pretrain): name the "
            "photographs themselves."
        )
    if config.other_resolutions:
        raise ConfigError(f"{folder} was prepared at resolution {shards.resolution}: leave out other_resolutions.")
    if config.resolution != shards.resolution:
        raise ConfigError(
            f"{folder} was prepared at resolution {shards.resolution}, not {config.resolution}: set resolution to that."
        )
    shifted = bool(shards.settings.get("shift_factor"))
    if shifted != config.use_shift_factor:
        raise ConfigError(
            f"The latents in {folder} were prepared {'with' if shifted else 'without'} the shift factor: set "
            f"use_shift_factor to {str(shifted).lower()}, or prepare them again."
        )


def _null_prompt(path: Path) -> Prompt:
    try:
        tensors = load_file(path)
        return tensors["prompt_embeds"], tensors.get("pooled_prompt_embeds")
    except (OSError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it and run `tsdsr prepare` again.") from error
