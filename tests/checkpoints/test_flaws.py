"""Every flaw of the published layout is one sentence that names the file and the key, and leaves no folder behind."""

import io
import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdsr.checkpoints import CheckpointError, describe

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
CONV_IN = "transformer.encoder.conv_in"

# Every file that is read, below the folder of the layout.
TENSOR_FILES = [
    f"sd3/transformer/{WEIGHTS}",
    f"sd3/vae/{WEIGHTS}",
    "lora/transformer.safetensors",
    "lora/vae.safetensors",
    "embeddings/prompt_embeds.pt",
    "embeddings/pool_embeds.pt",
]
CONFIGS = ["sd3/transformer/config.json", "sd3/vae/config.json", "sd3/scheduler/scheduler_config.json"]
LORA_FILES = {"transformer": "lora/transformer.safetensors", "vae": "lora/vae.safetensors"}


def edit(path, change):
    """Rewrite a safetensors file after `change` of its dictionary of tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def edit_header(path, change):
    """Rewrite the header of a safetensors file, its data untouched."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + length])
    changed = json.dumps(change(entries) or entries).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swap(first, second):
    keep = first.with_name("keep")
    first.rename(keep)
    second.rename(first)
    keep.rename(second)


# --- files that are something else ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n<!DOCTYPE html><html><body>Please log in</body></html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-lfs pointer"),
        (b'{"error": "Access to model is restricted"}', "error message"),
        (b"", "an empty file"),
    ],
    ids=["html", "lfs", "error", "empty"],
)
@pytest.mark.parametrize("file", [*TENSOR_FILES, *CONFIGS])
def test_failed_download(layout, refused, file, content, words):
    (layout.root / file).write_bytes(content)
    refused(layout.root / file, words)


@pytest.mark.parametrize("file", [*TENSOR_FILES, *CONFIGS])
def test_missing_file(layout, refused, file):
    (layout.root / file).unlink()
    # The folder is named where the file may have several names.
    refused(layout.root / os.path.dirname(file), os.path.splitext(os.path.basename(file))[0])


@pytest.mark.parametrize("share", [0.99, 0.5, 0.001])
@pytest.mark.parametrize("file", TENSOR_FILES)
def test_truncated_file(layout, refused, file, share):
    raw = (layout.root / file).read_bytes()
    (layout.root / file).write_bytes(raw[: max(4, int(len(raw) * share))])
    refused(layout.root / file, "download")


@pytest.mark.parametrize("file", [file for file in TENSOR_FILES if file.endswith(".safetensors")])
def test_file_with_too_much_behind_it(layout, refused, file):
    with open(layout.root / file, "ab") as stream:
        stream.write(b"\0" * 100)
    refused(layout.root / file, "bytes")


def test_pickle_under_the_name_of_a_safetensors_file(layout, refused):
    torch.save({"weight": torch.zeros(2)}, layout.lora / "vae.safetensors")
    refused(layout.lora / "vae.safetensors", "pickle")


def test_garbage_under_the_name_of_a_safetensors_file(layout, refused):
    (layout.lora / "vae.safetensors").write_bytes(b"this is no model, " * 100)
    refused(layout.lora / "vae.safetensors", "safetensors header")


@pytest.mark.parametrize("length", [0x4B80, 0x4B50])
def test_header_whose_length_looks_like_a_pickle(layout, convert, tmp_path, length):
    """The first bytes of the file are its header's length: here 80 as in a pickle, or 50 4B as in a zip."""
    path = layout.lora / "vae.safetensors"
    raw = path.read_bytes()
    (old,) = struct.unpack("<Q", raw[:8])
    path.write_bytes(struct.pack("<Q", length) + raw[8 : 8 + old].ljust(length) + raw[8 + old :])
    assert describe(path)["lora_rank"] == 4
    assert convert(layout, tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    "header",
    [
        ["a list"],
        {"weight": "a word"},
        {"weight": {"dtype": "F32", "shape": [1]}},
        {"weight": {"dtype": "F32", "shape": ["one"], "data_offsets": [0, 4]}},
        {"weight": {"dtype": "F32", "shape": [1], "data_offsets": ["zero", "four"]}},
        {"__metadata__": "a word"},
    ],
)
def test_header_that_is_no_header(layout, refused, header):
    edit_header(layout.lora / "vae.safetensors", lambda entries: header)
    refused(layout.lora / "vae.safetensors", "header")


@pytest.mark.parametrize("file", [f"sd3/vae/{WEIGHTS}", "lora/transformer.safetensors"])
def test_offsets_that_do_not_fit_the_shapes(layout, refused, file):
    def overlap(entries):
        names = sorted((name for name in entries if name != "__metadata__"), key=lambda n: entries[n]["data_offsets"])
        entries[names[0]]["data_offsets"][1] -= 4

    edit_header(layout.root / file, overlap)
    refused(layout.root / file, "damaged")


