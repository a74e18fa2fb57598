"""Compresses a one-step model: the stages one after the other, each with a folder of its own.

    OUT/1_encoder  2_decoder    the tiny VAE, with the half that was trained
    OUT/3_search                search.json: which blocks stay, and why; what was learned
    OUT/4_pruned                the model without the other blocks, baked: a pipeline, as the next ones
    OUT/5_restored  6_refined   the same, trained
    OUT/model                   what comes out
    OUT/checkpoints             of stages that are not done yet

A folder is there when it is whole. A run that is started again (`resume_from_checkpoint`) takes those that are, and
goes on in the middle of the first that is not. Every stage reads what it begins with from these folders, so that a run
in pieces makes what an unbroken one makes.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
from accelerate.utils import gather_object

from ...models.licences import known_base
from ...pipelines import model_card
from ...pipelines.folders import whole_folder
from ...pipelines.loading import DTYPES, EMBEDDED
from ...pipelines.pipeline_tsdsr import TSDSRPipeline
from ..config import ConfigError
from ..distill import make_accelerator
from ..stage import changed_settings
from .config import STAGES, CompressConfig
from .counts import counts, in_words
from .networks import trains_vae
from .stages import (
    FOLDERS,
    SEARCH,
    Run,
    Write,
    decoder,
    encoder,
    pruned,
    refine,
    restore,
    save_pipeline,
    search,
    write_counts,
)

logger = logging.getLogger("tsdsr.training")

STAGE_FILE = "stage.json"


def compress(config: CompressConfig) -> Path:
    """Run the stages of a compression.

    Returns:
        The folder of the last of them: `OUT/model`, where all are run.

    Raises:
        ConfigError: for settings, photographs or a model that cannot be used.
        TrainingError: if a loss or gradient is no longer finite.
        Stopped: if it was asked to stop (SIGTERM); `resume_from_checkpoint` goes on.
        OSError: if a checkpoint or result cannot be written.
    """
    run = Run(config)
    check_output(run)
    run.check()
    place = make_accelerator(config.run)  # those of the stages share its state
    for name in config.stages:
        if run.folder(name).is_dir():
            logger.info("%s is there already.", run.folder(name))
            continue
        logger.info("Stage %s", name)
        write = MAKE[name](run)
        error = None
        if place.is_main_process:
            try:
                write_whole(run, name, write)
            except OSError as failed:
                error = failed
        if any(gather_object([error is not None])):
            raise error or OSError(f"{run.folder(name)} could not be written.")
    return run.folder(config.stages[-1])


def check_output(run: Run) -> None:
    """Raises a `ConfigError` if a stage that is to be run is there and is not to be taken, or was made otherwise."""
    resumed = bool(run.config.run.resume_from_checkpoint)
    if resumed and run.config.run.resume_from_checkpoint != "latest":
        raise ConfigError("A compression has checkpoints of its own for each stage: resume_from_checkpoint is latest.")
    for name in STAGES:
        folder = run.folder(name)
        if name in run.config.stages and not resumed:
            found = [path for path in (folder, run.working(name)) if path.exists()]
            if found:
                raise ConfigError(
                    f"{found[0]} is there already: go on with it (--resume_from_checkpoint latest), delete it to run "
                    f"{name} again, or name another output_dir."
                )
        if folder.is_dir():
            check_stage(run, name)


def check_stage(run: Run, name: str) -> None:
    """Raises a `ConfigError` if a finished stage was made with other settings than those of now."""
    file = run.folder(name) / STAGE_FILE
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{run.folder(name)} was not written by a compression: it has no {STAGE_FILE}.") from error
    if changed := changed_settings(before, run.config.settings_of(behind(name))):
        raise ConfigError(
            f"{run.folder(name)} was made with other settings ({changed}); use the same, or delete it and what came "
            "after it."
        )


def behind(name: str) -> tuple[str, ...]:
    """The stages whose settings a stage's result depends on, its own included."""
    halves = ("encoder", "decoder")
    if name in halves:
        return (name,)
    return tuple(one for one in STAGES[: STAGES.index(name) + 1] if one not in halves or name in ("refine", "bake"))


