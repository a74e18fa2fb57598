"""What a trained student is written as, and uploaded as."""

import copy
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file

from tsdsr import TSDSRPipeline
from tsdsr.training import export as module
from tsdsr.training.base import Base, build_networks, load_base
from tsdsr.training.config import ConfigError
from tsdsr.training.export import Hub, export, lora_of, merged
from tsdsr.training.networks import FAKE_SCORE, STUDENT, TEACHER, SharedBase

METRICS = {
    "bicubic": {"psnr_y": 20.0, "ssim_y": 0.5},
    "start": {"psnr_y": 18.0, "ssim_y": 0.4},
    "student": {"psnr_y": 23.456, "ssim_y": 0.65},
}
FACTS = {"photographs": "6 pictures of the folder photographs", "validation": "2 photographs held aside"}


@pytest.fixture
def trained(config, tmp_path, base_folder):
    """A function that makes a student whose weights are not the base's, and the settings it has."""

    def make(**changed):
        settings = config(tmp_path / "run", **changed)
        base = load_base(settings, str(base_folder))
        networks = build_networks(base, settings, torch.float32)
        torch.manual_seed(1)
        with torch.no_grad():
            for role in (STUDENT, FAKE_SCORE):
                for weight in networks.parameters_of(role):
                    weight += 0.05 * torch.randn_like(weight)
        return networks, base, settings

    return make


def write(trained, base_folder, metrics=METRICS):
    networks, base, settings = trained
    output = Path(settings.output_dir)
    export(networks, base, settings, str(base_folder), metrics, output, FACTS)
    return output


# --- merging


def by_hand(plain, lora, scale):
    """W + scale * B A for linear layers; for convolutions A is one and B a 1x1 convolution."""
    a, b = lora.lora_A[STUDENT].weight, lora.lora_B[STUDENT].weight
    if plain.weight.ndim == 2:
        return plain.weight + scale * b @ a
    return plain.weight + scale * torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_adds_the_lora_of_the_student_alone(make_pipeline, dtype):
    """Linear layers and convolutions, with biases; teacher's and fake score's adapters stay out."""
    vae = make_pipeline("kl").vae
    plain = copy.deepcopy(vae)
    targets = ["encoder.conv_in", "encoder.mid_block.attentions.0.to_q", "encoder.down_blocks.0.downsamplers.0.conv"]
    torch.manual_seed(2)
    with torch.no_grad():
        for module_ in (vae, plain):
            module_.encoder.conv_in.bias.copy_(torch.arange(8.0))
    loras = {
        role: LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=targets)
        for role in (STUDENT, TEACHER, FAKE_SCORE)
    }
    shared = SharedBase(vae, loras)
    with shared.role(FAKE_SCORE):
        result = merged(shared, dtype)
    weights = result.state_dict()
    assert weights.keys() == plain.state_dict().keys() and result.dtype == dtype
    for name, expected in plain.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if owner in targets and kind == "weight":
            expected = by_hand(plain.get_submodule(owner), vae.get_submodule(owner), 6 / 2)
            assert (expected - plain.state_dict()[name]).abs().max() > 0.01
        torch.testing.assert_close(weights[name], expected.to(dtype), rtol=1e-5, atol=1e-6)
    assert torch.equal(weights["encoder.conv_in.bias"].float(), torch.arange(8.0))


def test_merging_a_network_of_its_own_is_a_copy(make_pipeline):
    own = make_pipeline("kl").vae
    shared = SharedBase(make_pipeline("kl").vae, {}, own)
    result = merged(shared, torch.float32)
    assert result is not own and torch.equal(result.encoder.conv_in.weight, own.encoder.conv_in.weight)
    assert lora_of(shared) is None


def test_merged_is_what_the_student_computes(trained):
    networks, _, _ = trained()
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad(), networks.codec.role(STUDENT) as vae:
        expected = vae.encode(pictures).latent_dist.mode()
    plain = merged(networks.codec, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain.encode(pictures).latent_dist.mode(), expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in plain.named_parameters())


# --- folders


