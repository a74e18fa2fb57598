"""Where photographs come from: folders, pairs of folders, prepared shards, streams of Hugging Face `datasets`."""

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...imaging import UnreadableImageError, find_images
from .photographs import load_uint8

# Names inside a prepared folder.
DATASET_FILE = "dataset.json"
NULL_PROMPT_FILE = "null_prompt.safetensors"
# What `tsdsr prepare --targets` stores of a sample beside its latents.
TARGETS = ("lq", "lq_latents", "teacher_latents")


@dataclass
class Example:
    """One photograph, with what is known of it.

    Attributes:
        name: file name or key, for messages.
        hq: (3, H, W) uint8.
        lq: (3, H / scale, W / scale) uint8, of ready pairs, and of shards with targets.
        caption: what the photograph shows, if somebody said so.
        hq_latents: (C, h, w), scaled, of prepared shards only; `hq` is then exactly the crop they were encoded from.
        prompt_embeds: (tokens, width), of the caption.
        pooled_prompt_embeds: (width,), of the caption.
        lq_latents: (C, h, w), scaled: what the model's encoder makes of `lq`, enlarged; of shards with targets only.
        teacher_latents: (C, h, w), scaled: what the model makes of these.
    """

    name: str
    hq: Tensor
    lq: Tensor | None = None
    caption: str | None = None
    hq_latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    lq_latents: Tensor | None = None
    teacher_latents: Tensor | None = None


class UnreadableImage(ValueError):
    """A picture that training goes on without. The message is one sentence that names the file.

    Attributes:
        name: the file name or key alone.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions are pickled by their message alone
        return type(self), (self.name, str(self))


class Folder:
    """Photographs in a folder; item `i` is an `Example`.

    Captions come from `metadata.jsonl` or `metadata.csv` in the folder (fields `file_name` and `text`), else from
    `NAME.txt` beside `NAME.png`.

    Args:
        folder: photographs lie directly in it.
        paths: only these files of it, in this order; all of them, in natural order, where left out.
        kept_bytes: decoded photographs are kept in memory up to so many bytes, by each process that reads.

    Raises:
        ValueError: if there is no such folder, no picture in it, or its metadata cannot be understood.
    """

    def __init__(self, folder: str | Path, paths: list[Path] | None = None, kept_bytes: float = 0):
        self._kept: dict[int, Tensor] = {}
        self._room = kept_bytes
        self.folder = Path(folder)
        self.paths = find_images(self.folder) if paths is None else list(paths)
        if not self.paths:
            raise ValueError(f"{self.folder} holds no pictures.")
        self._captions = _read_metadata(self.folder)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The file name of an item."""
        return self.paths[index].name

    def __getitem__(self, index: int) -> Example:
        """Read one photograph.

        Raises:
            UnreadableImage: if the file is no whole picture.
        """
        path = self.paths[index]
        picture = self._kept.get(index)
        if picture is None:
            picture = _load(path)
            if picture.nbytes <= self._room:
                self._kept[index] = picture
                self._room -= picture.nbytes
        return Example(path.name, picture, caption=self.caption(index))

    def caption(self, index: int) -> str | None:
        """The caption of an item, None where it has none."""
        path = self.paths[index]
        if path.name in self._captions:
            return self._captions[path.name]
        beside = path.with_suffix(".txt")
        return beside.read_text(encoding="utf-8").strip() or None if beside.is_file() else None


