"""Everything a compression can be told: sections of a recipe, one for each stage, and flags."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from ..config import ConfigError, DistillConfig, Phase, _read, typed_as
from ..losses import PIXEL_TERMS
from ..stage import Stage, section
from .baselines import BASELINES
from .masks import PARTNERS, Annealing, Group, even_groups

# In the order in which they are run.
STAGES = ("encoder", "decoder", "search", "prune", "restore", "refine", "bake")
# Settings of the trainer that mean the same here.
SHARED = (
    "train_data_dir",
    "train_lq_dir",
    "dataset_name",
    "dataset_config_name",
    "data_files",
    "image_column",
    "caption_column",
    "scale",
    "random_flip",
    "mild_degradation",
    "validation_photographs",
    "degrade_on",
    "dataloader_num_workers",
    "keep_photographs_gb",
    "seed",
    "gradient_checkpointing",
    "mixed_precision",
    "discriminator_kind",
    "discriminator_scales",
    "discriminator_model",
    "discriminator_width",
    "discriminator_layers",
    "discriminator_beta1",
    "adversarial_loss",
    "adversarial_balance",
    "r1_weight",
    "output_dir",
    "checkpointing_steps",
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
    "tracker_project_name",
)
# Of these a finished stage says what they were: another value would make another result.
DECISIVE = (
    "scale",
    "random_flip",
    "mild_degradation",
    "validation_photographs",
    "seed",
    "mixed_precision",
    "discriminator_kind",
    "discriminator_scales",
    "discriminator_model",
    "discriminator_width",
    "discriminator_layers",
    "discriminator_beta1",
    "adversarial_loss",
    "adversarial_balance",
    "r1_weight",
)
SOURCES = ("train_data_dir", "dataset_name", "data_files")
LEARNED = ("tinysr", "tinyfusion")
METHODS = (*LEARNED, *BASELINES, "block_influence", "given")


@dataclass
class CompressStage(Stage):
    """A stage of a compression."""

    resolution: int = 512
    ema_decay: float = 0.999
    adam_beta2: float = 0.999

    PICTURES = PIXEL_TERMS

    def check(self, place: str) -> None:
        super().check(place)
        for name in (*self.PICTURES, "latent_l1", "adversarial", "discriminator_learning_rate"):
            if (getattr(self, name, None) or 0) < 0:
                raise ConfigError(f"{place}{name} must be at least 0, not {getattr(self, name)}.")
        if not 0 <= getattr(self, "adversarial_from", 0) <= 1:
            raise ConfigError(f"{place}adversarial_from must be from 0 to 1, not {self.adversarial_from}.")  # type: ignore[attr-defined]

    def weights(self, *more: str) -> dict[str, float]:
        """The weights of the terms that count, `more` beside those of pictures."""
        names = [name for name in (*more, *self.PICTURES) if getattr(self, name, 0)]
        return {name: getattr(self, name) for name in names}


@dataclass
class PictureTerms:
    """Weights of the terms of decoded pictures, which are the trainer's."""

    pixel_l1: float = 0.0
    gradient_l1: float = 0.0
    frequency_l1: float = 0.0
    grid_l1: float = 0.0
    encoder_features: float = 0.0
    lpips: float = 0.0


@dataclass
class Half:
    """One half of the tiny VAE: TAESD's layout, all layers of one width."""

    width: int = 64
    num_blocks: list | None = None  # residual blocks at each size; 1, 3, 3, 3 as published
    separable: bool = False

    def check_half(self, place: str) -> None:
        """Raises a `ConfigError` for numbers that cannot be used."""
        if self.width < 1:
            raise ConfigError(f"{place}width must be at least 1, not {self.width}.")
        blocks = self.num_blocks
        if blocks is not None and not (blocks and all(type(count) is int and count >= 0 for count in blocks)):
            raise ConfigError(f"{place}num_blocks must be a list of whole numbers from 0, not {blocks}.")


@dataclass
class EncoderStage(CompressStage, Half):
    """Stage A: the tiny encoder learns the latents of the base's own one."""

    steps: int = 100_000
    learning_rate: float = 3e-4
    separable: bool = True
    pictures: str = "lq"  # what it is trained on: lq, enlarged, as published; or hq

    def check(self, place: str) -> None:
        super().check(place)
        self.check_half(place)
        _one_of(place, self, "pictures", ("lq", "hq"))


