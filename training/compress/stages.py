"""The stages of a compression. Each trains what it is to train, and returns what writes its folder.

Letters are those of the paper's order: A and B make the VAE, C decides which blocks stay, D takes the others out, E and
F restore what that cost.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...models.one_step_sd3 import OneStepSD3Transformer2DModel
from ...pipelines.pipeline_tsdsr import TSDSRPipeline
from ..config import ConfigError
from ..data import PreparedShards
from ..discriminators import make_discriminator
from ..distill import make_accelerator
from ..draws import MASKS, draws
from ..inputs import Photographs, open_photographs, read_batches
from ..losses import lpips, plain_terms
from ..networks import STUDENT, TEACHER
from ..objectives import EncoderFeatureDistance, latent_mse, pixel_l1
from ..one_step import OneStepModel, scaled_latents
from ..stage import Adversary, Made, Task, run_stage
from .baselines import BASELINES, BlockInfluence, by_influence
from .config import LEARNED, CompressConfig, CompressStage, SearchStage
from .counts import counts
from .masks import MaskDistribution, kept_layers, layer_mask
from .networks import Decoder, Encoder, Student, check_vae, decoder_parts, tiny_vae, trains_vae
from .search import DepthSearch, prune
from .targets import Targets, check_prepared

# Folders of the stages' results.
FOLDERS = {
    "encoder": "1_encoder",
    "decoder": "2_decoder",
    "search": "3_search",
    "prune": "4_pruned",
    "restore": "5_restored",
    "refine": "6_refined",
    "bake": "model",
}
# Stages whose results another one begins with.
BEGINS_WITH = {
    "prune": ("search",),
    "restore": ("prune",),
    "refine": ("prune", "encoder", "decoder"),
    "bake": ("prune", "encoder", "decoder"),
}
SEARCH, SEARCH_WEIGHTS, COUNTS, MODEL = "search.json", "search.safetensors", "counts.json", "compressed_model.json"
Write = Callable[[Path], None]


class Run:
    """A compression under way: its settings, its folders, and what is read from them.

    Args:
        config: of the compression.
    """

    def __init__(self, config: CompressConfig):
        self.config, self.output_dir = config, Path(config.run.output_dir)
        self._photographs: Photographs | None = None
        self._model: str | None = None

    def folder(self, stage: str) -> Path:
        """Where a stage's result lies, or will."""
        return self.output_dir / FOLDERS[stage]

    def working(self, stage: str) -> Path:
        """Where its checkpoints and its log lie until then."""
        return self.output_dir / "checkpoints" / FOLDERS[stage]

    def result(self, *stages: str) -> Path:
        """The folder of the last of these stages that is there; `check` saw to it that one is."""
        there = [name for name in stages if getattr(self.config, name) is not None and self.folder(name).is_dir()]
        return self.folder(there[-1])

    def check(self) -> None:
        """What would come to light only after hours.

        Raises:
            ConfigError: if a stage begins with what is not there, for a model or photographs that cannot be used, for
                groups, blocks or a tiny VAE that do not fit the model, and where LPIPS cannot be had.
        """
        config = self.config
        for name in config.stages:
            for needed in BEGINS_WITH.get(name, ()):
                made = needed in config.stages or self.folder(needed).is_dir()
                if getattr(config, needed) is not None and not made:
                    raise ConfigError(
                        f"The stage {name} begins with what {needed} leaves, and {self.folder(needed)} is not there: "
                        f"run that stage too (--stages {needed} {name})."
                    )
        teacher = self.teacher()
        depth = len(teacher.transformer.transformer_blocks)
        if config.search is not None:
            config.search.layout(depth)
            if config.search.method == "given":
                layer_mask(config.search.blocks(), depth)
        if trains_vae(config):
            tiny_vae(config, teacher)
        for name, stage in config.trained().items():
            if name in config.stages:
                self.photographs(name, stage, teacher)
                if getattr(stage, "lpips", 0):
                    lpips(torch.device("cpu"))

    def teacher(self) -> OneStepModel:
        """The model that is compressed, loaded anew: stages change it.

        Raises:
            ConfigError: if it cannot be loaded or does not fit the settings, or if the folder holds stages of another.
        """
        found = OneStepModel.load(self.config.model)
        if self._model is None:
            self._model = found.fingerprint()
            self._check_model(found.name, self._model)
        for name, stage in self.config.trained().items():
            for side in stage.batches(self.config.run, name).resolutions:
                if side % found.size_multiple:
                    raise ConfigError(
                        f"{name}: sides of crops must be multiples of {found.size_multiple} for {found.name}, not "
                        f"{side}."
                    )
        check_vae(self.config, found)
        return found

    def _check_model(self, name: str, fingerprint: str) -> None:
        file = self.output_dir / MODEL
        known = json.loads(file.read_text(encoding="utf-8"))["sha256"] if file.is_file() else fingerprint
        if known != fingerprint:
            raise ConfigError(f"{self.output_dir} holds stages of another model than {name}: name another output_dir.")
        if PartialState().is_main_process and not file.is_file():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps({"model": name, "sha256": fingerprint}) + "\n", encoding="utf-8")
            os.replace(partial, file)

    def photographs(self, name: str, stage: CompressStage, teacher: OneStepModel) -> Photographs:
        """What a stage is trained on.

        Raises:
            ConfigError: if there are none, or they were prepared at another resolution or with another model.
        """
        settings = self.config.run_of(name, self.output_dir)
        settings.other_resolutions = stage.other_resolutions
        settings.use_shift_factor = teacher.use_shift_factor
        if self._photographs is None or isinstance(self._photographs.source, PreparedShards):
            self._photographs = open_photographs(settings)
            if isinstance(self._photographs.source, PreparedShards):
                check_prepared(self._photographs.source, teacher)
        return self._photographs

    def vae(self, teacher: OneStepModel) -> Any:
        """The compressed model's VAE as far as it is trained, on the CPU: its halves, or the model's own."""
        if not trains_vae(self.config):
            return teacher.vae
        vae = tiny_vae(self.config, teacher)
        for name in ("encoder", "decoder"):
            if getattr(self.config, name) is not None:
                trained = load_file(self.result(name) / "diffusion_pytorch_model.safetensors")
                own = {key.removeprefix(f"{name}."): t for key, t in trained.items() if key.startswith(f"{name}.")}
                getattr(vae, name).load_state_dict(own)
        return vae


