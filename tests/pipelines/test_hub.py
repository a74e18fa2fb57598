"""The folder that is uploaded, and the upload, to a Hub on this machine."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import load_image, numpy_to_pil
from huggingface_hub import constants
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from tsdsr import TSDSRPipeline
from tsdsr.models.licences import read_front_matter
from tsdsr.pipelines import hub
from tsdsr.pipelines.hub import full_repo_id, prepare_repository, push, push_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Of a tiny pipeline: all that it needs, and nothing else.
FILES = [
    *("README.md", "model_index.json", "prompt_embeddings/config.json", f"prompt_embeddings/{WEIGHTS}"),
    *("scheduler/scheduler_config.json", "transformer/config.json", f"transformer/{WEIGHTS}"),
    *("vae/config.json", f"vae/{WEIGHTS}"),
]
MIXED = torch.linspace(0, 1, 7)


@pytest.fixture(scope="module")
def saved(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy of a saved pipeline, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def prepare(tmp_path):
    """A function that prepares a repository without pictures in `tmp_path/out` and returns its files."""

    def run(source, samples=(), **more):
        return prepare_repository(source, tmp_path / "out", "me/model", samples=samples, **more)

    return run


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- what is copied


def test_only_what_belongs_there(model, prepare, tmp_path):
    """Bit for bit; no pickles, no rubbish, nothing that the card shows from elsewhere on the disk."""
    for name in (
        "weights.bin",
        "a.pt",
        "b.ckpt",
        "notes.txt",
        "script.py",
        ".gitattributes",
        "checkpoint-1/model.safetensors",
    ):
        for folder in (model, model / "vae"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"rubbish")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "a").mkdir()
    model = model.rename(tmp_path / "a" / "model")
    (model / "images").mkdir()
    (model / "images" / "a b.png").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    (tmp_path / "blob").write_bytes(b"shown")
    (model / "images" / "not.png").write_bytes(b"not shown")
    (model / "README.md").write_text(
        f"![a](images/a%20b.png) ![s](../../secret.png) ![t]({tmp_path}/secret.png) ![m]({model}/here.png)"
    )
    (model / "here.png").write_bytes(b"shown")
    edit_json(model / "model_index.json", **{"../photos": ["diffusers", "AutoencoderKL"]})
    for name in ("LICENSE", "LICENSE.md", "training_log.jsonl"):
        (model / name).write_text("text")
    (model / "training.json").write_text("{}")
    files = prepare(model)
    kept = ["images/a b.png", "here.png", "LICENSE", "LICENSE.md", "training.json", "training_log.jsonl"]
    assert files == sorted([*FILES, *kept])
    out = tree(tmp_path / "out")
    assert sorted(out) == files
    assert all(content == tree(model)[name] for name, content in out.items() if name != "README.md")


def test_configs_forget_where_they_lay(model, prepare, tmp_path):
    edit_json(model / "vae" / "config.json", _name_or_path=str(tmp_path / "private"))
    edit_json(model / "model_index.json", _name_or_path=str(tmp_path))
    prepare(model)
    original, written = (
        json.loads((folder / "vae" / "config.json").read_text()) for folder in (model, tmp_path / "out")
    )
    assert written == {name: value for name, value in original.items() if name != "_name_or_path"}
    assert not any(str(tmp_path).encode() in content for content in tree(tmp_path / "out").values())


def test_variants_and_shards(make_pipeline, prepare, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model", variant="fp16", max_shard_size="12kB")
    files = prepare(tmp_path / "model")
    assert "transformer/diffusion_pytorch_model.safetensors.index.fp16.json" in files
    weights = {name: content for name, content in tree(tmp_path / "model").items() if name.endswith(".safetensors")}
    assert len(weights) > 4 and all(tree(tmp_path / "out")[name] == content for name, content in weights.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'TSDSRPipeline.from_pretrained("me/model", variant="fp16")' in card


def test_the_picture_of_a_variant_alone(make_pipeline, prepare, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model", variant="fp16")
    assert "images/before_after_1.jpg" in prepare(tmp_path / "model", samples=None)


def test_an_index_of_old_is_brought_up_to_date(model, prepare, tmp_path):
    edit_json(model / "model_index.json", prompt_embeddings=["tsdsr.models.prompt_embeddings", "PromptEmbeddings"])
    prepare(model)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["prompt_embeddings"] == ["tsdsr", "PromptEmbeddings"]


# --- pickles


def as_pickle(file, name):
    torch.save(load_file(file), file.with_name(name))
    file.unlink()


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_pickle_alone_is_converted(model, prepare, tmp_path, variant):
    expected = load_file(model / "vae" / WEIGHTS)
    as_pickle(model / "vae" / WEIGHTS, f"diffusion_pytorch_model{variant}.bin")
    files = prepare(model)
    name = f"vae/diffusion_pytorch_model{variant}.safetensors"
    assert name in files and not any(file.endswith(".bin") for file in files)
    found = load_file(tmp_path / "out" / name)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_transformers_names_and_shared_tensors(model, text_encoders, prepare, tmp_path):
    encoder = text_encoders["text_encoder"]
    encoder.save_pretrained(model / "text_encoder")
    weights = load_file(model / "text_encoder" / "model.safetensors")
    names = sorted(weights)
    weights["twin"] = weights[names[0]]
    torch.save(weights, model / "text_encoder" / "pytorch_model.bin")
    (model / "text_encoder" / "model.safetensors").unlink()
    edit_json(model / "model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"])
    assert "text_encoder/model.safetensors" in prepare(model)
    loaded = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / "text_encoder")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


# --- refusals


def drop_component(model):
    shutil.rmtree(model / "vae")


def drop_weights(model):
    (model / "vae" / WEIGHTS).unlink()


def drop_prompt(model):
    (model / "prompt_embeddings" / WEIGHTS).unlink()


def shard_pickles(model):
    for number in (1, 2):
        torch.save({}, model / "vae" / f"diffusion_pytorch_model-0000{number}-of-00002.bin")
    drop_weights(model)


def arm_pickle(model):
    drop_weights(model)
    (model / "vae" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(), protocol=2))


def list_pickle(model):
    drop_weights(model)
    torch.save([MIXED], model / "vae" / "diffusion_pytorch_model.bin")


def truncate(model):
    file = model / "vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    (model / "README.md").write_text("# A card\n")


def drop_shard(model):
    (model / "vae" / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "gone-00001-of-00002.safetensors"}}')


def other_class(model):
    edit_json(model / "model_index.json", _class_name="StableDiffusion3Pipeline")


def no_model(model):
    (model / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_component, ("vae", "model_index.json")),
        (drop_weights, ("vae", "no weights")),
        (drop_prompt, ("prompt_embeddings", "no weights")),
        (shard_pickles, ("vae", "save_pretrained")),
        (arm_pickle, ("diffusion_pytorch_model.bin", "safetensors format")),
        (list_pickle, ("diffusion_pytorch_model.bin", "safetensors format")),
        (truncate, (f"vae/{WEIGHTS}", "truncated")),
        (drop_shard, ("gone-00001-of-00002.safetensors", "missing")),
        (other_class, ("StableDiffusion3Pipeline", "tsdsr convert")),
        (no_model, ("model_index.json", "pytorch_lora_weights.safetensors")),
    ],
)
def test_what_is_not_whole_is_refused(model, prepare, one_sentence, monkeypatch, tmp_path, damage, words):
    """In one sentence, and nothing is written; code in pickles does not run."""
    monkeypatch.chdir(tmp_path)
    damage(model)
    with pytest.raises(ValueError) as refused:
        prepare(model)
    one_sentence(refused.value, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_ids_that_are_none(model, tmp_path):
    for repo_id in ("a/b/c", "a b", "", "-a/b", "a/.."):
        with pytest.raises(ValueError):
            prepare_repository(model, tmp_path / "out", repo_id, samples=())
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept(model, prepare, one_sentence, tmp_path):
    prepare(model)
    before = tree(tmp_path / "out")
    with pytest.raises(FileExistsError) as refused:
        prepare(model)
    one_sentence(refused.value, tmp_path / "out", "overwriting")
    (model / "vae" / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="no weights"):
        prepare(model, overwrite=True)
    assert tree(tmp_path / "out") == before
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").touch()
    with pytest.raises(FileExistsError, match="something other"):
        prepare_repository(model, other, "me/model", overwrite=True)
    for around in (model, tmp_path):
        with pytest.raises(ValueError, match="the model itself"):
            prepare_repository(model, around, "me/model", overwrite=True)
    assert (other / "a.jpg").exists() and {path.name for path in tmp_path.iterdir()} == {"model", "out", "photos"}


def test_replacing(model, prepare, tmp_path):
    (tmp_path / "out").mkdir()
    assert prepare(model, overwrite=True) == sorted(FILES)
    (tmp_path / "out" / "old.txt").touch()
    assert prepare(model, overwrite=True) == sorted(FILES)
    assert sorted(tree(tmp_path / "out")) == sorted(FILES) and {path.name for path in tmp_path.iterdir()} == {
        "model",
        "out",
    }


# --- the card


def test_a_new_card(model, prepare, tmp_path):
    prepare(model)
    card = (tmp_path / "out" / "README.md").read_text()
    assert read_front_matter(tmp_path / "out")["tags"][-1] == "tsd-sr"
    count = sum(tensor.numel() for tensor in load_file(model / "transformer" / WEIGHTS).values()) / 1e6
    assert f"* `transformer`: SD3Transformer2DModel, {count:,.1f} M parameters, float32\n" in card
    assert "\n# model\n" in card and "* Prompt: fixed" in card and "could not be told" in card
    assert "## Results" not in card and "## Training" not in card


def test_what_the_trainer_noted_is_in_the_card(model, prepare, tmp_path):
    settings = {"pretrained_model_name_or_path": "owner/base", "learning_rate": 0.001}
    record = {"metrics": {"student": {"psnr_y": 23.456}}, "settings": settings}
    (model / "training.json").write_text(json.dumps(record))
    prepare(model)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| **this model** | 23.46 |" in card and "learning_rate: 0.001" in card
    assert "[owner/base](https://huggingface.co/owner/base)" in card
    assert read_front_matter(tmp_path / "out")["base_model"] == "owner/base"


def test_a_base_that_is_known_by_its_size(model, prepare, tmp_path):
    edit_json(
        model / "transformer" / "config.json",
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        qk_norm=None,
    )
    prepare(model)
    front = read_front_matter(tmp_path / "out")
    assert front["base_model"] == "stabilityai/stable-diffusion-3-medium-diffusers"
    assert front["license_name"] == "stabilityai-ai-community"


def test_the_card_that_is_there_is_completed(model, prepare, tmp_path):
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nMy words.\n\n## Usage\n\nold\n")
    prepare(model)
    front, card = read_front_matter(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert front["license"] == "mit" and front["library_name"] == "diffusers"
    assert "# Mine\n\nMy words.\n\n## Use\n" in card and "old" not in card and '"me/model"' in card
    assert (model / "README.md").read_text().endswith("old\n")


# --- pictures


def halves(picture):
    array = np.asarray(load_image(str(picture)), dtype=np.float32)
    return array[:, : array.shape[1] // 2], array[:, array.shape[1] // 2 :]


def test_before_and_after(saved, prepare, tmp_path):
    """Bicubic at the left, the pipeline's own result at the right, of the package's photograph, up to JPEG."""
    files = prepare(saved, samples=None)
    assert files == sorted([*FILES, "images/before_after_1.jpg"])
    file = tmp_path / "out" / "images" / "before_after_1.jpg"
    assert file.stat().st_size < 500_000
    photograph = load_image(str(hub.SAMPLE))
    assert photograph.size == (128, 128)
    pipeline = TSDSRPipeline.from_pretrained(saved, local_files_only=True)
    after = pipeline(photograph).images[0]
    left, right = halves(file)
    assert np.abs(left - np.asarray(photograph.resize((512, 512), 3), dtype=np.float32)).mean() < 2
    assert np.abs(right - np.asarray(after, dtype=np.float32)).mean() < 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "](images/before_after_1.jpg)" in card and "128x128 pixels, enlarged 4 times" in card and "CC0-1.0" in card


def test_photographs_of_ones_own(saved, prepare, picture, tmp_path):
    """In the order given, the middle of large ones; nobody else's credit."""
    for name, (height, width) in {"small": (20, 30), "large": (40, 400)}.items():
        numpy_to_pil(picture(height, width)[None])[0].save(tmp_path / f"{name}.png")
    prepare(saved, samples=[tmp_path / "small.png", tmp_path / "large.png"])
    shown = [halves(tmp_path / "out" / "images" / f"before_after_{number}.jpg")[0].shape for number in (1, 2)]
    assert shown == [(80, 120, 3), (160, 1024, 3)]
    middle = load_image(str(tmp_path / "large.png")).crop((72, 0, 328, 40)).resize((1024, 160))
    assert np.abs(halves(tmp_path / "out" / "images" / "before_after_2.jpg")[0] - np.asarray(middle)).mean() < 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("![Left") == 2 and "30x20 pixels" in card and "CC0" not in card


