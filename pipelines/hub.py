"""A model as a repository of the Hugging Face Hub: the folder that is uploaded, and the upload."""

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import load_image, make_image_grid
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file

from ..models.headers import read_header, read_json
from ..models.licences import known_base, licence_of, read_front_matter
from ..models.one_step_sd3 import OneStepSD3Transformer2DModel
from ..models.prompt_embeddings import PromptEmbeddings
from . import model_card
from .folders import whole_folder
from .loading import LORA_FILE, choose_device
from .memory import is_out_of_memory
from .pipeline_tsdsr import TSDSRPipeline

# 128x128 pixels, damaged as in training, of a photograph from BuddiesOfBudgie/budgie-backgrounds, CC0-1.0.
SAMPLE = Path(__file__).with_name("sample.jpg")
_CREDIT = " Photograph: BuddiesOfBudgie/budgie-backgrounds, CC0-1.0."
# Longer sides of a user's sample are cropped: details are what the picture is for.
_SAMPLE_SIDE = 256
_PICTURE_BYTES = 500_000

# What belongs on the Hub. No pickles: loading one can run anything.
_FILES = (
    *("*.safetensors", "*.safetensors.index*.json", "*config.json"),
    *("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "tokenizer.model"),
)
_ROOT_FILES = (
    *("model_index.json", "README.md", "training.json", "training_log.jsonl"),
    *(f"{name}{suffix}" for name in ("LICENSE", "LICENCE", "NOTICE") for suffix in ("", ".md", ".txt")),
)
_WEIGHTLESS = re.compile("Scheduler|Tokenizer|Processor|Extractor")


def prepare_repository(
    source: str | Path,
    target: str | Path,
    repo_id: str,
    *,
    include_code: bool = False,
    samples: Sequence[str | Path] | None = None,
    overwrite: bool = False,
    pipeline: TSDSRPipeline | None = None,
) -> list[str]:
    """Write the folder that is uploaded: weights and configs as they are, and a model card. Whole, or not at all.

    Weights are safetensors alone: a component that has nothing but unsharded pickles is converted. A README.md of the
    source is completed, not replaced (`model_card.complete_card`).

    Args:
        source: pipeline folder (model_index.json) or LoRA folder (pytorch_lora_weights.safetensors).
        target: where the folder is written.
        repo_id: the repository's id, owner/name, for the code in the card.
        include_code: add the pipeline's code, for `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.
        samples: photographs to show before and after, in the middle 256 pixels of each side. By default the
            package's own where the card has no picture yet; () for none. A LoRA folder takes none, its base is absent.
        overwrite: replace a repository folder that is there; it goes only once the new one is whole.
        pipeline: the source where it is loaded already, to make the pictures with.

    Returns:
        The files, as paths in the repository, sorted.

    Raises:
        ValueError: if the source is no such folder or not whole, weights cannot be converted, or `repo_id` is none.
        OSError: if something cannot be read or written.
        MemoryError: if the model does not fit into memory to make pictures.
    """
    source, target = Path(source), Path(target)
    validate_repo_id(repo_id)
    is_pipeline = (source / "model_index.json").is_file()
    if not is_pipeline and not (source / LORA_FILE).is_file():
        raise ValueError(
            f"{source} is neither a pipeline folder (model_index.json) nor a LoRA folder ({LORA_FILE}); `tsdsr convert`"
            " makes a pipeline of published weights."
        )
    if not is_pipeline and samples:
        raise ValueError(f"{source} is a LoRA without its base, which cannot be run; leave the samples out.")
    if source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} is or contains the model itself; choose another folder.")
    if target.exists():
        if not overwrite:
            raise FileExistsError(f"{target} exists; choose another folder or allow overwriting.")
        ours = ("model_index.json", LORA_FILE)
        if not target.is_dir() or (any(target.iterdir()) and not any((target / name).is_file() for name in ours)):
            raise FileExistsError(f"{target} holds something other than a model and is not overwritten; move it.")

    with whole_folder(target) as folder:
        if is_pipeline:
            _write_pipeline(source, folder, repo_id, include_code, samples, pipeline)
        else:
            _write_lora(source, folder, repo_id)
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a folder as it is into a repository, which is made if there is none.

    Args:
        folder: as `prepare_repository` writes it.
        repo_id: owner/name, or a name in the account that the token belongs to.
        private: visibility of a new repository; None is the account's default.
        token: by default the one that `hf auth login` stored.
        commit_message: of the commit.
        create_pr: open a pull request instead of a commit to the main branch.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        OSError: one sentence, without a login, the right to write, or a network.
    """
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model",
            create_pr=create_pr,
        )
    except Exception as error:  # without a network: those of the HTTP library, another in each huggingface_hub
        raise _upload_error(repo_id, error) from error
    return commit.pr_url or str(repository)


def full_repo_id(repo_id: str, token: str | None = None) -> str:
    """owner/name of a repository; a name alone belongs to the account of the token.

    Raises:
        ValueError: if it is no name for a repository.
        OSError: one sentence, if the account cannot be asked for.
    """
    validate_repo_id(repo_id)
    if "/" in repo_id:
        return repo_id
    try:
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"
    except Exception as error:  # as for `push`
        raise _upload_error(repo_id, error) from error


def push_pipeline(
    pipeline: TSDSRPipeline,
    repo_id: str,
    *,
    include_code: bool = False,
    samples: Sequence[str | Path] | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    safe_serialization: bool = True,
    variant: str | None = None,
    subfolder: str | None = None,
) -> str:
    """Upload a pipeline that is in memory, as `push_to_hub` of diffusers does it, with a whole model card.

    The card and the training record of the local folder that it was loaded from go along. The arguments are those of
    `prepare_repository`, `push` and diffusers' `push_to_hub`.

    Returns:
        The address of the repository, or of the pull request.

    Raises:
        ValueError: for pickles, a subfolder, which no pipeline can be loaded from, and what cannot be saved.
        OSError: one sentence, if it cannot be uploaded.
    """
    if not safe_serialization:
        raise ValueError("Weights are uploaded as safetensors alone; leave `safe_serialization` out.")
    if subfolder:
        raise ValueError("A pipeline is a repository of its own; leave `subfolder` out.")
    repo_id = full_repo_id(repo_id, token)
    with tempfile.TemporaryDirectory() as scratch:
        saved, folder = Path(scratch, "saved"), Path(scratch, "repository")
        pipeline.save_pretrained(saved, variant=variant)
        origin = getattr(pipeline.config, "_name_or_path", None)
        if origin and Path(origin, "model_index.json").is_file():
            _copy(Path(origin), saved, [name for name in _ROOT_FILES if name != "model_index.json"])
            _copy_shown_pictures(Path(origin), saved)
        prepare_repository(saved, folder, repo_id, include_code=include_code, samples=samples, pipeline=pipeline)
        return push(folder, repo_id, private=private, token=token, commit_message=commit_message, create_pr=create_pr)


def _upload_error(repo_id: str, error: Exception) -> OSError:
    said = getattr(error, "server_message", None) or str(error)
    line = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
    reason = line.split(". ")[0].rstrip(".")
    return OSError(
        f"{repo_id} could not be uploaded ({reason}); log in with `hf auth login`, and check the name, your"
        " right to write there and the network."
    )


# --- the folder -----------------------------------------------------------------------------------------------------


def _write_pipeline(
    source: Path,
    folder: Path,
    repo_id: str,
    include_code: bool,
    samples: Sequence[str | Path] | None,
    pipeline: TSDSRPipeline | None,
) -> None:
    index = read_json(source / "model_index.json", "the index of a pipeline")
    class_name = index.get("_class_name")
    # A repository that carries code names its module too.
    include_code = include_code or isinstance(class_name, list)
    if "TSDSRPipeline" not in (class_name, *(class_name if isinstance(class_name, list) else ())):
        raise ValueError(
            f"{source} is a {class_name}, not a TSDSRPipeline; `tsdsr convert` makes one of published weights."
        )
    parts = {
        name: entry[1]
        for name, entry in index.items()
        # An identifier, as an argument of the pipeline is: no path that leads elsewhere.
        if isinstance(entry, list) and entry[0] is not None and name.isidentifier() and not name.startswith("_")
    }
    _copy(source, folder, (*_ROOT_FILES, *_FILES))
    for name, of_class in parts.items():
        if not (source / name).is_dir():
            raise ValueError(f"{source / name} is missing, which model_index.json names; download the model again.")
        _copy(source / name, folder / name, _FILES)
        if not _WEIGHTLESS.search(of_class):
            _require_weights(source / name, folder / name)
    baked = parts.get("transformer") == OneStepSD3Transformer2DModel.__name__
    prompted = baked or "prompt_embeddings" in parts
    plain = {name: value for name, value in index.items() if name != "_name_or_path"}
    plain["_class_name"] = "TSDSRPipeline"
    if "prompt_embeddings" in parts:
        # The library under which diffusers finds the class on the Hub; earlier versions saved another.
        plain["prompt_embeddings"] = [PromptEmbeddings.__module__, PromptEmbeddings.__name__]
    if plain != index:
        (folder / "model_index.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")

    denoiser = "unet" if "unet" in parts else "transformer"
    config = read_json(folder / denoiser / "config.json", "the config of the network")
    record = _training_record(folder)
    variant = _only_variant([folder / name for name in parts])
    has_lora = (folder / LORA_FILE).is_file()
    card = folder / "README.md"
    _copy_shown_pictures(source, folder)
    if samples is None and card.is_file() and model_card.shown_pictures(card):
        samples = ()
    pictures = ""
    if samples is None or samples:
        pictures = _before_after(pipeline or _load(folder, variant, has_lora), folder, samples, prompted)
    base_model = _base_on_hub(record) or known_base(config)
    data = model_card.front_matter(licence_of(folder, config), base_model)
    use = model_card.usage(repo_id, prompt_embeddings=prompted, lora=has_lora, variant=variant, with_code=include_code)
    if card.is_file():
        model_card.complete_card(card, repo_id, data, use, pictures)
    else:
        facts = [model_card.base_fact(base_model, "")] if base_model else []
        facts += [_network_fact(folder, name, parts[name]) for name in (denoiser, "vae")]
        facts += [model_card.lora_fact(_ranks(folder), model_card.LORA_BESIDE)] if has_lora else []
        facts += [model_card.BAKED_FACT if baked else model_card.PROMPT_FACT] if prompted else []
        about = f"One-step diffusion upscaler for photographs, of TSD-SR's family ({model_card.PAPER}), for diffusers."
        _write_card(folder, repo_id, about, facts, use, data, record, pictures)
    if include_code:
        from .remote_code import write_code

        write_code(folder)


def _write_lora(source: Path, folder: Path, repo_id: str) -> None:
    _copy(source, folder, (*_ROOT_FILES, *_FILES))
    prompted = (source / "prompt_embeddings").is_dir()
    if prompted:
        _copy(source / "prompt_embeddings", folder / "prompt_embeddings", _FILES)
        _require_weights(source / "prompt_embeddings", folder / "prompt_embeddings")
    _copy_shown_pictures(source, folder)
    record, card = _training_record(folder), folder / "README.md"
    stated = read_front_matter(folder).get("base_model")
    base_model = stated if isinstance(stated, str) else _base_on_hub(record)
    base = base_model or record["settings"].get("pretrained_model_name_or_path")
    data = model_card.front_matter(licence_of(folder, {}), base_model, lora=True)
    use = model_card.usage(repo_id, base=base or "BASE", prompt_embeddings=prompted)
    if card.is_file():
        model_card.complete_card(card, repo_id, data, use)
        return
    facts = [*([model_card.base_fact(base_model, base)] if base else []), model_card.lora_fact(_ranks(folder))]
    about = f"LoRA that makes its base a one-step upscaler for photographs, of TSD-SR's family ({model_card.PAPER})."
    _write_card(folder, repo_id, about, facts, use, data, record)


def _write_card(
    folder: Path,
    repo_id: str,
    about: str,
    facts: list[str],
    use: str,
    data: dict[str, Any],
    record: dict[str, dict],
    pictures: str = "",
) -> None:
    model_card.write_card(
        folder,
        repo_id.rsplit("/", 1)[-1],
        about,
        facts,
        use,
        data,
        pictures=pictures,
        results=model_card.results(record["metrics"]),
        training=model_card.training(record["settings"]) if record["settings"] else "",
    )


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of one folder that match; weights have to be whole, and configs forget where they once lay."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if not file.is_file() or not any(fnmatch(file.name, pattern) for pattern in patterns):
            continue
        copied = target / file.name
        shutil.copyfile(file, copied)
        if file.suffix == ".safetensors":
            read_header(file)
        elif file.name.endswith("config.json"):
            config = read_json(file, "a config")
            kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
            if kept != config:
                copied.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    for file in target.glob("*.safetensors.index*.json"):
        for shard in read_json(file, "the index of sharded weights").get("weight_map", {}).values():
            if not (target / shard).is_file():
                raise ValueError(f"{source / shard} is missing, which {file.name} names; download the model again.")


def _require_weights(source: Path, target: Path) -> None:
    """Convert the pickles of a component that has no other weights.

    Raises:
        ValueError: if it has no weights, or sharded pickles, or pickles of anything but tensors.
    """
    if any(target.glob("*.safetensors")):
        return
    pickles = sorted(source.glob("*.bin"))
    if not pickles:
        raise ValueError(f"{source} has no weights in safetensors format; download the model again.")
    for file in pickles:
        if re.search(r"-\d{5}-of-\d{5}", file.name):
            raise ValueError(
                f"{source} has its weights in several pickles; load the model and save it with `save_pretrained`, which"
                " writes safetensors."
            )
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
            # Copies, because safetensors takes no tensors that share memory.
            tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
        except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
            raise ValueError(f"{file} is not a pickle of named tensors; get the file in safetensors format.") from error
        # diffusion_pytorch_model[.fp16] keeps its name, transformers' pytorch_model[.fp16] becomes model[.fp16].
        name = file.name.removesuffix(".bin").removeprefix("pytorch_")
        save_file(tensors, target / f"{name}.safetensors", metadata={"format": "pt"})


def _copy_shown_pictures(source: Path, target: Path) -> None:
    card = source / "README.md"
    for name in model_card.shown_pictures(card) if card.is_file() else ():
        # Never what lies elsewhere on this disk. Links are left alone: in the Hub's cache all files are links.
        inside = os.path.relpath(source / name, source)
        if not inside.startswith("..") and (source / inside).is_file():
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / inside, target / inside)


def _only_variant(parts: list[Path]) -> str | None:
    """The variant without which some component has no weights: `fp16` of `diffusion_pytorch_model.fp16.safetensors`."""
    for part in parts:
        names = {re.sub(r"-\d{5}-of-\d{5}", "", file.name) for file in part.glob("*.safetensors")}
        variants = {".".join(name.split(".")[1:-1]) for name in names}
        if variants and "" not in variants:
            return min(variants)
    return None


# --- what the card says ---------------------------------------------------------------------------------------------


def _training_record(folder: Path) -> dict[str, dict]:
    """What training.json of the trainer says: {"metrics": ..., "settings": ...}, both empty without one."""
    found = read_json(folder / "training.json", "a training record") if (folder / "training.json").is_file() else {}
    return {name: found[name] if isinstance(found.get(name), dict) else {} for name in ("metrics", "settings")}


def _base_on_hub(record: dict[str, dict]) -> str | None:
    base = record["settings"].get("pretrained_model_name_or_path")
    return base if isinstance(base, str) and base.count("/") == 1 else None


def _ranks(folder: Path) -> dict[str, int]:
    """The largest rank of each component's LoRA, by the shapes (rank, ...) of its down projections."""
    ranks: dict[str, int] = {}
    for key, tensor in read_header(folder / LORA_FILE).tensors.items():
        if "lora_A" in key or "lora.down" in key:
            component = key.split(".", 1)[0]
            ranks[component] = max(ranks.get(component, 0), tensor.shape[0])
    return ranks


