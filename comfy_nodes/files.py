"""Models where ComfyUI users keep them: found through `folder_paths`, so that extra_model_paths.yaml counts.

Names in the loader's lists are "embedded", "NAME" for a folder under models/tsdsr ("." for that folder itself),
"KIND/NAME" for the others (KIND is a folder type of ComfyUI: loras, checkpoints, diffusion_models, diffusers, vae),
always with forward slashes.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..checkpoints import CheckpointError, read_header
from ..checkpoints.layout import EMBEDDING_FILES, EMBEDDING_SUFFIXES, LORA_FILES

EMBEDDED = "embedded"
AUTOMATIC = "automatic"
KIND = "tsdsr"

# Listed among the host's folder types, so that extra_model_paths.yaml may name further folders of this kind.
folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))


@dataclass(frozen=True)
class Found:
    """A model in the loader's list."""

    name: str
    path: Path
    is_lora: bool


def models() -> list[Found]:
    """Pipeline folders and published LoRA folders under models/tsdsr, and LoRA folders under models/loras.

    A LoRA folder that lacks one of its two files is listed as well: what is missing is told when it is loaded.
    """
    found: dict[str, Found] = {}
    for kind, label in ((KIND, ""), ("loras", "loras/")):
        for root in _roots(kind):
            for folder in (root, *_folders(root)):
                name = label + folder.relative_to(root).as_posix()
                is_lora = any((folder / file).is_file() for file in LORA_FILES.values())
                is_pipeline = kind == KIND and (folder / "model_index.json").is_file()
                if name not in found and (is_lora or is_pipeline):
                    found[name] = Found(name, folder, is_lora and not is_pipeline)
    return [found[name] for name in sorted(found)]


def bases() -> list[str]:
    """Names of what may hold an SD3 transformer: safetensors files and diffusers folders."""
    return [*_names("checkpoints"), *_names("diffusion_models"), *_diffusers_folders()]


def vaes() -> list[str]:
    """Names of what may hold SD3's VAE by itself."""
    return _names("vae")


def model_path(name: str) -> Found | None:
    """The model of this name, or None where it is not there."""
    return next((model for model in models() if model.name == name), None)


def weights_path(name: str) -> Path | None:
    """The file or folder of a name of `bases` or `vaes`, or None where it is not there."""
    kind, _, rest = name.partition("/")
    # Names come from whoever may queue a prompt: they do not lead out of the host's folders.
    inside = bool(rest) and not Path(rest).is_absolute() and ".." not in Path(rest).parts
    return next((root / rest for root in _roots(kind) if inside and (root / rest).exists()), None)


def parts(lora: Path, base_model: str, vae: str) -> tuple[Path, Path, Path]:
    """Where the base, its VAE and the prompt's embeddings of a published LoRA lie.

    Args:
        lora: the LoRA's folder.
        base_model, vae: names of `bases` and `vaes`, or "automatic".

    Raises:
        CheckpointError: naming the folder that something has to be put into.
    """
    found = {}
    for what, name in (("base model", base_model), ("vae", vae)):
        if name != AUTOMATIC:
            found[what] = weights_path(name)
            if found[what] is None:
                raise CheckpointError(missing(name, what))
    base = found.get("base model") or find_base()
    return base, found.get("vae") or find_vae(base), find_embeddings(lora)


def find_base() -> Path:
    """The first SD3 transformer there is, names with "sd3" before others.

    Raises:
        CheckpointError: naming the folder to put one into, or what is wrong with the one that is there.
    """
    found = _first("transformer", bases())
    if isinstance(found, Path):
        return found
    raise CheckpointError(
        f"No SD3 base was found, and the TSD-SR LoRA needs one{found}; put sd3_medium.safetensors into"
        f" {_home('checkpoints')}, or its transformer alone into {_home('diffusion_models')}."
    )


def find_vae(base: Path) -> Path:
    """The base where it has a VAE, else the first VAE of SD3 there is, names with "sd3" before others.

    Raises:
        CheckpointError: naming the folder to put one into, or what is wrong with the one that is there.
    """
    if "vae" in _contents(base):
        return base
    found = _first("vae", [*_sd3_first(vaes()), *_sd3_first(bases())])
    if isinstance(found, Path):
        return found
    raise CheckpointError(
        f"No VAE of SD3 was found, and {base} holds none{found}; put SD3's VAE (16 latent channels) into"
        f" {_home('vae')}."
    )