class Pairs:
    """Small and sharp pictures of the same names in two folders; item `i` is an `Example` with `lq`.

    Args:
        lq_dir: folder of the small pictures.
        hq_dir: folder of the sharp ones; captions are looked for here, as `Folder` does.
        scale: how many times larger they are.

    Raises:
        ValueError: if a picture has no partner, two pictures of a folder have one stem, or the first pair is not of
            sizes that agree.
    """

    def __init__(self, lq_dir: str | Path, hq_dir: str | Path, scale: int = 4):
        self.hq = Folder(hq_dir)
        self.scale = scale
        low, high = _by_stem(Folder(lq_dir).paths), _by_stem(self.hq.paths)
        for have, lack, folder in ((high, low, lq_dir), (low, high, hq_dir)):
            lonely = [path.name for stem, path in have.items() if stem not in lack]
            if lonely:
                raise ValueError(f"{folder} holds no partner of {_some(lonely)}; pairs are files of the same stem.")
        self.lq_paths = [low[path.stem] for path in self.hq.paths]
        with suppress(UnreadableImage):  # it is skipped when its turn comes
            self[0]

    def __len__(self) -> int:
        return len(self.hq)

    def name(self, index: int) -> str:
        """The file name of the sharp picture of an item."""
        return self.hq.name(index)

    def __getitem__(self, index: int) -> Example:
        """Read one pair.

        Raises:
            UnreadableImage: if one of the files is no whole picture.
            ValueError: if their sizes do not agree.
        """
        example = self.hq[index]
        example.lq = _load(self.lq_paths[index])
        check_pair(example, self.scale)
        return example


class PreparedShards:
    """What `tsdsr prepare` wrote: crops with their latents, and with the embeddings of their captions.

    With targets, they also come with the degraded picture and with what the model makes of it.

    Item `i` is an `Example`; one without a caption has the embeddings of the empty prompt, where captions of others
    were encoded. Only whole shards count, so a folder that is still being written can be read too.

    Args:
        folder: what `tsdsr prepare` was told to write to.

    Raises:
        ValueError: if it is not such a folder, or has no whole shard with a sample in it yet.

    Attributes:
        settings: what the shards were prepared with, by name.
        resolution: side of the crops, pixels.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.settings: dict[str, Any] = json.loads((self.folder / DATASET_FILE).read_text("utf-8"))["settings"]
            self.resolution: int = self.settings["resolution"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder} was not written by `tsdsr prepare` (no usable {DATASET_FILE}).") from error
        self._prompts: dict[str, dict[str, tuple[int, int]]] = {}
        self._samples: list[tuple[str, str, dict[str, tuple[int, int]]]] = []
        for shard in sorted(self.folder.glob("shard-*.tar")):
            index = json.loads(shard.with_suffix(".json").read_text("utf-8"))
            self._prompts[shard.name] = index["prompts"]
            self._samples += [(shard.name, key, members) for key, members in index["samples"].items()]
        if not self._samples:
            raise ValueError(f"{self.folder} has no whole shard with samples yet; run `tsdsr prepare` to its end.")

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """Shard and key of a sample."""
        shard, key, _ = self._samples[index]
        return f"{shard}/{key}"

    def __getitem__(self, index: int) -> Example:
        """Read one sample.

        Raises:
            UnreadableImage: if what the shard holds of it is damaged.
        """
        shard, _, members = self._samples[index]
        name = self.name(index)
        data = {kind: _read_at(str(self.folder / shard), *place) for kind, place in members.items()}
        try:
            facts, tensors = json.loads(data["json"]), load(data["safetensors"])
            found = {"hq_latents": tensors["latents"]}
            if self.settings.get("targets"):
                found |= {target: tensors[target] for target in TARGETS}
        except (KeyError, ValueError, SafetensorError) as error:
            raise UnreadableImage(name, f"{name} is damaged ({error}); prepare that shard again.") from error
        caption = facts["caption"]
        prompt: dict[str, Tensor] = {}
        if caption is not None and prompt_key(caption) in self._prompts[shard]:
            prompt = _load_prompt(str(self.folder / shard), *self._prompts[shard][prompt_key(caption)])
        elif caption is None and (self.folder / NULL_PROMPT_FILE).is_file():
            prompt = _load_prompt(str(self.folder / NULL_PROMPT_FILE), 0, None)
        return Example(name, _decode(data["png"], name), caption=caption, **found, **prompt)


def prompt_key(caption: str) -> str:
    """The name under which a shard keeps the embeddings of a caption."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


