"""A trained student as files that diffusers, ComfyUI and the Hub take as they are."""

import copy
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..models.licences import licence_of
from ..pipelines import model_card
from ..pipelines.folders import whole_folder
from ..pipelines.loading import DTYPES
from ..pipelines.pipeline_tsdsr import TSDSRPipeline
from .base import EMBEDDING_FILES, Base
from .config import ConfigError, DistillConfig, reason
from .methods import METHODS
from .networks import STUDENT, Networks, SharedBase

LORA_DIR, PIPELINE_DIR = "lora", "pipeline"


def pipeline_of(
    base: Base, networks: Networks, denoiser: Any, vae: Any, grain: float = 0.0, degrid: float = 0.0
) -> TSDSRPipeline:
    """The pipeline over these networks, as they are; or over a copy that reads the LQ picture once."""
    if base.family.conditioned:
        if denoiser is networks.network:  # with adapters on it
            weights = next(denoiser.parameters())
            denoiser = merged(networks.denoiser, weights.dtype).to(weights.device)
        denoiser = without_condition(denoiser, base.family.input_scale)
    pipeline = TSDSRPipeline(
        vae=vae,
        **{base.family.component: denoiser},
        scheduler=base.family.pipeline_scheduler,
        prompt_embeddings=base.prompt,
        use_shift_factor=bool(networks.shift),
        timestep=base.family.timestep,
        grain=grain,
        degrid=degrid,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def without_condition(network: Any, scale: float) -> Any:
    """A student that reads the same latents twice, as one that reads them once.

    Its first layer is linear: W [scale z, z] = (scale W_1 + W_2) z.

    Args:
        network: an SD3 transformer or a UNet, of twice as many channels as the latents have.
        scale: of the first half.
    """
    name = "pos_embed.proj.weight" if hasattr(network, "pos_embed") else "conv_in.weight"
    weights = network.state_dict()
    first, second = weights[name].float().chunk(2, dim=1)
    weights[name] = (scale * first + second).to(weights[name].dtype)
    plain = type(network).from_config({**network.config, "in_channels": first.shape[1]})
    plain.load_state_dict(weights)
    return plain.to(weights[name].device, weights[name].dtype)


@torch.no_grad()
def merged(shared: SharedBase, dtype: torch.dtype) -> Any:
    """The student's network as a plain one on the CPU: weights and LoRA are added in float32, then cast."""
    if shared.own_student is not None:
        return copy.deepcopy(shared.own_student).to("cpu", dtype)
    network = shared.network
    weights: dict[str, Tensor] = {}
    layers = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, tensor in network.state_dict().items():
        if ".lora_" in name:
            continue
        owner = next((layer for layer in layers if name.startswith(f"{layer}.base_layer.")), None)
        if owner is None:
            weights[name] = tensor.to("cpu", dtype) if tensor.is_floating_point() else tensor.cpu()
            continue
        kind = name.removeprefix(f"{owner}.base_layer.")
        value = tensor.float()
        if kind == "weight" and STUDENT in layers[owner].lora_A:
            value = value + layers[owner].get_delta_weight(STUDENT).float()
        weights[f"{owner}.{kind}"] = value.to("cpu", dtype)
    plain = type(network).from_config(network.config).to(dtype)
    plain.load_state_dict(weights)
    return plain


def lora_of(shared: SharedBase) -> tuple[dict[str, Tensor], PeftConfig] | None:
    """The student's LoRA on the CPU in float32, by its names in the network, and its settings; None without one."""
    if STUDENT not in shared.names:
        return None
    layers = get_peft_model_state_dict(shared.network, adapter_name=STUDENT)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in layers.items()}
    return weights, shared.network.peft_config[STUDENT]


def export(
    networks: Networks,
    base: Base,
    config: DistillConfig,
    base_name: str,
    metrics: dict[str, Any],
    output_dir: Path,
    facts: dict[str, str],
) -> None:
    """Write `lora/` and `pipeline/` as `config.output` asks for, each with a model card; whole, or not there.

    `lora/` holds pytorch_lora_weights.safetensors, the prompt as a component and, for SD3 with both LoRAs, the four
    files of the published layout, which ComfyUI's loader and `tsdsr convert` take.

    Raises:
        OSError: if they cannot be written.
    """
    title = (config.hub_model_id or output_dir.resolve().name).rsplit("/", 1)[-1]
    if config.output in ("lora", "both"):
        with whole_folder(output_dir / LORA_DIR) as folder:
            _write_lora(networks, base, folder)
            _write_card(folder, title, "lora", config, base, base_name, metrics, facts)
    if config.output in ("merged", "both"):
        dtype = DTYPES.get(config.output_dtype or "", next(networks.network.parameters()).dtype)  # of what is frozen
        with whole_folder(output_dir / PIPELINE_DIR) as folder:
            prompt = copy.deepcopy(base.prompt).to("cpu", dtype)
            plain = Base(base.family, merged(networks.denoiser, dtype), merged(networks.codec, dtype), prompt, None)
            pipeline_of(plain, networks, plain.denoiser, plain.vae, config.grain, config.degrid).save_pretrained(folder)
            _write_card(folder, title, "merged", config, base, base_name, metrics, facts)


