"""Photographs encoded once, before training: crops, their latents, and the embeddings of their captions, in shards."""

import hashlib
import io
import json
import os
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...imaging import Picture, write
from ...pipelines.loading import DTYPES, EMBEDDED, choose_device
from ...pipelines.text import TextEncoder, load_text_encoder
from ..degradation import DegradationConfig, degrade
from ..draws import DEGRADATION, PLACES, draws
from ..one_step import OneStepModel
from .loader import draw, one_thread
from .sources import DATASET_FILE, NULL_PROMPT_FILE, Folder, UnreadableImage, prompt_key

# Captions that are encoded at once.
_TEXT_BATCH = 8


@dataclass
class Prepared:
    """What one run of `prepare` did.

    Attributes:
        samples: how many it wrote.
        images_per_second: samples written per second of encoding, loading of the model left out.
        shards: how many shards it wrote.
        kept: how many were whole already.
        skipped: (name, reason) of the photographs that could not be used.
        captions: how many photographs of the folder have one.
        embedded: whether captions were embedded: there are some, and the model has text encoders.
    """

    samples: int = 0
    images_per_second: float = 0.0
    shards: int = 0
    kept: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    captions: int = 0
    embedded: bool = False


def prepare(
    model: str | Path,
    folder: str | Path,
    output_dir: str | Path,
    *,
    resolution: int = 512,
    crops: int = 1,
    seed: int = 0,
    samples_per_shard: int = 256,
    dtype: str = "fp16",
    use_shift_factor: bool | None = None,
    batch_size: int = 8,
    num_workers: int = 2,
    device: str = "auto",
    part: int = 0,
    parts: int = 1,
    targets: bool = False,
    scale: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Encode the photographs of a folder for training; `PreparedShards` reads the result.

    `output_dir` gets `shard-00000.tar` and so on, in webdataset's convention: `KEY.png`, the crop, without loss;
    `KEY.json` with caption, source and box (left, top, right, bottom, in pixels of the photograph);
    `KEY.safetensors` with latents (C, h, w), the mode of the encoder's posterior times the VAE's scaling factor; at the
    end `HASH.prompt.safetensors` for every distinct caption, prompt_embeds (1, tokens, width) and, of SD3,
    pooled_prompt_embeds (1, width). Beside each shard lies its index, `shard-00000.json`. `dataset.json` has the
    settings, counts, and what was skipped and why; `null_prompt.safetensors` the empty prompt's embeddings.

    With `targets`, `KEY.safetensors` also holds what a student of this very model is compressed with: lq (3, s / scale,
    s / scale) uint8, the crop degraded as in training, drawn from the seed and its number alone; lq_latents, what the
    model's encoder makes of it, enlarged (z_L); teacher_latents, what the whole model makes of these (z_tea).

    A shard holds a fixed range of the samples and gets its name when it is whole. Whole shards are kept, so a run that
    was interrupted is simply started again; so is one that skipped photographs which have been mended, after their
    shards were deleted. Several processes or machines share the work by `part` and `parts`.

    Args:
        model: diffusers folder or Hub id with SD3's or SD2's layout, a `TSDSRPipeline` folder, or "embedded". Its `vae`
            is loaded, and its text encoders where there are captions.
        folder: photographs, with captions as `Folder` finds them.
        output_dir: where shards go; made if absent.
        resolution: side of the crops, pixels; a multiple of what one latent covers.
        crops: crops of each photograph, at random places. One that is just as large as a crop gives one.
        seed: of the places; 0 or more.
        samples_per_shard: crops in a shard.
        dtype: "fp16" or "fp32", of what is stored. The VAE itself always runs in fp32.
        use_shift_factor: whether the VAE's shift factor is taken off the latents first; None for what the model's
            `model_index.json` says, which means no where it says nothing.
        batch_size: crops that are encoded at once.
        num_workers: processes that read and cut; 0 does it in this one.
        device: "auto", or a torch device.
        part: number of this process, from 0 to `parts` - 1; it writes every `parts`-th shard.
        parts: number of processes.
        targets: store them; `model` is then a whole one-step model, and runs once for each crop.
        scale: how many times smaller the degraded pictures are.
        progress: called with the number of photographs done and their total.

    Raises:
        ValueError: for an argument that cannot be used, a folder without (usable) photographs, or an `output_dir` that
            was prepared with other settings.
        OSError: if the model cannot be found, or the shards cannot be written.
    """
    for name, value in (
        ("resolution", resolution),
        ("crops", crops),
        ("samples_per_shard", samples_per_shard),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
    if min(seed, num_workers) < 0:
        raise ValueError("seed and num_workers must be at least 0.")
    if not 0 <= part < parts:
        raise ValueError(f"part must be within 0..{parts - 1}, not {part}.")
    if dtype not in ("fp16", "fp32"):
        raise ValueError(f"dtype must be fp16 or fp32, not {dtype!r}.")
    if targets and (scale < 1 or resolution % scale):
        raise ValueError(f"resolution ({resolution}) must be a multiple of scale ({scale}).")
    output_dir, target = Path(output_dir), choose_device(device)
    source = Folder(folder)
    captions = [source.caption(index) for index in range(len(source))]
    name = str(EMBEDDED if model == "embedded" else model)
    vae, shift = _load_vae(name, use_shift_factor)
    factor = 2 ** (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)
    if resolution % factor:
        raise ValueError(f"resolution must be a multiple of {factor}, the pixels of one latent, not {resolution}.")
    teacher = OneStepModel.load(model) if targets else None
    if teacher is not None and resolution % teacher.size_multiple:
        raise ValueError(f"resolution must be a multiple of {teacher.size_multiple} for {model}, not {resolution}.")

    result = Prepared(captions=sum(caption is not None for caption in captions))
    encode_text = load_text_encoder(name, device=target) if result.captions else None
    result.embedded = encode_text is not None
    listing = json.dumps([[path.name, caption] for path, caption in zip(source.paths, captions, strict=True)])
    settings = {
        "resolution": resolution,
        "crops": crops,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
        "dtype": dtype,
        "shift_factor": shift,
        "embedded_captions": result.embedded,
        "photographs": len(source),
        # Two folders or models of one name must not be mixed.
        "photographs_sha256": hashlib.sha256(listing.encode()).hexdigest()[:16],
        "vae_sha256": vae_fingerprint(vae),
    }
    if teacher is not None:
        settings |= {"targets": True, "scale": scale, "teacher_sha256": teacher.fingerprint()}
    facts = {"format": 1, "model": str(model), "settings": settings}
    _open_output(output_dir, facts)
    null_prompt = output_dir / NULL_PROMPT_FILE
    if encode_text is not None and not null_prompt.is_file():
        _write_whole(null_prompt, save(_embed(encode_text, [""], DTYPES[dtype])[0]))

    work: list[_Task] = []
    total_shards = -(-len(source) * crops // samples_per_shard)
    for shard in range(part, total_shards, parts):
        if (output_dir / f"{_shard_name(shard)}.tar").is_file():
            result.kept += 1
        else:
            first = shard * samples_per_shard
            last = min(first + samples_per_shard, len(source) * crops) - 1
            for photograph in range(first // crops, last // crops + 1):
                numbers = range(max(first, photograph * crops), min(last + 1, (photograph + 1) * crops))
                work.append(_Task(shard, photograph, numbers, last=photograph == last // crops))

    vae.to(target)
    if teacher is not None:
        teacher.to(target)

    @torch.no_grad()
    def encode(pixels: Tensor, numbers: list[int]) -> dict[str, Tensor]:
        """What is stored of crops (B, 3, s, s) uint8: for each name a tensor whose first dimension is B."""
        encoded = vae.encode(pixels.to(target).float() / 127.5 - 1)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        found = {"latents": (latents - shift) * vae.config.scaling_factor}
        if teacher is not None:
            lq = torch.cat([degrade_crop(one, number) for one, number in zip(pixels, numbers, strict=True)])
            enlarged = F.interpolate(lq.to(target), size=pixels.shape[-2:], mode="bicubic").clamp(0, 1) * 2 - 1
            found["lq_latents"] = teacher.lq_latents(enlarged)
            found["teacher_latents"] = teacher.restored(found["lq_latents"])
        found = {name: tensor.to(DTYPES[dtype]).cpu() for name, tensor in found.items()}
        if teacher is not None:
            found["lq"] = (lq * 255).round().to(torch.uint8)
        return found

    def degrade_crop(pixels: Tensor, number: int) -> Tensor:
        """(3, s, s) uint8 to (1, 3, s / scale, s / scale), 0..1, of 256 levels."""
        generator = draws(seed, DEGRADATION, number)
        with one_thread(True):  # as in training
            return degrade(pixels[None].float() / 255, generator, DegradationConfig(scale=scale))

    cutting = DataLoader(
        _Cuts(source, work, resolution, crops, seed),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # the global one stays as it is
    )
    begun = time.perf_counter()
    writer: _Shard | None = None
    try:
        for done, (task, cuts, reason) in enumerate(cutting, 1):
            if writer is None:
                writer = _Shard(output_dir, task.shard, DTYPES[dtype], batch_size, encode, encode_text)
            if reason is not None:
                writer.skipped.append((source.name(task.photograph), reason))
            for cut in cuts:
                writer.add(cut, source.name(task.photograph), captions[task.photograph])
            if task.last:
                written = writer.finish()
                result.samples += written
                result.shards += written > 0
                # The crops of one photograph may lie in two shards.
                result.skipped = list(dict([*result.skipped, *writer.skipped]).items())
                writer = None
            if progress is not None:
                progress(done, len(work))
    finally:
        if writer is not None:
            writer.discard()
    if result.samples:
        result.images_per_second = result.samples / (time.perf_counter() - begun)
    samples = _summarise(output_dir, facts, total_shards)
    if work and not result.samples and not samples:
        some = " ".join(reason for _, reason in result.skipped[:3])
        raise ValueError(f"None of the photographs in {folder} can be used: {some}")
    return result


def _load_vae(name: str, use_shift_factor: bool | None) -> tuple[Any, float]:
    """The VAE of a model, on the CPU in fp32, and the shift of its latents."""
    local = Path(name).exists()
    if local and not (Path(name) / "model_index.json").is_file():
        raise ValueError(f"{name} is not a model folder in diffusers' layout (it has no model_index.json).")
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise ValueError(f"{name!r} is neither a folder nor a Hub id of the form owner/name.")
    index = DiffusionPipeline.load_config(name, local_files_only=local)
    kind = (index.get("vae") or [None, None])[1]
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if kind not in kinds:
        raise ValueError(f"The VAE of {name} is {kind or 'missing'}; {' and '.join(kinds)} can be used.")
    vae = kinds[kind].from_pretrained(name, subfolder="vae", torch_dtype=torch.float32, local_files_only=local).eval()
    if use_shift_factor is None:
        use_shift_factor = bool(index.get("use_shift_factor", False))
    return vae, (vae.config.get("shift_factor") or 0.0) if use_shift_factor else 0.0


def vae_fingerprint(vae: Any) -> str:
    """16 letters that differ for VAEs whose latents differ; of one on the CPU in float32."""
    digest = hashlib.sha256(repr(vae.config.scaling_factor).encode())
    for key, tensor in sorted(vae.state_dict().items()):
        if key.startswith(("encoder", "quant_conv")):
            digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _open_output(output_dir: Path, facts: dict[str, Any]) -> None:
    """Make the folder, or check that what it holds was made with the same settings."""
    file = output_dir / DATASET_FILE
    if not file.is_file():
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ValueError(f"{output_dir} is no empty folder, and was not written by `tsdsr prepare`; name another.")
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_whole(file, json.dumps(facts, indent=1).encode())
        return
    try:
        before = json.loads(file.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged; delete {output_dir} and prepare it again.") from error
    now = facts["settings"]
    changed = [
        f"{name} {before.get(name)}, not {now.get(name)}"
        for name in (*now, *(name for name in before if name not in now))
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{output_dir} was prepared with other settings ({'; '.join(changed)}); use the same, or another folder."
        )


def _summarise(output_dir: Path, facts: dict[str, Any], total_shards: int) -> int:
    """Write counts and skipped photographs of all shards, other processes' too, to `dataset.json`; returns samples."""
    samples, whole = 0, 0
    skipped: dict[str, str] = {}
    for file in sorted(output_dir.glob("shard-*.json")):
        index = json.loads(file.read_text("utf-8"))
        skipped.update(index["skipped"])
        if file.with_suffix(".tar").is_file():
            samples, whole = samples + len(index["samples"]), whole + 1
    counts = {"samples": samples, "shards": whole, "total_shards": total_shards, "skipped": sorted(skipped.items())}
    _write_whole(output_dir / DATASET_FILE, json.dumps({**facts, **counts}, indent=1, ensure_ascii=False).encode())
    return samples


def _embed(encode: TextEncoder, captions: list[str], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The embeddings of each caption, as they are stored."""
    found = []
    for first in range(0, len(captions), _TEXT_BATCH):
        embeds, pooled = encode(captions[first : first + _TEXT_BATCH])
        for index in range(len(embeds)):
            tensors = {"prompt_embeds": embeds[index : index + 1]}
            if pooled is not None:
                tensors["pooled_prompt_embeds"] = pooled[index : index + 1]
            found.append({name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()})
    return found


@dataclass(frozen=True)
class _Task:
    """The crops of one photograph that go into one shard; `numbers` counts the crops of the whole folder."""

    shard: int
    photograph: int
    numbers: range
    last: bool


@dataclass
class _Cut:
    """One crop: its number, box (left, top, right, bottom), pixels (3, s, s) uint8, and these as a PNG file."""

    number: int
    box: tuple[int, int, int, int]
    pixels: Tensor
    png: bytes


class _Cuts(Dataset):
    """Item i is task i, its crops, and the reason why there are none."""

    def __init__(self, source: Folder, work: list[_Task], resolution: int, crops: int, seed: int):
        self.source, self.work, self.resolution, self.crops, self.seed = source, work, resolution, crops, seed

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, index: int) -> tuple[_Task, list[_Cut], str | None]:
        task, size = self.work[index], self.resolution
        try:
            picture = self.source[task.photograph].hq
        except UnreadableImage as error:
            return task, [], str(error)
        height, width = picture.shape[1:]
        if min(height, width) < size:
            name = self.source.name(task.photograph)
            return task, [], f"{name} is {width}x{height} pixels, smaller than crops of {size}x{size}."
        numbers = list(task.numbers)
        if (height, width) == (size, size):
            # All crops would be the same; the first one stands for them.
            numbers = [number for number in numbers if number % self.crops == 0]
        return task, [self._cut(picture, number) for number in numbers], None

    def _cut(self, picture: Tensor, number: int) -> _Cut:
        size = self.resolution
        generator = draws(self.seed, PLACES, number)
        top, left = (draw(side - size + 1, generator) for side in picture.shape[1:])
        pixels = picture[:, top : top + size, left : left + size].contiguous()
        with tempfile.TemporaryDirectory() as folder:
            rgb = pixels.permute(1, 2, 0).numpy().astype(np.float32) / 255
            png = write(Picture(rgb), Path(folder) / "crop.png").read_bytes()
        return _Cut(number, (left, top, left + size, top + size), pixels, png)


def _as_it_is(item: Any) -> Any:
    return item


class _Shard:
    """One shard on its way into the folder: a temporary file until `finish`.

    Args:
        output_dir: where it goes.
        number: of the shard.
        dtype: of embeddings.
        batch_size: crops that are encoded at once.
        encode: pixels (B, 3, s, s) uint8, and numbers of the crops, to what is stored of them.
        encode_text: captions to embeddings, None to keep them as text only.
    """

    def __init__(
        self,
        output_dir: Path,
        number: int,
        dtype: torch.dtype,
        batch_size: int,
        encode: Callable[[Tensor, list[int]], dict[str, Tensor]],
        encode_text: TextEncoder | None,
    ):
        self.final = output_dir / f"{_shard_name(number)}.tar"
        for left_over in output_dir.glob(f".{self.final.name}.*"):  # by a process that was killed
            left_over.unlink()
        self.skipped: list[tuple[str, str]] = []
        self._temporary = output_dir / f".{self.final.name}.{uuid.uuid4().hex}"
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  (closed by finish)
        self._dtype, self._batch_size = dtype, batch_size
        self._encode, self._encode_text = encode, encode_text
        self._waiting: list[tuple[_Cut, str, str | None]] = []
        self._captions: dict[str, None] = {}

    def add(self, cut: _Cut, source: str, caption: str | None) -> None:
        """Take one crop of the photograph `source`."""
        self._waiting.append((cut, source, caption))
        if caption is not None:
            self._captions[caption] = None
        if len(self._waiting) == self._batch_size:
            self._encode_waiting()

    def _encode_waiting(self) -> None:
        if not self._waiting:
            return
        cuts = [cut for cut, *_ in self._waiting]
        found = self._encode(torch.stack([cut.pixels for cut in cuts]), [cut.number for cut in cuts])
        for index, (cut, source, caption) in enumerate(self._waiting):
            tensors = {name: tensor[index].contiguous() for name, tensor in found.items()}
            facts = {"caption": caption, "source": source, "box": cut.box}
            self._member(f"{cut.number:08d}.png", cut.png)
            self._member(f"{cut.number:08d}.json", json.dumps(facts, ensure_ascii=False).encode())
            self._member(f"{cut.number:08d}.safetensors", save(tensors))
        self._waiting = []

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def finish(self) -> int:
        """Give the shard its name; returns its number of samples. One without any stays without."""
        self._encode_waiting()
        if self._encode_text is not None:
            captions = list(self._captions)
            for caption, tensors in zip(captions, _embed(self._encode_text, captions, self._dtype), strict=True):
                self._member(f"{prompt_key(caption)}.prompt.safetensors", save(tensors))
        self._tar.close()
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        prompts: dict[str, tuple[int, int]] = {}
        with tarfile.open(self._temporary) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                place = member.offset_data, member.size
                if kind == "prompt.safetensors":
                    prompts[key] = place
                else:
                    samples.setdefault(key, {})[kind] = place
        index = {"samples": samples, "prompts": prompts, "skipped": self.skipped}
        # First the index: where there is a shard, there is one.
        _write_whole(self.final.with_suffix(".json"), json.dumps(index, ensure_ascii=False).encode())
        if samples:
            os.replace(self._temporary, self.final)
        else:
            self.discard()
        return len(samples)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._tar.close()
        self._temporary.unlink(missing_ok=True)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