class Streamed:
    """A stream of Hugging Face `datasets`: a data set of the Hub, or parquet files and webdataset archives.

    Every process and worker reads its own part: whole files where there are as many as readers, else every n-th
    sample of all of them. Pictures stay as they lie in the files until a worker decodes them. Each epoch is shuffled
    anew: the order of the files, and that of the samples, block by block.

    Args:
        dataset_name: Hub id or local folder of a data set.
        dataset_config_name: which of its configurations.
        data_files: paths, addresses or patterns of .parquet or .tar files; with `dataset_name`, files of that data set.
        split: which part of the data set.
        image_column: where the photographs are: "image", or the suffix in a webdataset archive ("jpg", "png", ...).
            If there is none of this name and just one with pictures, that one.
        caption_column: where their captions are, in text; None for no captions.
        lq_column: where ready small pictures are; None to degrade the photographs.
        shuffle_buffer: samples of a block. Every reader holds one in memory, as the bytes of their files.

    Raises:
        ValueError: if `datasets` is not installed, neither name nor files were given, files are of other kinds, or
            there is no such column.
        OSError: if the data set cannot be found or reached.
    """

    def __init__(
        self,
        dataset_name: str | None = None,
        dataset_config_name: str | None = None,
        data_files: str | Path | list[str | Path] | None = None,
        split: str = "train",
        image_column: str = "image",
        caption_column: str | None = None,
        lq_column: str | None = None,
        shuffle_buffer: int = 200,
    ):
        try:
            from datasets import Image, load_dataset
        except ImportError as error:
            raise ValueError('Streaming needs the package datasets: pip install "tsdsr[train]".') from error
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be at least 1, not {shuffle_buffer}.")
        given = data_files if isinstance(data_files, list) else [data_files] if data_files else []
        files = [str(file) for file in given]
        stream = load_dataset(
            dataset_name or _builder_of(files),
            dataset_config_name,
            data_files={split: files} if files else None,
            split=split,
            streaming=True,
        )
        features = stream.features or {}
        pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
        if image_column not in features and len(pictures) == 1:
            image_column = pictures[0]
        self.image_column, self.caption_column, self.lq_column = image_column, caption_column, lq_column
        wanted = [name for name in (image_column, lq_column, caption_column) if name is not None]
        for name in wanted:
            if name not in features:
                raise ValueError(f"The stream has no column {name!r}; it has {', '.join(features) or 'none by name'}.")
        if "__key__" in features:
            wanted.append("__key__")
        stream = stream.select_columns(list(dict.fromkeys(wanted)))
        for column in (image_column, lq_column):
            if column is not None:
                stream = stream.cast_column(column, Image(decode=False))
        self.shuffle_buffer = shuffle_buffer
        self._stream = stream

    def rows(self, part: int, parts: int, *, seed: int, epoch: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The samples of one epoch that fall to one of `parts` readers, pictures undecoded; for `example`.

        Args:
            part: number of the reader.
            parts: how many there are.
            seed: of the shuffling.
            epoch: each has its own order.
            skip: leave out so many of the first ones.
        """
        from datasets import concatenate_datasets
        from datasets.distributed import split_dataset_by_node

        # `IterableDataset.shuffle` shuffles in another way in each version of `datasets`, reads ten files at once in
        # some, and cannot be entered in the middle without reading all that comes before.
        files = self._stream.num_shards
        order = np.random.default_rng((seed, epoch)).permutation(files)
        by_file = files >= parts
        if by_file:
            order = order[part::parts]
        stream = concatenate_datasets([self._stream.shard(files, int(file), contiguous=False) for file in order])
        whole_blocks, begin = divmod(skip, self.shuffle_buffer)
        stream = stream.skip(whole_blocks * self.shuffle_buffer * (1 if by_file else parts))
        if not by_file:
            stream = split_dataset_by_node(stream, rank=part, world_size=parts)
        # Iterated one by one, a stream would split itself again between the workers of a DataLoader.
        rows = ({name: values[0] for name, values in row.items()} for row in stream.iter(batch_size=1))
        for block in itertools.count(whole_blocks):
            together = list(itertools.islice(rows, self.shuffle_buffer))
            if not together:
                return
            for index in np.random.default_rng((seed, epoch, part, block)).permutation(len(together))[begin:]:
                yield together[index]
            begin = 0

    def example(self, row: dict[str, Any], name: str) -> Example:
        """Decode one of `rows`.

        Args:
            row: the sample.
            name: what to call it if it has no name of its own.

        Raises:
            UnreadableImage: if one of its pictures is missing or no whole picture.
        """
        cell = row[self.image_column] or {}
        name = row.get("__key__") or cell.get("path") or name
        lq = None if self.lq_column is None else _decode(_bytes_of(row[self.lq_column], name), name)
        caption = None if self.caption_column is None else row[self.caption_column]
        return Example(name, _decode(_bytes_of(cell, name), name), lq=lq, caption=caption)


def check_pair(example: Example, scale: int) -> None:
    """Raises a `ValueError` if the two pictures of a pair are not `scale` times apart in size."""
    if example.lq is None:
        return
    height, width = example.lq.shape[1:]
    if example.hq.shape[1:] != (height * scale, width * scale):
        raise ValueError(
            f"The pair {example.name} is {width}x{height} and {example.hq.shape[2]}x{example.hq.shape[1]} pixels; "
            f"the second must be {scale} times the first."
        )


def _load(path: Path) -> Tensor:
    try:
        return load_uint8(path)
    except UnreadableImageError as error:
        raise UnreadableImage(path.name, str(error)) from error


def _by_stem(paths: list[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(f"{path.parent} holds both {found[path.stem].name} and {path.name}; keep one of them.")
        found[path.stem] = path
    return found


def _some(names: list[str], most: int = 3) -> str:
    """The first of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_metadata(folder: Path) -> dict[str, str | None]:
    """Captions by file name, from `metadata.jsonl` or `metadata.csv`; none where there is neither."""
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    rows: list[Any] = []
    if lines.is_file():
        source = lines
        for number, line in enumerate(lines.read_text(encoding="utf-8-sig").splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"Line {number} of {lines} is not JSON ({error}).") from error
    elif table.is_file():
        source = table
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    else:
        return {}
    if not all(isinstance(row, dict) and isinstance(row.get("file_name"), str) for row in rows):
        raise ValueError(f"Every entry of {source} must have a file_name.")
    if rows and not any("text" in row for row in rows):
        raise ValueError(f"{source} has no captions: they are looked for in the field text.")
    return {row["file_name"]: (row.get("text") or "").strip() or None for row in rows}


def _read_at(path: str, offset: int, size: int | None) -> bytes:
    with open(path, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


# SD3's embeddings of one caption are 2.7 MB in half precision, and neighbours often share theirs.
@lru_cache(maxsize=16)
def _load_prompt(path: str, offset: int, size: int | None) -> dict[str, Tensor]:
    return {name: tensor[0] for name, tensor in load(_read_at(path, offset, size)).items()}


def _builder_of(files: list[str]) -> str:
    """Which loader of `datasets` reads these files."""
    kinds = {Path(file).suffix.lower() for file in files}
    builder = {".parquet": "parquet", ".tar": "webdataset"}.get(next(iter(kinds))) if len(kinds) == 1 else None
    if builder is None:
        raise ValueError(
            f"data_files must be either .parquet or .tar files, not {_some(files)}."
            if files
            else "Give the name of a data set, or data_files."
        )
    return builder


def _bytes_of(cell: dict[str, Any] | None, name: str) -> bytes:
    """A picture's file, from a cell that holds it or says where it is."""
    if not cell or not (cell.get("bytes") or cell.get("path")):
        raise UnreadableImage(name, f"{name} has no picture.")
    if cell.get("bytes"):
        return cell["bytes"]
    with fsspec.open(cell["path"], "rb") as stream:
        return stream.read()


def _decode(data: bytes, name: str) -> Tensor:
    stream = io.BytesIO(data)
    stream.name = name  # by which `read` calls it in messages
    try:
        return load_uint8(stream)
    except UnreadableImageError as error:
        raise UnreadableImage(name, str(error)) from error