def _write_lora(networks: Networks, base: Base, folder: Path) -> None:
    component = base.family.component
    found = {component: lora_of(networks.denoiser), "vae": lora_of(networks.codec)}
    loras = {side: lora for side, lora in found.items() if lora is not None}
    arguments: dict[str, Any] = {f"{side}_lora_layers": layers for side, (layers, _) in loras.items()}
    arguments |= {f"{side}_lora_adapter_metadata": settings.to_dict() for side, (_, settings) in loras.items()}
    TSDSRPipeline.save_lora_weights(folder, **arguments)
    prompt = copy.deepcopy(base.prompt).to("cpu", torch.float32)
    prompt.save_pretrained(folder / "prompt_embeddings")
    if loras.keys() == {"transformer", "vae"}:
        for side, (layers, _) in loras.items():  # both sides have the prefix `transformer.` there
            save_file(
                {f"transformer.{name}": tensor for name, tensor in layers.items()}, folder / f"{side}.safetensors"
            )
        tensors = (prompt.prompt_embeds.detach(), prompt.pooled_prompt_embeds.detach())
        for stem, tensor in zip(EMBEDDING_FILES, tensors, strict=True):
            save_file({stem: tensor.contiguous()}, folder / f"{stem}.safetensors")


def _commit() -> str:
    """Of the package's repository, where it is one."""
    root = str(Path(__file__).resolve().parent.parent)
    try:
        found = subprocess.run(
            # Its own .git and no other: installed, the package may lie inside somebody else's repository.
            ["git", "-C", root, "--git-dir", ".git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return f"tsdsr {__version__}"
    return f"tsdsr {__version__}, commit {found.stdout.strip()}"


def _write_card(
    folder: Path,
    title: str,
    kind: str,
    config: DistillConfig,
    base: Base,
    base_name: str,
    metrics: dict[str, Any],
    facts: dict[str, str],
) -> None:
    local = Path(base_name).exists()
    shown_base = Path(base_name).name if local else base_name
    licence = licence_of(Path(base_name), dict(base.denoiser.config))
    settings = config.to_dict()
    for name in ("train_data_dir", "train_lq_dir", "validation_dir", "validation_lq_dir", "output_dir"):
        if settings.get(name):  # a card travels; the folders of the machine it was made on do not
            settings[name] = Path(settings[name]).name
    for name in (
        "pretrained_model_name_or_path",
        "prompt_embeds",
        "null_prompt_embeds",
        "teacher_lora",
        "initial_student",
        "dataset_name",
    ):
        if settings.get(name) and Path(settings[name]).exists():
            settings[name] = Path(settings[name]).name
    if settings.get("data_files"):
        settings["data_files"] = [Path(file).name if Path(file).is_absolute() else file for file in config.data_files]
    for name in ("resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo", "report_to"):
        settings.pop(name, None)
    place = config.hub_model_id or title
    # Beside a pipeline the LoRA is uploaded as a folder of its repository.
    inside = "lora" if kind == "lora" and config.push_to_hub and config.output == "both" else ""
    trained = "LoRA" if config.train_type == "lora" else "all weights"
    used = dict.fromkeys(phase.objective for phase in config.phases)
    methods = ", then ".join(f"{METHODS[name].title}'s method ({METHODS[name].paper})" for name in used)
    made = "ready pairs" if config.train_lq_dir else "degraded on the fly (second-order Real-ESRGAN)"
    model_card.write_card(
        folder,
        title,
        f"One-step diffusion upscaler for photographs, distilled with {methods}\nby {_commit()}.",
        [
            f"Base: `{shown_base}`",
            f"Trained: {trained} of the {base.family.component}; VAE encoder: {config.vae_encoder}"
            + ("; VAE decoder: full" if config.vae_decoder == "full" else ""),
            f"Data: {facts['photographs']}, {made}",
        ],
        model_card.usage(place, base=shown_base if kind == "lora" else None, subfolder=inside, scale=config.scale),
        model_card.front_matter(licence, None if local else base_name, lora=kind == "lora"),
        "The licence of the base model applies to these weights as well; see its own card.",
        results=model_card.results(metrics, facts.get("validation", "the validation photographs"))
        or "Not measured: the run had no validation photographs.",
        training=model_card.training(settings, config.recipe or "recipe.yaml"),
    )
    (folder / "training.json").write_text(json.dumps({"metrics": metrics, "settings": settings}, indent=1) + "\n")


@dataclass
class Hub:
    """The repository a run is uploaded to."""

    api: HfApi
    repo_id: str
    output: str

    @classmethod
    def prepare(cls, config: DistillConfig) -> "Hub":
        """Make the repository before training, so that what is wrong with it shows at once.

        Raises:
            ConfigError: without a login, a name or a network.
        """
        api = HfApi(token=config.hub_token)
        name = config.hub_model_id or Path(config.output_dir).resolve().name
        try:
            repo_id = api.create_repo(name, exist_ok=True, private=config.hub_private_repo).repo_id
        except Exception as error:  # without a network: those of the HTTP library, another in each huggingface_hub
            raise ConfigError(
                f"push_to_hub: the repository {name} cannot be made ({reason(error)}); log in with "
                "`hf auth login`, check hub_model_id and the network, or train without push_to_hub."
            ) from error
        return cls(api, repo_id, config.output)

    def upload(self, output_dir: Path) -> str:
        """Upload what was exported: the pipeline as the repository itself, the LoRA in it as `lora/`, or alone.

        Returns:
            The repository's address.

        Raises:
            OSError: if it cannot be uploaded; what was written stays.
        """
        folders = {PIPELINE_DIR: "", LORA_DIR: "lora"} if self.output == "both" else {}
        folders = folders or {LORA_DIR if self.output == "lora" else PIPELINE_DIR: ""}
        try:
            for folder, place in folders.items():
                self.api.upload_folder(
                    repo_id=self.repo_id, folder_path=output_dir / folder, path_in_repo=place or None
                )
        except Exception as error:  # as for `prepare`
            raise OSError(
                f"The result could not be uploaded to {self.repo_id} ({reason(error)}); it lies in "
                f"{output_dir}, and `hf upload` sends it later."
            ) from error
        return f"https://huggingface.co/{self.repo_id}"