@pytest.mark.parametrize(
    ("output", "folders"), [("lora", {"lora"}), ("merged", {"pipeline"}), ("both", {"lora", "pipeline"})]
)
def test_kinds_of_output(trained, base_folder, output, folders):
    run = write(trained(output=output), base_folder)
    assert {path.name for path in run.iterdir()} == folders
    if "lora" in folders:
        assert {path.name for path in (run / "lora").iterdir()} == {
            *("pytorch_lora_weights.safetensors", "prompt_embeddings", "README.md", "training.json"),
            *("transformer.safetensors", "vae.safetensors", "prompt_embeds.safetensors", "pool_embeds.safetensors"),
        }
        published = load_file(run / "lora" / "vae.safetensors")
        ours = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
        renamed = {name.replace("transformer.", "vae.", 1): tensor for name, tensor in published.items()}
        assert renamed and all(torch.equal(ours[name], tensor) for name, tensor in renamed.items())
    if "pipeline" in folders:
        assert TSDSRPipeline.from_pretrained(run / "pipeline", local_files_only=True).config.timestep == 1000


def test_without_a_lora_of_the_encoder_there_is_no_published_layout(trained, base_folder):
    run = write(trained(output="lora", vae_encoder="frozen"), base_folder)
    assert not (run / "lora" / "transformer.safetensors").exists()
    names = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert names and all(name.startswith("transformer.") for name in names)


@pytest.mark.parametrize("fails", ["save_lora_weights", "save_pretrained"])
def test_what_cannot_be_written_leaves_what_was_there(trained, base_folder, monkeypatch, fails):
    student = trained()
    run = write(student, base_folder)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    real = getattr(TSDSRPipeline, fails)

    def full(*arguments, **more):
        real(*arguments, **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TSDSRPipeline, fails, full)
    with torch.no_grad():
        for weight in student[0].parameters_of(STUDENT):
            weight += 1
    with pytest.raises(OSError, match="No space left"):
        write(student, base_folder)
    kept = {
        path: content for path, content in before.items() if fails == "save_lora_weights" or "pipeline" in path.parts
    }
    assert kept and all(path.read_bytes() == content for path, content in kept.items())
    assert {path.name for path in run.iterdir()} == {"lora", "pipeline"}, "something half written was left"


def test_nothing_half_written_lies_under_a_final_name(trained, base_folder, monkeypatch):
    monkeypatch.setattr(module, "_write_card", lambda *_: (_ for _ in ()).throw(OSError("full")))
    student = trained()
    with pytest.raises(OSError, match="full"):
        write(student, base_folder)
    assert not Path(student[2].output_dir).exists()


