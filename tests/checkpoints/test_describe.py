"""What `describe` says about folders and files, and that it reads no weights for it."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tsdsr
from tsdsr.checkpoints import CheckpointError, describe

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
SIZES = {"latent_channels": 4, "vae_scale": 2, "layers": 2, "width": 16, "heads": 2, "patch_size": 2}
EMBEDDED = Path(tsdsr.__file__).resolve().parent / "embedded"


def says(facts, **expected):
    assert {key: facts[key] for key in expected} == expected


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def lora_count(path):
    return sum(tensor.numel() for tensor in load_file(path).values())


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_sparse(path, tensors):
    """A safetensors file with a true header whose data are a hole in the file."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


@pytest.fixture
def single_file(tmp_path):
    """The header of an SD3-medium single file with more than 1 GB of nothing behind it."""
    tensors = {"model.diffusion_model.x_embedder.proj.weight": [1536, 16, 2, 2]}
    for index in range(24):
        tensors[f"model.diffusion_model.joint_blocks.{index}.x_block.attn.qkv.weight"] = [4608, 1536]
    tensors["model.diffusion_model.pos_embed"] = [1, 36864, 1536]
    tensors["first_stage_model.encoder.conv_in.weight"] = [128, 3, 3, 3]
    tensors["text_encoders.t5xxl.transformer.shared.weight"] = [32128, 14000]
    path = tmp_path / "sd3_medium_incl_clips_t5xxlfp16.safetensors"
    write_sparse(path, tensors)
    assert path.stat().st_size > 1_000_000_000
    return path


def test_pipeline_folder(merged, networks):
    facts = describe(merged)
    says(
        facts,
        **SIZES,
        path=str(merged),
        kind="TSD-SR pipeline folder",
        family="TSD-SR on SD3",
        dtype="float32",
        size_bytes=bytes_in(merged),
        lora_rank=None,
        lora_targets=None,
        licence="unknown",
    )
    assert facts["components"]["transformer"] == "SD3Transformer2DModel"
    assert facts["components"]["vae"] == "AutoencoderKL"
    assert facts["parameters"] == {
        "transformer": count(networks.transformer()),
        "vae": count(networks.vae()),
        "prompt_embeddings": 5 * 12 + 10,
    }


def test_pipeline_folder_with_a_kept_lora(kept, networks):
    facts = describe(str(kept))
    says(facts, **SIZES, lora_rank=4, lora_targets={side: len(names) for side, names in networks.modules.items()})
    assert "LoRA" in facts["kind"]


def test_unet_pipeline_folder(make_pipeline, tmp_path):
    pipeline = make_pipeline("kl", network="unet")
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path)
    facts = describe(tmp_path)
    says(
        facts,
        kind="TSD-SR pipeline folder",
        family="TSD-SR on a UNet",
        parameters={"unet": count(pipeline.unet), "vae": count(pipeline.vae), "prompt_embeddings": 3 * 12},
        dtype="float16",
        latent_channels=4,
        vae_scale=2,
        layers=None,
        width=None,
        heads=None,
        patch_size=None,
        lora_rank=None,
        licence="unknown",
    )
    assert facts["components"]["unet"] == "UNet2DConditionModel" and "transformer" not in facts["components"]


def test_unet_pipeline_folder_with_a_lora(make_pipeline, tmp_path):
    lora = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(4, 16),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.zeros(16, 4),
        "vae.encoder.conv_in.lora_A.weight": torch.zeros(2, 3, 3, 3),
        "vae.encoder.conv_in.lora_B.weight": torch.zeros(8, 2, 1, 1),
    }
    make_pipeline("kl", network="unet").save_pretrained(tmp_path / "pipeline")
    for folder in (tmp_path / "pipeline", tmp_path):
        save_file(lora, folder / LORA)
        facts = describe(folder)
        says(facts, family="TSD-SR on a UNet", lora_rank={"unet": 4, "vae": 2}, lora_targets={"unet": 1, "vae": 1})
        assert "LoRA" in facts["kind"]