def find_embeddings(lora: Path) -> Path:
    """The folder of the prompt's embeddings: the LoRA's own, or any under models/tsdsr and models/embeddings.

    Raises:
        CheckpointError: naming the folder to put them into.
    """
    roots = [root for kind in (KIND, "embeddings") for root in _roots(kind)]
    for folder in [lora, *(folder for root in roots for folder in (root, *_folders(root)))]:
        if all(
            any((folder / f"{stem}{suffix}").is_file() for suffix in EMBEDDING_SUFFIXES)
            for stem in EMBEDDING_FILES.values()
        ):
            return folder
    raise CheckpointError(
        f"The prompt's embeddings were not found; put prompt_embeds.pt and pool_embeds.pt of the TSD-SR release into"
        f" {lora}."
    )


def home() -> Path:
    """The folder models of ours belong into."""
    return _home(KIND)


def missing(name: str, what: str) -> str:
    """One sentence: what is not there, and into which folder it belongs."""
    kind, _, rest = name.partition("/")
    if what == "model" and kind != "loras":
        return (
            f"The model {name!r} is not there; put its folder into {_home(KIND)} (a pipeline folder with"
            " model_index.json, or the published transformer.safetensors and vae.safetensors), or choose embedded."
        )
    if what == "model":
        return (
            f"The LoRA {rest!r} is not there; put its folder, with transformer.safetensors and vae.safetensors, into"
            f" {_home('loras')}."
        )
    folder = _home(kind if kind in folder_paths.folder_names_and_paths else ("vae" if what == "vae" else "checkpoints"))
    return f"The {what} {rest or name!r} is not there; put it into {folder}, or choose {AUTOMATIC}."


def fingerprint(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of all files of these models: changes where one of them does."""
    files = (file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))))
    return tuple(
        (str(file), status.st_size, status.st_mtime_ns) for file in files if file.is_file() and (status := file.stat())
    )


def _roots(kind: str) -> list[Path]:
    """The host's folders of this kind; of ours also what lies beside its checkpoints, wherever these are."""
    known = folder_paths.folder_names_and_paths
    roots = [Path(root) for root in folder_paths.get_folder_paths(kind)] if kind in known else []
    if kind == KIND:
        roots = [*(root.parent / KIND for root in _roots("checkpoints")), *roots]
    return list(dict.fromkeys(roots))


def _home(kind: str) -> Path:
    # ComfyUI lists the older name of a folder first, and users' own folders behind or before it.
    roots = _roots(kind)
    return next((root for root in roots if root.name == kind and root.is_dir()), roots[0] if roots else Path(kind))


def _folders(root: Path, depth: int = 2) -> Iterator[Path]:
    """Folders below a root, nearest first by name; hidden ones (unfinished downloads) are not looked into."""
    if not root.is_dir():
        return
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            yield Path(entry.path)
            if depth > 1:
                yield from _folders(Path(entry.path), depth - 1)


def _names(kind: str) -> list[str]:
    files = (name.replace(os.sep, "/") for name in folder_paths.get_filename_list(kind))
    return [f"{kind}/{name}" for name in files if name.endswith(".safetensors")]


def _diffusers_folders() -> list[str]:
    """SD3 in diffusers' layout, wherever such a folder was put."""
    return [
        f"{kind}/{folder.relative_to(root).as_posix()}"
        for kind in ("diffusers", "checkpoints", "diffusion_models")
        for root in _roots(kind)
        for folder in _folders(root)
        if (folder / "transformer" / "config.json").is_file()
    ]


def _sd3_first(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: ("sd3" not in name.lower(), "medium" not in name.lower(), name))


def _first(side: str, names: list[str]) -> Path | str:
    """The first file or folder with this network; else a phrase on one that could not be read, or an empty one."""
    flaw = ""
    for name in _sd3_first(names):
        path = weights_path(name)
        try:
            if path is not None and side in _contents(path):
                return path
        except CheckpointError as error:
            flaw = flaw or f" ({str(error).rstrip('.').replace('; ', ', ')})"
    return flaw


def _contents(path: Path) -> set[str]:
    from ..checkpoints import holds  # imports diffusers

    if path.is_dir():
        return {side for side in ("transformer", "vae") if (path / side / "config.json").is_file()}
    return holds(read_header(path))