@dataclass
class DecoderStage(CompressStage, Half, PictureTerms):
    """Stage B: the tiny decoder makes pictures of the latents that the base's own encoder gives the HQ ones."""

    steps: int = 200_000
    learning_rate: float = 5e-4
    encoder_features: float = 3.0
    adversarial: float = 1.0
    adversarial_from: float = 0.0
    discriminator_learning_rate: float = 1e-5

    def check(self, place: str) -> None:
        super().check(place)
        self.check_half(place)
        if not self.weights():
            raise ConfigError(
                f"{place.rstrip('.')} has no loss but the adversarial one: give one of "
                f"{', '.join(self.PICTURES)} a weight."
            )


@dataclass
class SearchStage(CompressStage, PictureTerms):
    """Stage C: which blocks stay."""

    steps: int = 100_000
    train_batch_size: int = 1
    learning_rate: float = 5e-5
    method: str = "tinysr"
    group_size: int = 4
    keep: int = 2  # of a group
    groups: list | None = None  # or [size, keep] of each
    kept: list | None = None  # numbers of the blocks, for the method given
    pairs: bool = True
    partner: str = "marginals"
    rank: int = 64  # of the LoRA that learns beside; 0 for none
    tau: list[float] = field(default_factory=lambda: [4.0, 0.1])
    scaling: list[float] = field(default_factory=lambda: [100.0])
    distance: str = "cosine"  # of block_influence, or angular
    batches_watched: int = 16  # by block_influence
    latent_l1: float = 1.0

    COUNTS: ClassVar[tuple[str, ...]] = (*CompressStage.COUNTS, "group_size", "batches_watched")

    def check(self, place: str) -> None:
        super().check(place)
        _one_of(place, self, "method", METHODS)
        _one_of(place, self, "partner", PARTNERS)
        _one_of(place, self, "distance", ("cosine", "angular"))
        if self.rank < 0:
            raise ConfigError(f"{place}rank must be at least 0, not {self.rank}.")
        if (self.method == "given") != (self.kept is not None):
            raise ConfigError(f"{place}kept goes with {place}method given, and only with that.")
        if self.method in LEARNED and not self.weights("latent_l1"):
            raise ConfigError(f"{place.rstrip('.')} has no loss: give latent_l1 or a term of pictures a weight.")
        self.annealing()

    def annealing(self) -> Annealing:
        """Temperature and scaling over the search."""
        return Annealing(self.tau, self.scaling)

    def blocks(self) -> list[int]:
        """The blocks that are given. Raises a `ConfigError` where they are no numbers."""
        if not all(type(block) is int for block in self.kept or ()):
            raise ConfigError(f"search.kept must list numbers of blocks, not {self.kept}.")
        return list(self.kept or ())

    def layout(self, depth: int) -> tuple[Group, ...]:
        """The groups of a transformer of `depth` blocks.

        Raises:
            ConfigError: if the groups that are listed are no pairs of numbers, or of another depth.
        """
        if self.groups is None:
            return even_groups(depth, self.group_size, self.keep)
        try:
            found = tuple(Group(int(size), int(keep)) for size, keep in self.groups)
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"search.groups must list [size, keep] of each group, not {self.groups}.") from error
        if sum(group.size for group in found) != depth:
            raise ConfigError(
                f"search.groups holds {sum(group.size for group in found)} blocks, but the transformer has {depth}."
            )
        return found


@dataclass
class PruneStage:
    """Stage D: the transformer without the other blocks, baked."""

    text_stream: str = "none"  # or full
    with_lora: bool = False  # begin with what the search's LoRA learned; published is without

    def check(self, place: str) -> None:
        """Raises a `ConfigError` for what cannot be used, here and in `BakeStage`."""
        _one_of(place, self, "text_stream", ("none", "full"))


@dataclass
class StudentStage(CompressStage):
    """What both restoration stages have."""

    train_type: str = "lora"  # or full
    rank: int = 64
    latent_l1: float = 1.0

    COUNTS: ClassVar[tuple[str, ...]] = (*CompressStage.COUNTS, "rank")

    def check(self, place: str) -> None:
        super().check(place)
        _one_of(place, self, "train_type", ("lora", "full"))