@pytest.mark.parametrize("missing", ["unet/config.json", f"unet/{WEIGHTS}"])
def test_unet_pipeline_folder_with_a_hole(make_pipeline, tmp_path, one_sentence, missing):
    make_pipeline("kl", network="unet").save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError) as caught:
        describe(tmp_path)
    one_sentence(caught.value, tmp_path / "unet", Path(missing).name)
    assert "SD3" not in str(caught.value)


def test_dtypes_are_listed_by_their_share(layout, convert, networks, tmp_path):
    # The larger of the two.
    networks.vae().to(torch.bfloat16).save_pretrained(layout.base / "vae")
    assert describe(convert(layout, tmp_path / "out"))["dtype"] == "bfloat16, float32"


def test_lora_folder(published, networks):
    says(
        describe(published.lora),
        kind="published TSD-SR LoRA folder",
        lora_rank=4,
        lora_targets={side: len(names) for side, names in networks.modules.items()},
        parameters={side: lora_count(published.lora / f"{side}.safetensors") for side in ("transformer", "vae")},
        dtype="float32",
        layers=None,
        licence="unknown",
    )


def test_lora_folder_with_two_ranks(layout, networks):
    lora = networks.random_lora(networks.vae(), networks.modules["vae"], 7, rank=2)
    save_file(lora, layout.lora / "vae.safetensors")
    assert describe(layout.lora)["lora_rank"] == {"transformer": 4, "vae": 2}


@pytest.mark.parametrize(("side", "word"), [("transformer", "transformer"), ("vae", "VAE")])
def test_one_lora_file(published, networks, side, word):
    path = published.lora / f"{side}.safetensors"
    facts = describe(path)
    says(facts, lora_rank=4, lora_targets={side: len(networks.modules[side])}, size_bytes=path.stat().st_size)
    assert word in facts["kind"]
    assert facts["parameters"] == {side: lora_count(path)}


def test_lora_in_the_layout_of_diffusers(kept, networks, tmp_path):
    shutil.copy(kept / LORA, tmp_path)
    for place in (tmp_path, tmp_path / LORA):
        facts = describe(place)
        says(facts, lora_rank=4, lora_targets={side: len(names) for side, names in networks.modules.items()})
        assert "diffusers" in facts["kind"]


def test_embeddings_folder(published):
    says(
        describe(published.embeddings),
        kind="TSD-SR embeddings folder",
        parameters={"prompt_embeds": 60, "pool_embeds": 10},
        components={"prompt_embeds": "embedding (1, 5, 12)", "pool_embeds": "embedding (1, 10)"},
        dtype="float32",
    )


def test_embedding_file(published, tmp_path):
    path = published.embeddings / "prompt_embeds.pt"
    save_file({"x": torch.load(path, weights_only=True)}, tmp_path / "prompt_embeds.safetensors")
    for file in (path, tmp_path / "prompt_embeds.safetensors"):
        says(describe(file), kind="TSD-SR embedding file", parameters={"prompt_embeds": 60}, dtype="float32")


@pytest.mark.parametrize("indexed", [True, False])
def test_sd3_folder(layout, networks, indexed):
    if indexed:
        index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
        (layout.base / "model_index.json").write_text(json.dumps(index))
    (layout.base / "README.md").write_text("---\nlicense: openrail\n---\n")
    facts = describe(layout.base)
    says(facts, **SIZES, kind="diffusers SD3 folder", family="SD3", licence="openrail", lora_rank=None)
    assert facts["components"]["transformer"] == "SD3Transformer2DModel"
    assert facts["parameters"] == {"transformer": count(networks.transformer()), "vae": count(networks.vae())}


def test_sharded_sd3_folder(layout, networks):
    shutil.rmtree(layout.base / "vae")
    networks.vae().save_pretrained(layout.base / "vae", max_shard_size="30KB")
    assert describe(layout.base)["parameters"]["vae"] == count(networks.vae())


def test_single_file(single_file):
    says(
        describe(single_file),
        kind="SD3 single-file checkpoint",
        family="SD3",
        parameters={
            "transformer": 1536 * 16 * 4 + 24 * 4608 * 1536,
            "vae": 128 * 27,
            "text_encoders": 32128 * 14000,
        },
        dtype="float16",
        latent_channels=16,
        layers=24,
        width=1536,
        heads=24,
        patch_size=2,
        licence="stabilityai-ai-community",
    )