def test_pictures_that_are_shown_already(model, prepare):
    (model / "mine.png").write_bytes(b"picture")
    (model / "README.md").write_text("# T\n\n![mine](mine.png)\n")
    assert prepare(model, samples=None) == sorted([*FILES, "mine.png"])


def test_pictures_stay_small(saved, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_PICTURE_BYTES", 30_000)
    prepare(saved, samples=None)
    assert 0 < (tmp_path / "out" / "images" / "before_after_1.jpg").stat().st_size < 30_000


def test_too_little_memory(saved, make_pipeline, prepare, one_sentence, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(TSDSRPipeline, "__call__", full)
    with pytest.raises(MemoryError) as refused:
        prepare(saved, samples=None)
    one_sentence(refused.value, "memory", "leave it out")
    assert list(tmp_path.iterdir()) == []


# --- LoRAs


@pytest.fixture(scope="module")
def adapted(make_pipeline):
    """A pipeline with a LoRA of rank 2 in its transformer and one of rank 3 in its VAE."""
    pipeline = make_pipeline("kl")
    torch.manual_seed(3)
    for network, target, rank in ((pipeline.transformer, "to_q", 2), (pipeline.vae, "encoder.conv_in", 3)):
        network.add_adapter(LoraConfig(r=rank, init_lora_weights=False, target_modules=[target]), "mine")
    return pipeline


@pytest.fixture
def lora(adapted, tmp_path):
    """A LoRA folder as the trainer writes it."""
    folder = tmp_path / "lora"
    layers = {
        f"{name}_lora_layers": get_peft_model_state_dict(getattr(adapted, name), adapter_name="mine")
        for name in ("transformer", "vae")
    }
    TSDSRPipeline.save_lora_weights(folder, **layers)
    adapted.prompt_embeddings.save_pretrained(folder / "prompt_embeddings")
    for name in ("transformer", "vae", "prompt_embeds", "pool_embeds"):
        save_file({"a": MIXED}, folder / f"{name}.safetensors")
    torch.save(MIXED, folder / "pool_embeds.pt")
    return folder


def test_a_lora_folder(lora, prepare, tmp_path):
    settings = {"pretrained_model_name_or_path": "owner/base"}
    (lora / "training.json").write_text(json.dumps({"metrics": {}, "settings": settings}))
    files = prepare(lora, samples=None)
    assert sorted(files) == sorted([*tree(lora).keys() - {"pool_embeds.pt"}, "README.md"])
    assert all(tree(tmp_path / "out")[name] == content for name, content in tree(lora).items() if name in files)
    front, card = read_front_matter(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert front["base_model"] == "owner/base" and front["tags"][-1] == "lora"
    assert "* LoRA: rank 2 (transformer) and 3 (vae)\n" in card
    assert 'TSDSRPipeline.from_pretrained("owner/base", prompt_embeddings=prompt)' in card
    assert 'pipe.load_lora_weights("me/model")' in card


def test_the_base_that_the_card_of_a_lora_states(lora, prepare, tmp_path):
    (lora / "README.md").write_text("---\nbase_model: stated/base\n---\n# Mine\n")
    shutil.rmtree(lora / "prompt_embeddings")
    prepare(lora)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'TSDSRPipeline.from_pretrained("stated/base")' in card and "# Mine\n" in card


def test_a_lora_cannot_be_shown(lora, prepare, one_sentence):
    with pytest.raises(ValueError) as refused:
        prepare(lora, samples=[hub.SAMPLE])
    one_sentence(refused.value, "LoRA", "samples")


def test_a_lora_beside_a_pipeline(adapted, model, prepare, tmp_path):
    """It is uploaded, loaded by the code of the card, and active in the picture."""
    prepare(model, samples=None)
    bare = (tmp_path / "out" / "images" / "before_after_1.jpg").read_bytes()
    layers = get_peft_model_state_dict(adapted.transformer, adapter_name="mine")
    TSDSRPipeline.save_lora_weights(model, {name: 9 * layer for name, layer in layers.items()})
    assert "pytorch_lora_weights.safetensors" in prepare(model, samples=None, overwrite=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'pipe.load_lora_weights("me/model")' in card and "rank 2 (transformer), kept apart" in card
    assert (tmp_path / "out" / "images" / "before_after_1.jpg").read_bytes() != bare


# --- the pipeline's code


def test_code_on_request(saved, prepare, tmp_path):
    """The repository runs without the package, says so, and can be uploaded again with its code."""
    files = prepare(saved, include_code=True)
    assert {*FILES, "pipeline.py"} <= set(files) and len(files) > len(FILES)
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "TSDSRPipeline"]
    assert prepare_repository(tmp_path / "out", tmp_path / "again", "me/model", samples=()) == files
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


# --- the upload


def test_the_folder_as_it_is(fake_hub, saved, prepare, tmp_path):
    prepare(saved)
    address = push(tmp_path / "out", "someone/model", private=True, commit_message="First")
    assert address == f"{fake_hub.url}/someone/model"
    assert fake_hub.repositories == {"someone/model": tree(tmp_path / "out")}
    created = fake_hub.created["someone/model"]
    assert created.get("visibility") == "private" or created.get("private") is True
    assert fake_hub.commits == ["First"]
    (tmp_path / "out" / "LICENSE").write_text("MIT")
    address = push(tmp_path / "out", "someone/model", create_pr=True)
    assert address == f"{fake_hub.url}/someone/model/discussions/1"
    assert "LICENSE" not in fake_hub.repositories["someone/model"]
    assert fake_hub.repositories["someone/model@refs/pr/1"]["LICENSE"] == b"MIT"


def test_visibility_is_left_to_the_account(fake_hub, saved, prepare, tmp_path):
    prepare(saved)
    push(tmp_path / "out", "someone/model")
    push(tmp_path / "out", "someone/other", private=False)
    assert fake_hub.created["someone/model"].keys().isdisjoint({"visibility", "private"})
    other = fake_hub.created["someone/other"]
    assert other.get("visibility") == "public" or other.get("private") is False


def test_a_name_without_an_owner(fake_hub):
    assert full_repo_id("model") == "someone/model"
    assert full_repo_id("them/model") == "them/model" and fake_hub.paths == ["GET /api/whoami-v2"]


@pytest.mark.parametrize(
    ("failing", "words"),
    [
        ({}, ("Invalid username or password", "hf auth login")),
        ({"/api/repos/create": 500}, ("hiccups",)),
        ({"/api/models/someone/model/commit": 403}, ("hiccups", "right to write")),
    ],
)
def test_a_failed_upload_is_one_sentence(fake_hub, saved, prepare, one_sentence, tmp_path, failing, words):
    prepare(saved)
    fake_hub.failing = failing
    with pytest.raises(OSError) as failed:
        push(tmp_path / "out", "someone/model", token=None if failing else "hf_wrong")
    one_sentence(failed.value, "someone/model", *words)


def test_without_a_network(fake_hub, saved, prepare, one_sentence, tmp_path, monkeypatch):
    prepare(saved)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("someone/model", "model"):
        with pytest.raises(OSError) as failed:
            push(tmp_path / "out", full_repo_id(name))
        one_sentence(failed.value, name, "the network")


# --- a pipeline in memory


def test_a_pipeline_in_memory(fake_hub, model):
    """What is in memory is uploaded, with the card and the notes of the folder that it was loaded from."""
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\n![mine](mine.png)\n")
    (model / "mine.png").write_bytes(b"picture")
    (model / "training.json").write_text("{}")
    pipeline = TSDSRPipeline.from_pretrained(model)
    pipeline.transformer.proj_out.bias.data += 1
    address = push_pipeline(pipeline, "model", private=True, commit_message="Mine", variant="fp16")
    assert address == f"{fake_hub.url}/someone/model" and fake_hub.commits == ["Mine"]
    files = fake_hub.repositories["someone/model"]
    renamed = {name.replace(".safetensors", ".fp16.safetensors") for name in FILES}
    assert files.keys() == {*renamed, "mine.png", "training.json"}
    card = files["README.md"].decode()
    assert "license: mit" in card and '"someone/model", variant="fp16"' in card
    assert str(model).encode() not in b"".join(files.values())


def test_a_pipeline_that_was_never_saved(fake_hub, make_pipeline, monkeypatch):
    """It makes the picture itself: there is no second copy in memory."""
    monkeypatch.setattr(hub, "_load", None)
    pipeline = make_pipeline()
    pipeline.transformer.proj_out.bias.data += 1
    push_pipeline(pipeline, "someone/model", create_pr=True)
    files = fake_hub.repositories["someone/model@refs/pr/1"]
    assert files.keys() == {*FILES, "images/before_after_1.jpg"}
    plain = make_pipeline()
    push_pipeline(plain, "someone/plain", samples=())
    assert fake_hub.repositories["someone/plain"].keys() == set(FILES)
    changed = [name for name in FILES if fake_hub.repositories["someone/plain"][name] != files[name]]
    assert changed == ["README.md", f"transformer/{WEIGHTS}"]


def test_what_cannot_be_uploaded_from_memory(fake_hub, adapted, make_pipeline, one_sentence):
    for pipeline, more, words in (
        (adapted, {}, ("fuse_lora()",)),
        (make_pipeline(), {"safe_serialization": False}, ("safetensors",)),
        (make_pipeline(), {"subfolder": "a"}, ("subfolder",)),
    ):
        with pytest.raises(ValueError) as refused:
            push_pipeline(pipeline, "someone/model", **more)
        one_sentence(refused.value, *words)
    assert fake_hub.paths == []