# --- cards


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card(trained, base_folder, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("prompt: null\n")
    run = write(trained(config=recipe, hub_token="hf_secret"), base_folder)
    for kind in ("lora", "pipeline"):
        head, body = card_of(run / kind)
        assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "image-to-image"
        assert ("lora" in head["tags"]) == (kind == "lora") and "base_model" not in head
        assert "| | PSNR-Y | SSIM-Y |" in body and "| **this model** | 23.46 | 0.65 |" in body
        assert "| bicubic | 20 | 0.5 |" in body and "| before training | 18 | 0.4 |" in body
        assert "On 2 photographs held aside:" in body
        assert f"Base: `{base_folder.name}`" in body and "Trained: LoRA of the transformer; VAE encoder: lora" in body
        assert "--config mine.yaml --train_data_dir PHOTOGRAPHS --output_dir OUTPUT" in body
        settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
        assert settings["learning_rate"] == 1e-3 and settings["output_dir"] == "run"
        assert str(tmp_path) not in body and "hf_secret" not in body and "hub_token" not in settings
        said = json.loads((run / kind / "training.json").read_text())
        assert said["metrics"] == METRICS and said["settings"] == settings
    assert 'from_pretrained("run", subfolder="prompt_embeddings")' in card_of(run / "lora")[1]
    assert 'pipe = TSDSRPipeline.from_pretrained("run")' in card_of(run / "pipeline")[1]


def test_the_card_of_a_run_without_validation(trained, base_folder):
    assert "Not measured" in card_of(write(trained(output="lora"), base_folder, {}) / "lora")[1]


def test_the_card_of_an_upload_names_the_repository(trained, base_folder):
    run = write(trained(push_to_hub=True, hub_model_id="me/student"), base_folder)
    lora = card_of(run / "lora")[1]
    assert lora.startswith("\n# student\n") and 'pipe.load_lora_weights("me/student", subfolder="lora")' in lora
    assert 'from_pretrained("me/student", subfolder="lora/prompt_embeddings")' in lora
    assert 'TSDSRPipeline.from_pretrained("me/student")' in card_of(run / "pipeline")[1]
    alone = write(trained(push_to_hub=True, hub_model_id="me/student", output="lora"), base_folder)
    assert 'pipe.load_lora_weights("me/student")' in card_of(alone / "lora")[1]


def test_licences(trained, base_folder, tmp_path):
    """Of a base on the Hub by the size of its transformer; of a folder by its card."""
    networks, base, settings = trained(output="lora")
    licensed = tmp_path / "licensed"
    shutil.copytree(base_folder, licensed)
    (licensed / "README.md").write_text("---\nlicense: mit\n---\n")
    export(networks, base, settings, str(licensed), {}, tmp_path / "one", FACTS)
    head, body = card_of(tmp_path / "one" / "lora")
    assert head["license"] == "mit" and "licence, **mit**, applies" in body
    medium = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "qk_norm": None}
    known = SimpleNamespace(config=medium)
    hub = Base(base.family, known, base.vae, base.prompt, None)
    name = "stabilityai/stable-diffusion-3-medium-diffusers"
    export(networks, hub, settings, name, {}, tmp_path / "two", FACTS)
    head, body = card_of(tmp_path / "two" / "lora")
    assert head["base_model"] == name and head["license_name"] == "stabilityai-ai-community"
    assert "**stabilityai-ai-community**" in body and f'from_pretrained("{name}"' in body


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    """Not of a repository that the package happens to be installed in."""
    inside = tmp_path / "site-packages" / "tsdsr" / "training" / "export.py"
    inside.parent.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    more = ["commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, *more], check=True)
    monkeypatch.setattr(module, "__file__", str(inside))
    assert "commit" not in module._commit()


# --- the Hub


class FakeApi:
    """Notes what it is told; `error` is raised instead."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def create_repo(self, name, **more):
        if self.error:
            raise self.error
        self.calls.append((name, more))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(self, **more):
        if self.error:
            raise self.error
        self.calls.append(more)


def test_the_repository_is_made_first(config, tmp_path, monkeypatch):
    tokens, api = [], FakeApi()
    monkeypatch.setattr(module, "HfApi", lambda token: tokens.append(token) or api)
    hub = Hub.prepare(config(tmp_path / "run", hub_token="hf_x", hub_private_repo=True))
    assert hub.repo_id == "me/run" and tokens == ["hf_x"]
    assert Hub.prepare(config(tmp_path / "run", hub_model_id="them/it")).repo_id == "them/it"
    assert api.calls == [
        ("run", {"exist_ok": True, "private": True}),
        ("them/it", {"exist_ok": True, "private": False}),
    ]


class NoNetwork(Exception):
    """As an HTTP library has it: no OSError, and at times no message."""


@pytest.mark.parametrize("error", [NoNetwork(), OSError("offline\nmore"), ValueError("Token is required")])
def test_a_repository_that_cannot_be_made_is_one_sentence(config, tmp_path, monkeypatch, error):
    monkeypatch.setattr(module, "HfApi", lambda token: FakeApi(error))
    with pytest.raises(ConfigError, match=r"^push_to_hub: the repository run cannot be made \(.+\); log in") as refused:
        Hub.prepare(config(tmp_path / "run"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("output", "uploads"),
    [("lora", [("lora", None)]), ("merged", [("pipeline", None)]), ("both", [("pipeline", None), ("lora", "lora")])],
)
def test_what_is_uploaded(tmp_path, output, uploads):
    api = FakeApi()
    assert Hub(api, "me/run", output).upload(tmp_path) == "https://huggingface.co/me/run"
    assert api.calls == [
        {"repo_id": "me/run", "folder_path": tmp_path / folder, "path_in_repo": place} for folder, place in uploads
    ]


@pytest.mark.parametrize("error", [NoNetwork(), OSError("offline"), RuntimeError("rejected\nby a hook")])
def test_a_failed_upload_says_where_the_result_is(tmp_path, error):
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(OSError, match=r"could not be uploaded to me/run \(.+\); it lies in .*hf upload") as failed:
        Hub(FakeApi(error), "me/run", "merged").upload(tmp_path)
    assert str(tmp_path) in str(failed.value) and "\n" not in str(failed.value) and (tmp_path / "pipeline").is_dir()
