"""How a pipeline is read from other files than its own, saved, and uploaded."""

import json
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


def of_package(module: str) -> ModuleType:
    """A module beside this one that running a model does not need, which code saved with a model therefore lacks.

    Raises:
        ImportError: if this is such code.
    """
    try:
        return import_module(module, __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}{module}":
            raise
        raise ImportError("This needs the package tsdsr itself; here is only its code that runs a model.") from error


def _drop_unexpected(config: Path) -> None:
    """AutoencoderTiny saves a value that its own loader then warns of."""
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if "encoder_block_out_channels" in values and values.pop("block_out_channels", None):
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class TSDSRSavingMixin:
    """Loading and saving beyond what `DiffusionPipeline` has."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """As diffusers reads it; the code that a folder may carry is for those without this package."""
        config = super()._dict_from_json_file(json_file)  # type: ignore[misc]
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]
        return config

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """A pipeline over the SD3 networks of one file, as ComfyUI's users have it; a local file needs no network.

        The transformer and the VAE are the file's. A text encoder of the file is loaded where its tokenizer is given.

        Args:
            pretrained_model_link_or_path: `sd3_medium.safetensors` or its like, or a link to one on the Hub.
            kwargs: `dtype`, one or a dictionary by component; components that replace the file's (`vae`,
                `prompt_embeddings`, `tokenizer`, ...); `config`, a local diffusers folder with tokenizers;
                `use_shift_factor`, `timestep`, `grain`, `degrid`; for a link `cache_dir`, `revision`, `token`,
                `local_files_only`.

        Raises:
            ValueError: if the file holds no SD3 transformer, or is damaged.
            TypeError: for other arguments.
        """
        return of_package(".single_file").from_single_file(cls, pretrained_model_link_or_path, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, include_code: bool = False, **kwargs: Any
    ) -> None:
        """As diffusers saves pipelines.

        Args:
            save_directory: the folder.
            args, kwargs: as in diffusers: `safe_serialization`, `variant`, `max_shard_size`; with `push_to_hub` also
                those of the method of this name.
            include_code: put the Python code beside the weights, so that `DiffusionPipeline.from_pretrained(folder,
                trust_remote_code=True)` loads the folder where this package is not installed.

        Raises:
            ValueError: if LoRAs are loaded beside the weights.
        """
        for name in ("transformer", "unet", "vae"):
            if getattr(getattr(self, name), "peft_config", None):
                raise ValueError(
                    f"LoRAs lie beside the weights of `{name}`, and a folder saved so could not be loaded: call "
                    "`fuse_lora()` and `unload_lora_weights()` first, or save the LoRAs with `save_lora_adapter`."
                )
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", Path(save_directory).name)
        to_hub = {
            name: kwargs.pop(name) for name in ("commit_message", "private", "token", "create_pr") if name in kwargs
        }
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        _drop_unexpected(Path(save_directory) / "vae" / "config.json")
        if include_code:
            of_package(".remote_code").write_code(Path(save_directory))
        if push:
            self.push_to_hub(repo_id, include_code=include_code, variant=kwargs.get("variant"), **to_hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the pipeline with a whole model card, weights as safetensors only.

        Args:
            repo_id: `owner/name` or `name`; made where it does not exist.
            kwargs: `private`, `token`, `commit_message`, `create_pr`, `variant` as in diffusers, and `include_code` as
                in `save_pretrained`.

        Returns:
            The address of what was uploaded.
        """
        return of_package(".hub").push_pipeline(self, repo_id, **kwargs)