def test_config_that_is_no_json(layout, refused):
    (layout.base / "vae" / "config.json").write_text("{'single': 'quotes'}")
    refused(layout.base / "vae" / "config.json", "JSON")


def test_config_that_describes_no_network(layout, refused):
    edit_json(layout.base / "vae" / "config.json", down_block_types=["NoSuchBlock"] * 2)
    refused(layout.base / "vae" / "config.json", "AutoencoderKL")


# --- the base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "key"),
    [
        ("transformer", "transformer_blocks.1.attn.to_q.weight"),
        ("transformer", "pos_embed.pos_embed"),
        ("vae", "decoder.conv_out.bias"),
    ],
)
def test_missing_key_of_the_base(layout, refused, side, key):
    edit(layout.base / side / WEIGHTS, lambda tensors: tensors.pop(key))
    refused(layout.base / side / WEIGHTS, key)


def test_surplus_key_of_the_base(layout, refused):
    edit(layout.base / "vae" / WEIGHTS, lambda tensors: tensors.update({"loss.weight": torch.zeros(2)}))
    refused(layout.base / "vae" / WEIGHTS, "loss.weight")


def test_wrong_shape_in_the_base(layout, refused):
    edit(layout.base / "vae" / WEIGHTS, lambda tensors: tensors.update({"encoder.conv_in.weight": torch.zeros(8, 3)}))
    refused(layout.base / "vae" / WEIGHTS, "encoder.conv_in.weight", "(8, 3)", "(8, 3, 3, 3)")