@dataclass
class RestoreStage(StudentStage):
    """Stage E: the pruned transformer learns the teacher's latents."""

    steps: int = 150_000
    learning_rate: float = 1e-4

    def check(self, place: str) -> None:
        super().check(place)
        if not self.latent_l1:
            raise ConfigError(f"{place}latent_l1 must be above 0: this stage has no other loss.")


@dataclass
class RefineStage(StudentStage, PictureTerms):
    """Stage F: the same with the tiny VAE, and with terms of decoded pictures."""

    steps: int = 50_000
    learning_rate: float = 1e-6
    encoder: str = "tiny"  # whose latents it takes: tiny, as in use, or teacher
    train_decoder: bool = False
    latent_l1: float = 5.0
    encoder_features: float = 1.0
    adversarial: float = 0.3
    adversarial_from: float = 0.0
    discriminator_learning_rate: float = 5e-6

    def check(self, place: str) -> None:
        super().check(place)
        _one_of(place, self, "encoder", ("tiny", "teacher"))
        if not self.weights("latent_l1"):
            raise ConfigError(f"{place.rstrip('.')} has no loss but the adversarial one: give another term a weight.")


@dataclass
class BakeStage:
    """The model that comes out."""

    dtype: str = "fp16"

    def check(self, place: str) -> None:
        _one_of(place, self, "dtype", ("fp32", "fp16", "bf16"))


SECTIONS: dict[str, type] = {
    "encoder": EncoderStage,
    "decoder": DecoderStage,
    "search": SearchStage,
    "prune": PruneStage,
    "restore": RestoreStage,
    "refine": RefineStage,
    "bake": BakeStage,
}