class Training:
    """What every stage that learns has: an accelerator, a teacher on its device, its targets, and its loop."""

    def __init__(self, run: Run, name: str, transformer: bool = True):
        self.name, self._run = name, run
        self.stage: Any = getattr(run.config, name)
        self.settings = run.config.run_of(name, run.working(name))
        self.accelerator: Accelerator = make_accelerator(self.settings)
        self.device = self.accelerator.device
        formats = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.teacher = run.teacher()
        self.source = run.photographs(name, self.stage, self.teacher).source
        stored = isinstance(self.source, PreparedShards) and "teacher_sha256" in self.source.settings
        dtype = formats.get(self.accelerator.mixed_precision, torch.float32)
        self.teacher.to(self.device, dtype, transformer=transformer and not (stored and name != "search"))
        self.batches = self.stage.batches(self.settings, name, degraded=True)
        self.targets = Targets(self.teacher, self.batches, self.device)
        set_seed(self.settings.seed)

    def picture_terms(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The terms of pictures that count, by name; raises a `ConfigError` if LPIPS cannot be had."""
        found = plain_terms(self.teacher.size_multiple)
        if self.stage.encoder_features:
            found["encoder_features"] = EncoderFeatureDistance(self.teacher.plain_vae).float().to(self.device)
        if self.stage.lpips:
            found["lpips"] = lpips(self.device)
        return {name: term for name, term in found.items() if getattr(self.stage, name)}

    def adversary(self) -> Adversary | None:
        """Who judges the pictures, where that counts."""
        if not self.stage.adversarial:
            return None
        discriminator = make_discriminator(self.settings)
        return Adversary(self.settings, discriminator, self.stage.adversarial, self.stage.adversarial_from)

    def run(self, task: Task) -> None:
        """Train; see `run_stage`."""
        run_stage(
            task,
            self.stage,
            self.batches,
            self.settings,
            self.accelerator,
            self.source,
            self._run.working(self.name),
            checkpointing_steps=self.settings.checkpointing_steps,
            log=True,
            about=self._run.config.settings_of([self.name]),
        )
        self.accelerator.free_memory()


def encoder(run: Run) -> Write:
    """A: mean( (E_tiny(x) - E_pre(x))^2 ), x the enlarged LQ pictures as published, or the HQ ones."""
    training = Training(run, "encoder", transformer=False)
    targets, teacher = training.targets, training.teacher
    vae = tiny_vae(run.config, teacher)
    model = Encoder(vae, teacher.shift).to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(True)
    pictures_of = targets.lq if training.stage.pictures == "lq" else targets.hq

    @contextmanager
    def terms(model: Any, batch: dict[str, Any], progress: float) -> Iterator[Made]:
        pictures = pictures_of(batch)
        yield Made({"latent_mse": latent_mse(model(pictures), teacher.plain_latents(pictures))})

    training.run(Task("encoder", model, terms, {"latent_mse": 1.0}))
    return lambda folder: vae.cpu().save_pretrained(folder)


def decoder(run: Run) -> Write:
    """B: how far D_tiny(E_pre(x_HR)) is from x_HR, and what a discriminator says of it."""
    training = Training(run, "decoder", transformer=False)
    targets, teacher, terms_of = training.targets, training.teacher, training.picture_terms()
    vae = tiny_vae(run.config, teacher)
    model = Decoder(vae, teacher.shift).to(memory_format=torch.channels_last)
    vae.decoder.requires_grad_(True)

    @contextmanager
    def terms(model: Any, batch: dict[str, Any], progress: float) -> Iterator[Made]:
        hq = targets.hq(batch)
        output = model(targets.hq_latents(batch))
        yield Made({name: term(output, hq) for name, term in terms_of.items()}, output, hq)

    training.run(Task("decoder", model, terms, training.stage.weights(), training.adversary()))
    return lambda folder: vae.cpu().save_pretrained(folder)


def search(run: Run) -> Write:
    """C: min over p of min over dPhi of E[ mean |z_stu - z_tea| + terms of D(z_stu) ], masks m ~ p (see `masks`)."""
    stage = run.config.search
    assert stage is not None
    if stage.method not in LEARNED:
        return _chosen(run, stage)
    training = Training(run, "search")
    targets, teacher, terms_of = training.targets, training.teacher, training.picture_terms()
    groups = stage.layout(len(teacher.transformer.transformer_blocks))
    model = make_search(teacher, stage).to(training.device)
    if run.config.run.gradient_checkpointing:
        teacher.transformer.enable_gradient_checkpointing()
    annealing, prompt = stage.annealing(), teacher.fixed_prompt(training.device)

    def restore(lq_latents: Tensor) -> Tensor:
        with model.role(TEACHER), torch.no_grad():
            return model(lq_latents, prompt)

    targets.restore = restore

    @contextmanager
    def terms(wrapped: Any, batch: dict[str, Any], progress: float) -> Iterator[Made]:
        lq_latents, wanted = targets.latents(batch)
        generator = draws(training.settings.seed, MASKS, batch["index"])
        mask = model.masks.sample(*annealing.at(progress), count=len(lq_latents), generator=generator)
        with model.role(STUDENT, mask.to(training.device)):
            z = wrapped(lq_latents, prompt)
            found = {"latent_l1": pixel_l1(z, wanted)} if stage.latent_l1 else {}
            if terms_of:
                output, hq = teacher.decoded(z), targets.hq(batch)
                found |= {name: term(output, hq) for name, term in terms_of.items()}
            yield Made(found)

    def facts(progress: float) -> dict[str, float]:
        return {"confidence": model.masks.confidence(annealing.at(progress)[1])}

    training.run(Task("search", model, terms, stage.weights("latent_l1"), facts=facts))
    scaling = annealing.at(1.0)[1]
    masks, decision = model.masks, "marginals" if stage.method == "tinysr" else "options"
    of_options, of_pairs = masks.probabilities(scaling)
    found = {
        "mask": masks.final(scaling, decision),
        "groups": [[group.size, group.keep] for group in groups],
        "marginals": masks.marginals(scaling),
        "expected": masks.expected(scaling),
        "options": of_options,
        "pairs": of_pairs,
        "confidence": masks.confidence(scaling),
        "curve": _curve(run.working("search") / "log.jsonl"),
    }
    trained = {name: tensor.detach().cpu().contiguous() for name, tensor in model.trained().items()}
    return lambda folder: _write_search(folder, stage, found, trained)


def make_search(teacher: OneStepModel, stage: SearchStage) -> DepthSearch:
    """The search over a teacher's transformer, before it has learned anything."""
    groups = stage.layout(len(teacher.transformer.transformer_blocks))
    masks = MaskDistribution(groups, pairs=stage.pairs and stage.method == "tinysr", partner=stage.partner)
    return DepthSearch(teacher.family, teacher.transformer, masks, stage.rank)


def _chosen(run: Run, stage: SearchStage) -> Write:
    """C, where nothing is learned: blocks by their numbers, or by how much they change."""
    teacher = run.teacher()
    depth = len(teacher.transformer.transformer_blocks)
    groups = stage.layout(depth)
    keep = sum(group.keep for group in groups)
    found: dict[str, Any] = {"groups": [[group.size, group.keep] for group in groups]}
    if stage.method == "given":
        found = {"mask": layer_mask(stage.blocks(), depth)}
    elif stage.method in BASELINES:
        found["mask"] = BASELINES[stage.method](depth, keep)
    else:
        training = Training(run, "search")
        with BlockInfluence(training.teacher.transformer, stage.distance) as influence:
            for batch in read_batches(training.source, training.batches, stop=stage.batches_watched):
                training.teacher.restored(training.teacher.lq_latents(training.targets.lq(batch)))
        scores = influence.scores()
        found |= {"mask": by_influence(scores, keep), "influence": scores}
        training.accelerator.free_memory()
    return lambda folder: _write_search(folder, stage, found, {})


def _curve(log: Path) -> list[dict[str, float]]:
    """Step and confidence of every line of a log."""
    if not log.is_file():
        return []
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [{"step": line["step"], "confidence": line["confidence"]} for line in lines if "confidence" in line]


def _write_search(folder: Path, stage: SearchStage, found: dict[str, Any], trained: dict[str, Tensor]) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        return [plain(one) for one in value] if isinstance(value, list) else value

    mask = found["mask"]
    facts = {"method": stage.method, "depth": len(mask), "kept": list(kept_layers(mask)), **found}
    text = json.dumps({name: plain(value) for name, value in facts.items()}, indent=1)
    (folder / SEARCH).write_text(text + "\n", encoding="utf-8")
    if trained:
        save_file(trained, folder / SEARCH_WEIGHTS)


def pruned(run: Run) -> Write:
    """D: the transformer without the other blocks; modulation and, for text_stream none, the prompt worked out."""
    teacher, settings = run.teacher(), run.config.prune
    depth = len(teacher.transformer.transformer_blocks)
    before = counts(teacher.vae, teacher.transformer, teacher.prompt.config.sequence_length)
    mask = torch.ones(depth)
    if run.config.search is not None:
        place = run.result("search")
        mask = torch.tensor(json.loads((place / SEARCH).read_text(encoding="utf-8"))["mask"])
        if len(mask) != depth:
            raise ConfigError(f"{place} is of a transformer with {len(mask)} blocks, but {teacher.name} has {depth}.")
    if settings.with_lora and run.config.search is not None:
        if not (place / SEARCH_WEIGHTS).is_file():
            raise ConfigError(f"prune.with_lora needs what a search learned, and {place} holds none.")
        model = make_search(teacher, run.config.search)
        learned, own = load_file(place / SEARCH_WEIGHTS), model.trained()
        if learned.keys() != own.keys():
            raise ConfigError(f"{place / SEARCH_WEIGHTS} was learned with other settings of search.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(learned[name])
        plain = model.pruned(mask, with_lora=True)
    else:
        plain = prune(teacher.transformer, mask)
    baked = OneStepSD3Transformer2DModel.from_sd3(
        plain, teacher.prompt, teacher.family.timestep, settings.text_stream, torch.float32
    )

    def write(folder: Path) -> None:
        save_pipeline(pipeline_of(teacher, teacher.vae, baked), folder)
        write_counts(folder, before, counts(teacher.vae, baked))

    return write


def restore(run: Run) -> Write:
    """E: mean |z_stu - z_tea|, both from z_L."""
    place = run.result("prune")
    training = Training(run, "restore")
    student = Student(_transformer(place), training.stage)
    _checkpoint_gradients(run, student)

    @contextmanager
    def terms(model: Any, batch: dict[str, Any], progress: float) -> Iterator[Made]:
        lq_latents, wanted = training.targets.latents(batch)
        yield Made({"latent_l1": pixel_l1(model(lq_latents)[0], wanted)})

    training.run(Task("restore", student, terms, {"latent_l1": training.stage.latent_l1}))
    return _write_student(run, student, run.teacher(), None)


def refine(run: Run) -> Write:
    """F: mean |z_stu - z_tea|, terms of D(z_stu) against x_HR, a discriminator; z_stu of the tiny encoder's latents."""
    place = run.result("prune", "restore")
    training = Training(run, "refine")
    targets, teacher, stage = training.targets, training.teacher, training.stage
    terms_of = training.picture_terms()
    looks = bool(terms_of) or stage.adversarial > 0
    vae = run.vae(run.teacher()).to(training.device)  # in float32, whatever the teacher computes in
    student = Student(_transformer(place), stage, Decoder(vae, teacher.shift) if looks else None)
    _checkpoint_gradients(run, student)
    if stage.train_decoder and looks:
        for part in decoder_parts(vae):
            part.requires_grad_(True)

    @contextmanager
    def terms(model: Any, batch: dict[str, Any], progress: float) -> Iterator[Made]:
        lq_latents, wanted = targets.latents(batch)
        if stage.encoder == "tiny":
            with torch.no_grad():
                lq_latents = scaled_latents(vae, targets.lq(batch), teacher.shift)
        z, output = model(lq_latents)
        found = {"latent_l1": pixel_l1(z, wanted)} if stage.latent_l1 else {}
        hq = targets.hq(batch) if looks else None
        found |= {name: term(output, hq) for name, term in terms_of.items()}
        yield Made(found, output, hq)

    training.run(Task("refine", student, terms, stage.weights("latent_l1"), training.adversary()))
    return _write_student(run, student, run.teacher(), vae.cpu())


def pipeline_of(teacher: OneStepModel, vae: Any, transformer: Any) -> TSDSRPipeline:
    """A pipeline with the teacher's schedule, grain and degrid."""
    pipeline = TSDSRPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=teacher.family.scheduler,
        use_shift_factor=teacher.use_shift_factor,
        grain=teacher.grain,
        degrid=teacher.degrid,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: TSDSRPipeline, folder: Path) -> None:
    """As `save_pretrained` does it, without the places on this machine that its parts were read from."""
    pipeline.save_pretrained(folder)
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_counts(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write counts.json: the model that was compressed, and what became of it."""
    text = json.dumps({"before": before, "after": after}, indent=1)
    (folder / COUNTS).write_text(text + "\n", encoding="utf-8")


def _transformer(place: Path) -> Any:
    return OneStepSD3Transformer2DModel.from_pretrained(place, subfolder="transformer", torch_dtype=torch.float32)


def _checkpoint_gradients(run: Run, student: Student) -> None:
    if run.config.run.gradient_checkpointing:
        student.transformer.enable_gradient_checkpointing()


def _write_student(run: Run, student: Student, teacher: OneStepModel, vae: Any) -> Write:
    """Its pipeline, with a VAE of its own or the teacher's; the teacher is one that was not trained upon."""
    transformer = student.plain()
    vae = teacher.vae if vae is None else vae
    before = counts(teacher.vae, teacher.transformer, teacher.prompt.config.sequence_length)

    def write(folder: Path) -> None:
        save_pipeline(pipeline_of(teacher, vae, transformer), folder)
        write_counts(folder, before, counts(vae, transformer))

    return write