def test_quantised_base(layout, refused):
    key = "proj_out.weight"
    edit(layout.base / "transformer" / WEIGHTS, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    refused(layout.base / "transformer" / WEIGHTS, key, "I8")


def test_nan_in_the_base(layout, refused):
    edit(layout.base / "vae" / WEIGHTS, lambda tensors: tensors["decoder.conv_in.bias"].fill_(torch.nan))
    refused(layout.base / "vae" / WEIGHTS, "decoder.conv_in.bias", "NaN")


def test_base_of_another_pipeline(layout, refused):
    (layout.base / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    refused(layout.base / "model_index.json", "FluxPipeline", "StableDiffusion3Pipeline")


def test_base_with_another_transformer(layout, refused):
    edit_json(layout.base / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    refused(layout.base / "transformer" / "config.json", "FluxTransformer2DModel", "SD3Transformer2DModel")


def test_base_with_a_unet(layout, refused):
    (layout.base / "transformer").rename(layout.base / "unet")
    refused(layout.base / "transformer", "SD3")


def test_base_with_another_vae(layout, refused):
    edit_json(layout.base / "vae" / "config.json", _class_name="AutoencoderTiny")
    refused(layout.base / "vae" / "config.json", "AutoencoderTiny", "AutoencoderKL")


def test_base_with_another_scheduler(layout, refused):
    edit_json(layout.base / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler")
    refused(layout.base / "scheduler" / "scheduler_config.json", "DDPMScheduler", "FlowMatchEulerDiscreteScheduler")


def test_base_that_is_converted_already(layout, merged, refused):
    layout.base = merged
    refused(merged, "already a TSD-SR pipeline", layout=layout)


def test_vae_of_another_model(layout, networks, refused):
    networks.vae(latent_channels=8).save_pretrained(layout.base / "vae")
    refused(layout.base, "8 latent channels", "4")


@pytest.mark.parametrize("role", ["base", "lora", "embeddings"])
def test_folder_that_is_not_there(layout, refused, role):
    shutil.rmtree(getattr(layout, role))
    refused(getattr(layout, role), "is not a folder")


@pytest.mark.parametrize("role", ["base", "lora", "embeddings"])
def test_file_in_place_of_a_folder(layout, refused, role):
    file = layout.lora / "vae.safetensors"
    setattr(layout, role, file)
    refused(file, "is not a folder", layout=layout)


def test_missing_shard(layout, networks, refused):
    shutil.rmtree(layout.base / "vae")
    networks.vae().save_pretrained(layout.base / "vae", max_shard_size="30KB")
    shard = sorted((layout.base / "vae").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    refused(shard, "missing")


@pytest.mark.parametrize("weight_map", [None, {}, {"encoder.conv_in.weight": 1}])
def test_broken_shard_index(layout, refused, weight_map):
    (layout.base / "vae" / WEIGHTS).unlink()
    index = layout.base / "vae" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(index, "weight_map")


# --- the LoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize(("side", "module"), [("transformer", TO_Q), ("vae", CONV_IN)])
def test_half_of_a_pair_is_missing(layout, refused, side, module, half):
    path = layout.root / LORA_FILES[side]
    edit(path, lambda tensors: tensors.pop(f"{module}.lora_{half}.weight"))
    refused(path, f"{module}.lora_{half}.weight")


@pytest.mark.parametrize("side", ["transformer", "vae"])
def test_every_module_of_the_layout_is_asked_for(layout, networks, refused, side):
    path = layout.root / LORA_FILES[side]
    whole = path.read_bytes()
    for name in networks.modules[side]:
        edit(path, lambda tensors, name=name: [tensors.pop(f"transformer.{name}.lora_{half}.weight") for half in "AB"])
        refused(path, f"transformer.{name}.lora_A.weight")
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "key",
    ["lora_unet_blocks_0.alpha", "transformer.proj_out.lora_A.default.weight", "unet.conv_in.lora_A.weight"],
)
def test_key_that_is_not_of_the_layout(layout, refused, key):
    edit(layout.lora / "transformer.safetensors", lambda tensors: tensors.update({key: torch.zeros(4, 16)}))
    refused(layout.lora / "transformer.safetensors", key)


def test_lora_of_a_deeper_transformer(layout, refused):
    def deepen(tensors):
        for half in "AB":
            tensors[f"{TO_Q.replace('.0.', '.7.')}.lora_{half}.weight"] = tensors[f"{TO_Q}.lora_{half}.weight"].clone()

    edit(layout.lora / "transformer.safetensors", deepen)
    refused(layout.lora / "transformer.safetensors", "transformer_blocks.7.attn.to_q", "no layer")


def test_lora_without_keys(layout, refused):
    save_file({}, layout.lora / "vae.safetensors")
    refused(layout.lora / "vae.safetensors", "no LoRA weights")


def test_ranks_of_a_pair_disagree(layout, refused):
    edit(
        layout.lora / "vae.safetensors",
        lambda tensors: tensors.update({f"{CONV_IN}.lora_A.weight": torch.ones(3, 3, 3, 3)}),
    )
    refused(layout.lora / "vae.safetensors", f"{CONV_IN}.lora_A.weight", f"{CONV_IN}.lora_B.weight", "rank 3", "rank 4")


def test_rank_of_one_module_is_another(layout, refused):
    def narrow(tensors):
        tensors[f"{TO_Q}.lora_A.weight"] = tensors[f"{TO_Q}.lora_A.weight"][:2].clone()
        tensors[f"{TO_Q}.lora_B.weight"] = tensors[f"{TO_Q}.lora_B.weight"][:, :2].clone()

    edit(layout.lora / "transformer.safetensors", narrow)
    refused(layout.lora / "transformer.safetensors", f"{TO_Q}.lora_A.weight", "rank 2", "rank 4")


def test_rank_zero(layout, refused):
    def empty(tensors):
        for key, tensor in tensors.items():
            tensors[key] = tensor[:0].clone() if "lora_A" in key else tensor[:, :0].clone()

    edit(layout.lora / "vae.safetensors", empty)
    refused(layout.lora / "vae.safetensors", "rank 0")


@pytest.mark.parametrize(
    ("side", "key", "shape"),
    [
        ("transformer", f"{TO_Q}.lora_A.weight", (4, 15)),
        ("transformer", f"{TO_Q}.lora_B.weight", (17, 4)),
        ("transformer", f"{TO_Q}.lora_B.weight", (16, 4, 1, 1)),
        ("vae", f"{CONV_IN}.lora_A.weight", (4, 3, 1, 1)),
        ("vae", f"{CONV_IN}.lora_B.weight", (8, 4, 3, 3)),
        ("vae", f"{CONV_IN}.lora_A.weight", (4, 27)),
    ],
)
def test_wrong_shape_in_the_lora(layout, refused, side, key, shape):
    path = layout.root / LORA_FILES[side]
    edit(path, lambda tensors: tensors.update({key: torch.ones(shape)}))
    refused(path, key, shape)


def test_quantised_lora(layout, refused):
    key = f"{TO_Q}.lora_A.weight"
    edit(
        layout.lora / "transformer.safetensors",
        lambda tensors: tensors.update({key: torch.ones(4, 16, dtype=torch.int8)}),
    )
    refused(layout.lora / "transformer.safetensors", key, "I8")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_lora_that_is_not_finite(layout, refused, value):
    key = f"{CONV_IN}.lora_B.weight"
    edit(layout.lora / "vae.safetensors", lambda tensors: tensors[key].flatten()[:1].fill_(value))
    refused(layout.lora / "vae.safetensors", key, "NaN or infinite")


def test_swapped_lora_files(layout, refused):
    swap(layout.lora / "transformer.safetensors", layout.lora / "vae.safetensors")
    refused(layout.lora / "transformer.safetensors", "vae.safetensors", "swapped")


@pytest.mark.parametrize(("source", "target"), [("transformer", "vae"), ("vae", "transformer")])
def test_the_same_lora_twice(layout, refused, source, target):
    shutil.copy(layout.lora / f"{source}.safetensors", layout.lora / f"{target}.safetensors")
    refused(layout.lora / f"{target}.safetensors", "the VAE", "the transformer", "expected")


def test_stated_alpha_must_be_the_rank(layout, refused, convert, tmp_path):
    path = layout.lora / "transformer.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})})
    refused(path, "lora_alpha 8", "rank 4")
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})})
    assert convert(layout, tmp_path / "out").is_dir()