@dataclass
class CompressConfig:
    """A compression: the model, a section for each stage, and the settings that it shares with the trainer.

    Attributes:
        model: "embedded", a pipeline folder or a Hub id.
        run: photographs, seed, discriminator, outputs.
        encoder, decoder, search, restore, refine: None leaves the stage out: without the first two the model keeps
            its own VAE, without `search` all of its blocks.
        stages: which of them are run.
        recipe: its file name, for the model card.
    """

    model: str
    run: DistillConfig
    encoder: EncoderStage | None
    decoder: DecoderStage | None
    search: SearchStage | None
    prune: PruneStage
    restore: RestoreStage | None
    refine: RefineStage | None
    bake: BakeStage
    stages: tuple[str, ...] = STAGES
    recipe: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any], recipe: str | None = None) -> "CompressConfig":
        """From what a recipe and flags say: SHARED settings, sections, `model` and `stages`.

        Raises:
            ConfigError: for settings that are missing, do not exist, or cannot be used.
        """
        if unknown := [str(name) for name in values if name not in {*SHARED, *SECTIONS, "model", "stages"}]:
            raise ConfigError(f"The setting {unknown[0]} does not exist.")
        if not isinstance(values.get("model"), str):
            raise ConfigError("Name the one-step model that is compressed (model).")
        named = values.get("stages") or list(STAGES)
        names = [named] if isinstance(named, str) else named
        for name in names if isinstance(names, list) else [names]:
            if name not in STAGES:
                raise ConfigError(f"stages are {', '.join(STAGES)}, not {name}.")
        sections: dict[str, Any] = {}
        for name, kind in SECTIONS.items():
            said = values.get(name, {})
            sections[name] = None
            if said is not None or name in ("prune", "bake"):
                sections[name] = section(kind, said or {}, f"{name}.")
                sections[name].check(f"{name}.")
        shared = {name: values[name] for name in SHARED if name in values}
        # What only a distillation asks for.
        filled: dict[str, Any] = {
            "pretrained_model_name_or_path": values["model"],
            "phases": [Phase(steps=1, tsd=[0.0])],
        }
        if not {*names} - {"prune", "bake"} and not any(shared.get(name) for name in SOURCES):
            filled["train_data_dir"] = "."  # which nobody looks at
        scale = shared.get("scale", 4)
        filled["resolution"] = 4 * int(scale) if isinstance(scale, int | float) and scale >= 1 else 4  # of no stage
        run = typed_as(DistillConfig, {**filled, **shared})
        stages = tuple(name for name in STAGES if name in names and sections[name] is not None)
        config = cls(values["model"], run, **sections, stages=stages, recipe=recipe)
        for name, stage in config.trained().items():
            crops = stage.batches(run, name).resolutions
            if getattr(stage, "adversarial", 0):
                run.check_judged(min(crops))
        return config

    def trained(self) -> dict[str, CompressStage]:
        """The sections of the stages that look at photographs."""
        found = {name: getattr(self, name) for name in ("encoder", "decoder", "search", "restore", "refine")}
        return {name: stage for name, stage in found.items() if stage is not None}

    def run_of(self, name: str, folder: Path) -> DistillConfig:
        """The shared settings for one stage: with its crops, rates and folder."""
        stage: Any = getattr(self, name)
        rate = getattr(stage, "discriminator_learning_rate", self.run.discriminator_learning_rate)
        return replace(
            self.run,
            output_dir=str(folder),
            resolution=stage.resolution,
            gradient_accumulation_steps=stage.gradient_accumulation_steps,
            discriminator_learning_rate=rate,
        )

    def settings_of(self, names: Sequence[str]) -> dict[str, Any]:
        """What decides the results of these stages, by name: `seed`, `search.steps`, ..."""
        found = {name: getattr(self.run, name) for name in DECISIVE}
        for name in names:
            stage = getattr(self, name)
            found |= {name: None} if stage is None else {f"{name}.{key}": value for key, value in asdict(stage).items()}
        return found

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not defaults, as a recipe would say them; without the model."""
        said = {name: value for name, value in self.run.to_dict().items() if name in SHARED}
        for name, kind in SECTIONS.items():
            stage, default = getattr(self, name), asdict(kind())
            if stage is None:
                said[name] = None
            elif changed := {key: value for key, value in asdict(stage).items() if value != default[key]}:
                said[name] = changed
        return said


def parse(arguments: Sequence[str] | None = None, description: str = "") -> CompressConfig:
    """A compression from flags and a recipe (`--recipe FILE`); what is typed wins.

    Settings of a section are typed as `--search.steps 1000`; `--restore null` leaves a stage out. A recipe that ships
    with the package is found by its name alone: `--recipe tinysr_sd3`.

    Raises:
        ConfigError: for what cannot be used; one sentence.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    typed = vars(_parser(description).parse_args(words))
    recipe = typed.pop("recipe", None)
    values = _read(Path(recipe)) if recipe else {}
    for name, value in typed.items():
        place, _, inner = name.partition(".")
        if not inner:
            values[name] = value
            continue
        values[place] = dict(values.get(place) or {}) | {inner: value}
    return CompressConfig.from_dict(values, Path(recipe).with_suffix(".yaml").name if recipe else None)


def _one_of(place: str, settings: Any, name: str, allowed: Sequence[str]) -> None:
    if getattr(settings, name) not in allowed:
        raise ConfigError(f"{place}{name} must be one of {', '.join(allowed)}, not {getattr(settings, name)!r}.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}; see --help.")


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _parser(description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tsdsr compress",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--recipe", "--config", metavar="FILE", help="a recipe: a YAML file with these settings")
    parser.add_argument("--model", "-m", help='the one-step model: "embedded", a pipeline folder or a Hub id')
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help=f"run only these of {', '.join(STAGES)}")
    shared = {item.name: item for item in fields(DistillConfig)}
    for name in SHARED:
        item = shared[name]
        text = item.metadata["help"].replace("%", "%%")
        if item.type is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            plain = item.type in (str, str | None, list[str])
            kind: Any = str if plain else _yaml
            parser.add_argument(f"--{name}", type=kind, nargs=item.metadata.get("nargs"), metavar="VALUE", help=text)
    for name, section_kind in SECTIONS.items():
        group = parser.add_argument_group(name, (section_kind.__doc__ or "").splitlines()[0])
        if name not in ("prune", "bake"):
            group.add_argument(f"--{name}", type=_yaml, metavar="null", help="leave this stage out")
        for item in fields(section_kind):
            default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc, operator]
            group.add_argument(f"--{name}.{item.name}", type=_yaml, metavar="VALUE", help=f"default: {default}")
    return parser