def _network_fact(folder: Path, name: str, of_class: str) -> str:
    tensors = {}
    for file in (folder / name).glob("*.safetensors"):
        tensors.update(read_header(file).tensors)
    types = sorted({tensor.dtype for tensor in tensors.values()})
    millions = sum(tensor.numel for tensor in tensors.values()) / 1e6
    return f"`{name}`: {of_class}, {millions:,.1f} M parameters, {' and '.join(types)}"


def _load(folder: Path, variant: str | None, has_lora: bool) -> TSDSRPipeline:
    pipeline = TSDSRPipeline.from_pretrained(str(folder), variant=variant, local_files_only=True)
    if has_lora:
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(choose_device())


def _before_after(pipeline: TSDSRPipeline, folder: Path, samples: Sequence[str | Path] | None, prompted: bool) -> str:
    """Write a picture for each sample, bicubic at the left, the model's at the right; the Markdown that shows them."""
    shown = []
    (folder / "images").mkdir(exist_ok=True)
    for number, sample in enumerate(samples or [SAMPLE], 1):
        photograph = load_image(str(sample))
        sides = [min(side, _SAMPLE_SIDE) for side in photograph.size]
        left, top = ((whole - side) // 2 for whole, side in zip(photograph.size, sides, strict=True))
        photograph = photograph.crop((left, top, left + sides[0], top + sides[1]))
        try:
            after = pipeline(photograph, prompt=None if prompted else model_card.PROMPT).images[0]
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError(
                    "There is not enough memory to make the before/after picture; leave it out."
                ) from error
            raise
        pair = make_image_grid([photograph.resize(after.size), after], 1, 2)  # `resize` is bicubic by default
        file = folder / "images" / f"before_after_{number}.jpg"
        for quality in (92, 75, 50, 25):
            pair.save(file, quality=quality)
            if file.stat().st_size < _PICTURE_BYTES:
                break
        width, height = photograph.size
        shown.append(
            "![Left: a small photograph, enlarged by bicubic interpolation. Right: the same, enlarged by this model.]"
            f"(images/{file.name})\n\n*Left: a photograph of {width}x{height} pixels, enlarged "
            f"{after.width / width:g} times (bicubic). Right: this model.{'' if samples else _CREDIT}*"
        )
    return "\n\n".join(shown)