# --- the embeddings -------------------------------------------------------------------------------------------------


def test_swapped_embeddings(layout, refused):
    swap(layout.embeddings / "prompt_embeds.pt", layout.embeddings / "pool_embeds.pt")
    refused(layout.embeddings / "prompt_embeds.pt", "pool_embeds.pt", "swapped")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("prompt_embeds", (1, 5, 13), "(1, tokens, 12)"),
        ("prompt_embeds", (2, 5, 12), "(1, tokens, 12)"),
        ("prompt_embeds", (5, 12), "(1, tokens, 12)"),
        ("prompt_embeds", (1, 0, 12), "(1, tokens, 12)"),
        ("pool_embeds", (1, 12), "(1, 10)"),
        ("pool_embeds", (10,), "(1, 10)"),
    ],
)
def test_wrong_shape_of_an_embedding(layout, refused, name, shape, expected):
    torch.save(torch.zeros(shape), layout.embeddings / f"{name}.pt")
    refused(layout.embeddings / f"{name}.pt", shape, expected)


@pytest.mark.parametrize(
    ("content", "word"),
    [({"prompt_embeds": torch.zeros(1, 5, 12)}, "dict"), (torch.zeros(1, 5, 12, dtype=torch.int64), "int64")],
)
def test_embedding_of_another_kind(layout, refused, content, word):
    torch.save(content, layout.embeddings / "prompt_embeds.pt")
    refused(layout.embeddings / "prompt_embeds.pt", word)


def test_embedding_that_is_not_finite(layout, refused):
    torch.save(torch.full((1, 10), torch.inf), layout.embeddings / "pool_embeds.pt")
    refused(layout.embeddings / "pool_embeds.pt", "NaN or infinite")


def test_two_tensors_in_one_embedding_file(layout, refused):
    (layout.embeddings / "pool_embeds.pt").unlink()
    save_file({"a": torch.zeros(1, 10), "b": torch.zeros(1, 10)}, layout.embeddings / "pool_embeds.safetensors")
    refused(layout.embeddings / "pool_embeds.safetensors", "2 tensors")


def test_widths_that_the_config_leaves_to_the_defaults(layout, networks, refused):
    networks.transformer(joint_attention_dim=4096).save_pretrained(layout.base / "transformer")
    path = layout.base / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["joint_attention_dim"]
    path.write_text(json.dumps(config))
    refused(layout.embeddings / "prompt_embeds.pt", "(1, tokens, 4096)")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
def test_code_in_an_embedding_is_refused_and_not_run(layout, refused, tmp_path, one_sentence, kind):
    path, marker = layout.embeddings / "prompt_embeds.pt", tmp_path / "run"
    if kind == "bare":
        path.write_bytes(pickle.dumps(Trap(marker), protocol=2))
    else:
        torch.save(Trap(marker), path, _use_new_zipfile_serialization=kind == "zip")
    refused(path, "code", "never run")
    with pytest.raises(CheckpointError) as caught:
        describe(path)
    one_sentence(caught.value, path)
    assert not marker.exists()
    # The trap is a real one.
    if kind == "bare":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_no_damage_of_an_embedding_raises_anything_else(layout, convert, tmp_path):
    """torch.load answers broken bytes with errors of many kinds; beside the zip there is its older format."""
    path = layout.embeddings / "pool_embeds.pt"
    stream = io.BytesIO()
    torch.save(torch.load(path, weights_only=True), stream, _use_new_zipfile_serialization=False)
    legacy = stream.getvalue()
    broken = [legacy[:size] for size in range(1, len(legacy), 7)]
    broken += [b"0", b"hello", b"\x80\x02G.", b"\x80\x02\x8a.", b"not a model\n", b"PK\x03\x04"]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            describe(path)
    # The whole way for a few of them, one of each error: IndexError, struct.error, RuntimeError, KeyError.
    for content in (b"0", b"\x80\x02G.", legacy[:-1], b"hello"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            convert(layout, tmp_path / "out")