def write_whole(run: Run, name: str, write: Write) -> None:
    """Write a stage's folder with its settings and its log, and drop its checkpoints."""
    working = run.working(name)
    with whole_folder(run.folder(name)) as folder:
        write(folder)
        facts = {"stage": name, "settings": run.config.settings_of(behind(name))}
        (folder / STAGE_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if (working / "log.jsonl").is_file():
            shutil.copyfile(working / "log.jsonl", folder / "log.jsonl")
    shutil.rmtree(working, ignore_errors=True)


def bake(run: Run) -> Write:
    """The last of the stages as a model: pipeline, card and counts."""
    config, teacher = run.config, run.teacher()
    place = run.result("prune", "restore", "refine")
    pipeline = TSDSRPipeline.from_pretrained(place, torch_dtype=torch.float32, local_files_only=True)
    if place != run.folder("refine") and trains_vae(config):
        pipeline.register_modules(vae=run.vae(teacher))
    before = counts(teacher.vae, teacher.transformer, teacher.prompt.config.sequence_length)
    after = counts(pipeline.vae, pipeline.transformer)
    pipeline.to(dtype=DTYPES[config.bake.dtype])

    def write(folder: Path) -> None:
        save_pipeline(pipeline, folder)
        write_counts(folder, before, after)
        depth = len(teacher.transformer.transformer_blocks)
        kept, how = list(range(depth)), "all"
        if config.search is not None:
            found = json.loads((run.folder("search") / SEARCH).read_text(encoding="utf-8"))
            kept, how = found["kept"], f"chosen by {found['method']}"
        local = config.model == "embedded" or Path(config.model).exists()
        name = (
            EMBEDDED.name
            if config.model == "embedded"
            else Path(config.model).resolve().name
            if local
            else config.model
        )
        title = run.output_dir.resolve().name
        base = known_base(dict(teacher.transformer.config))
        stages = [one for one in STAGES if run.folder(one).is_dir()]
        model_card.write_card(
            folder,
            title,
            "One-step diffusion upscaler for photographs, compressed with TinySR's method\n"
            "([arXiv 2508.17434](https://arxiv.org/abs/2508.17434)).",
            [
                f"Compressed from: `{name}`",
                f"Blocks: {len(kept)} of {depth}, {how}: {', '.join(str(block) for block in kept)}",
                f"Prompt's tokens: {'kept' if config.prune.text_stream == 'full' else 'taken out'}",
                f"VAE: {type(pipeline.vae).__name__}"
                + (", trained here" if trains_vae(config) else ", the model's own"),
                f"Size: {in_words(after)}; before: {in_words(before)}",
                f"Stages: {', '.join(stages)}",
                model_card.BAKED_FACT,
            ],
            model_card.usage(title, scale=config.run.scale),
            model_card.front_matter(teacher.licence, base if not local else None),
            training=model_card.training(
                travelling(config), config.recipe or "recipe.yaml", "tsdsr.training.compress", ["--model", name]
            ),
        )

    return write


def travelling(config: CompressConfig) -> dict:
    """The settings as a card shows them: without the folders of the machine that it was made on."""
    settings = config.to_dict()
    for name in ("output_dir", "resume_from_checkpoint", "report_to"):
        settings.pop(name, None)
    for name in ("train_data_dir", "train_lq_dir", "dataset_name"):
        if settings.get(name) and Path(settings[name]).exists():
            settings[name] = Path(settings[name]).resolve().name
    if settings.get("data_files"):
        settings["data_files"] = [
            Path(file).name if Path(file).is_absolute() else file for file in settings["data_files"]
        ]
    return settings


MAKE = {
    "encoder": encoder,
    "decoder": decoder,
    "search": search,
    "prune": pruned,
    "restore": restore,
    "refine": refine,
    "bake": bake,
}
assert MAKE.keys() == FOLDERS.keys()