def test_no_weight_is_read(single_file, layout, tmp_path):
    """In a process of its own: no torch to load tensors with, and less memory than a hundredth of either file."""
    write_sparse(layout.base / "vae" / WEIGHTS, {"decoder.huge": [600_000, 1000]})
    script = """
import json, sys, tracemalloc
from tsdsr.checkpoints import describe
tracemalloc.start()
facts = [describe(path) for path in sys.argv[1:]]
print(json.dumps([tracemalloc.get_traced_memory()[1], sorted({"torch", "diffusers", "numpy"} & set(sys.modules)),
                  [fact["parameters"]["vae"] for fact in facts]]))
"""
    command = [sys.executable, "-c", script, str(single_file), str(layout.base)]
    peak, loaded, parameters = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert peak < 10_000_000
    assert loaded == []
    assert parameters == [128 * 27, 600_000_000]


def test_the_embedded_model():
    if not (EMBEDDED / "model_index.json").is_file():
        pytest.skip("this checkout has no embedded model")
    facts = describe("embedded")
    says(facts, family="embedded small model, baked", kind="TSD-SR pipeline folder")
    assert facts["parameters"]["transformer"] > 0


def test_always_the_same_keys(merged, kept, published, single_file):
    places = [merged, kept, published.base, published.lora, published.embeddings, single_file]
    places += [published.lora / "vae.safetensors", published.embeddings / "pool_embeds.pt", kept / LORA]
    facts = [describe(place) for place in places]
    assert len({tuple(sorted(fact)) for fact in facts}) == 1
    for fact in facts:
        json.dumps(fact)
        assert fact["kind"] and fact["family"] and fact["dtype"] and fact["size_bytes"] and fact["licence"]


# --- what it is not -------------------------------------------------------------------------------------------------


def refuses(path, one_sentence, *words):
    with pytest.raises(CheckpointError) as caught:
        describe(path)
    one_sentence(caught.value, path, *words)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", b"hello"),
        ("model.bin", b"PK\x03\x04 something"),
        ("model.safetensors", b"this is nonsense, " * 10),
        ("model.safetensors", b"short"),
        ("model.safetensors", b""),
        ("prompt_embeds.pt", b"0"),
        ("prompt_embeds.pt", b"<html>no</html>"),
        ("picture.png", b"\x89PNG\r\n\x1a\n"),
    ],
)
def test_nonsense_file(tmp_path, one_sentence, name, content):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, one_sentence)


def test_other_safetensors_file(tmp_path, one_sentence):
    save_file({"some.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    refuses(tmp_path / "other.safetensors", one_sentence, "neither a LoRA")


def test_lora_of_another_model(tmp_path, one_sentence):
    save_file({"unet.down_blocks.0.to_q.lora_A.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    refuses(tmp_path / "other.safetensors", one_sentence, "unet.down_blocks.0.to_q.lora_A.weight")


def test_missing_path_and_empty_folder(tmp_path, one_sentence):
    refuses(tmp_path / "nowhere", one_sentence, "is not a local folder or file")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", one_sentence, "is no model folder")


def test_pipeline_of_another_family(layout, one_sentence):
    (layout.base / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    refuses(layout.base, one_sentence, "FluxPipeline")


@pytest.mark.parametrize("missing", ["vae/config.json", f"vae/{WEIGHTS}", f"transformer/{WEIGHTS}"])
def test_sd3_folder_with_a_hole(layout, one_sentence, missing):
    (layout.base / missing).unlink()
    with pytest.raises(CheckpointError) as caught:
        describe(layout.base)
    one_sentence(caught.value, layout.base / Path(missing).parent, Path(missing).name)


def test_incomplete_or_swapped_folders(layout, one_sentence):
    (layout.embeddings / "pool_embeds.pt").unlink()
    refuses(layout.embeddings, one_sentence, "pool_embeds.pt")
    shutil.copy(layout.lora / "vae.safetensors", layout.lora / "transformer.safetensors")
    with pytest.raises(CheckpointError) as caught:
        describe(layout.lora)
    one_sentence(caught.value, layout.lora / "transformer.safetensors", "swapped")
    (layout.lora / "vae.safetensors").unlink()
    refuses(layout.lora, one_sentence, "vae.safetensors")
