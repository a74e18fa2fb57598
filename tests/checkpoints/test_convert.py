"""Conversion of the published layout: what is written, and that it appears whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdsr.checkpoints import CheckpointError
from tsdsr.checkpoints import convert as convert_module
from tsdsr.models.prompt_embeddings import PromptEmbeddings
from tsdsr.pipelines.loading import load_pipeline
from tsdsr.pipelines.pipeline_tsdsr import TSDSRPipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "inference"
PHOTO = torch.rand(1, 3, 14, 10, generator=torch.Generator().manual_seed(3))


def weights(folder):
    return {
        side: load_file(folder / side / WEIGHTS)
        for side in ("transformer", "vae", "prompt_embeddings")
        if (folder / side / WEIGHTS).is_file()
    }


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for side, tensors in ours.items():
        assert tensors.keys() == theirs[side].keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == theirs[side][key].dtype, key
            assert torch.equal(tensor, theirs[side][key]), key


def expected_merge(published, side):
    """W + B A in float64, by the definition of both kinds of layer."""
    lora = load_file(published.lora / f"{side}.safetensors")
    merged = {}
    for key, weight in load_file(published.base / side / WEIGHTS).items():
        down, up = (lora.get(f"transformer.{key.removesuffix('weight')}lora_{half}.weight") for half in "AB")
        merged[key] = weight.double()
        if down is not None and weight.ndim == 2:
            merged[key] = weight.double() + up.double() @ down.double()
        elif down is not None:
            merged[key] = weight.double() + torch.einsum("or,rikl->oikl", up[..., 0, 0].double(), down.double())
    return merged


def run(pipeline, output_type="pt"):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PHOTO, upscale=2, process_size=0, color_fix="none", output_type=output_type).images


@pytest.mark.parametrize("side", ["transformer", "vae"])
def test_merge_is_w_plus_b_a(published, merged, networks, side):
    base, result = load_file(published.base / side / WEIGHTS), load_file(merged / side / WEIGHTS)
    expected = expected_merge(published, side)
    assert result.keys() == base.keys()
    for key, weight in result.items():
        torch.testing.assert_close(weight.double(), expected[key], rtol=0, atol=2e-6, msg=key)
    changed = {key for key in base if not torch.equal(base[key], result[key])}
    assert changed == {f"{module}.weight" for module in networks.modules[side]}


def test_merged_agrees_with_peft(merged, kept):
    merged_pipe = TSDSRPipeline.from_pretrained(merged, local_files_only=True)
    kept_pipe = TSDSRPipeline.from_pretrained(kept, local_files_only=True)
    bare = run(kept_pipe)
    kept_pipe.load_lora_weights(kept, local_files_only=True)
    torch.testing.assert_close(run(kept_pipe, "latent"), run(merged_pipe, "latent"), rtol=0, atol=3e-5)
    picture = run(merged_pipe)
    assert picture.shape == (1, 3, 28, 20)
    torch.testing.assert_close(run(kept_pipe), picture, rtol=0, atol=3e-5)
    assert (bare - picture).abs().max() > 0.02


def test_load_pipeline_takes_a_kept_lora_along(merged, kept):
    pipe = load_pipeline(kept, device="cpu")
    adapters = pipe.get_list_adapters()
    assert {"transformer", "vae"} <= adapters.keys()
    assert adapters["transformer"] == adapters["vae"]
    adapted = [name for name, _ in pipe.vae.named_modules() if "lora_A" in name]
    assert adapted
    assert not [name for name in adapted if name.startswith("decoder")]
    torch.testing.assert_close(run(pipe), run(load_pipeline(merged, device="cpu")), rtol=0, atol=3e-5)


def test_kept_base_is_unmerged(published, kept):
    for side in ("transformer", "vae"):
        base, result = load_file(published.base / side / WEIGHTS), load_file(kept / side / WEIGHTS)
        assert base.keys() == result.keys()
        assert all(torch.equal(base[key], result[key]) for key in base)


def test_kept_lora_file(published, kept, networks):
    with safe_open(kept / LORA, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    for side in ("transformer", "vae"):
        assert config[f"{side}.r"] == config[f"{side}.lora_alpha"] == networks.rank
        assert sorted(config[f"{side}.target_modules"]) == sorted(networks.modules[side])
    tensors = load_file(kept / LORA)
    for side in ("transformer", "vae"):
        source = load_file(published.lora / f"{side}.safetensors")
        for key, tensor in source.items():
            assert torch.equal(tensors.pop(f"{side}.{key.removeprefix('transformer.')}"), tensor)
    assert not tensors


def test_merged_folder_has_no_lora_and_no_pickle(merged, kept):
    assert not (merged / LORA).exists()
    for folder in (merged, kept):
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("fp16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_dtype_option(published, merged, convert, tmp_path, name, dtype):
    result = weights(convert(published, tmp_path / "out", dtype=name))
    for side, tensors in weights(merged).items():
        # Rounded once, from the float32 merge.
        assert all(torch.equal(result[side][key], tensor.to(dtype)) for key, tensor in tensors.items())
        assert {tensor.dtype for tensor in result[side].values()} == {dtype}


def test_dtype_option_reaches_a_kept_lora(published, convert, tmp_path):
    out = convert(published, tmp_path / "out", dtype="fp16", keep_lora=True)
    assert {tensor.dtype for tensor in load_file(out / LORA).values()} == {torch.float16}


def test_unknown_dtype_is_refused(refused):
    refused("dtype", "int8", "bfloat16", dtype="int8")


def test_types_of_the_base_are_kept_and_merged_in_float32(layout, convert, networks, tmp_path):
    networks.transformer().to(torch.bfloat16).save_pretrained(layout.base / "transformer")
    networks.vae().to(torch.float16).save_pretrained(layout.base / "vae")
    out = convert(layout, tmp_path / "out")
    # The largest relative error of one rounding to the type.
    for side, dtype, rounding in (("transformer", torch.bfloat16, 2**-8), ("vae", torch.float16, 2**-11)):
        expected = expected_merge(layout, side)
        for key, tensor in load_file(out / side / WEIGHTS).items():
            assert tensor.dtype == dtype
            torch.testing.assert_close(tensor.double(), expected[key], rtol=1.01 * rounding, atol=1e-6, msg=key)
    assert {tensor.dtype for tensor in weights(out)["prompt_embeddings"].values()} == {torch.bfloat16}


def test_sharded_base(layout, convert, merged, networks, tmp_path):
    for side in ("transformer", "vae"):
        shutil.rmtree(layout.base / side)
        getattr(networks, side)().save_pretrained(layout.base / side, max_shard_size="30KB")
        assert len(list((layout.base / side).glob("*-of-*.safetensors"))) > 1
    assert_same_weights(convert(layout, tmp_path / "out"), merged)


@pytest.mark.parametrize("shard_size", ["1GB", "15KB"])
def test_fp16_variant_of_the_base(layout, convert, networks, tmp_path, shard_size):
    for side in ("transformer", "vae"):
        shutil.rmtree(layout.base / side)
        model = getattr(networks, side)().half()
        model.save_pretrained(layout.base / side, variant="fp16", max_shard_size=shard_size)
        assert (len(list((layout.base / side).glob("*.safetensors"))) > 1) == (shard_size == "15KB")
    variant = convert(layout, tmp_path / "variant")
    for side in ("transformer", "vae"):
        shutil.rmtree(layout.base / side)
        getattr(networks, side)().half().save_pretrained(layout.base / side)
    assert weights(variant)["vae"]["encoder.conv_in.weight"].dtype == torch.float16
    assert_same_weights(variant, convert(layout, tmp_path / "plain"))


def test_full_precision_is_preferred_to_the_fp16_variant(layout, convert, merged, networks, tmp_path):
    networks.transformer().half().save_pretrained(layout.base / "transformer", variant="fp16")
    assert_same_weights(convert(layout, tmp_path / "out"), merged)


def test_quant_conv_of_the_vae_carries_a_lora_where_it_exists(layout, convert, networks, refused, tmp_path):
    vae = networks.vae(use_quant_conv=True)
    vae.save_pretrained(layout.base / "vae")
    refused(layout.lora / "vae.safetensors", "quant_conv")
    lora = networks.random_lora(vae, [*networks.modules["vae"], "quant_conv"], 5)
    save_file(lora, layout.lora / "vae.safetensors")
    out = convert(layout, tmp_path / "out")
    assert not torch.equal(load_file(out / "vae" / WEIGHTS)["quant_conv.weight"], vae.quant_conv.weight)


def test_embeddings_become_safetensors(published, merged):
    prompt = PromptEmbeddings.from_pretrained(merged / "prompt_embeddings", local_files_only=True)
    for name, file in (("prompt_embeds", "prompt_embeds.pt"), ("pooled_prompt_embeds", "pool_embeds.pt")):
        original = torch.load(published.embeddings / file, weights_only=True)
        assert torch.equal(getattr(prompt, name), original)


def test_embeddings_may_be_safetensors_already(layout, convert, merged, tmp_path):
    for stem in ("prompt_embeds", "pool_embeds"):
        file = layout.embeddings / f"{stem}.pt"
        save_file({"anything": torch.load(file, weights_only=True)}, file.with_suffix(".safetensors"))
        file.unlink()
    assert_same_weights(convert(layout, tmp_path / "out"), merged)


def test_embeddings_of_the_old_torch_format(layout, convert, merged, tmp_path):
    for file in layout.embeddings.iterdir():
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert_same_weights(convert(layout, tmp_path / "out"), merged)


def test_half_precision_lora(layout, convert, merged, tmp_path):
    for file in layout.lora.iterdir():
        save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
    result, reference = weights(convert(layout, tmp_path / "out")), weights(merged)
    for side in ("transformer", "vae"):
        for key, tensor in result[side].items():
            torch.testing.assert_close(tensor, reference[side][key], rtol=0, atol=2e-3, msg=key)


def test_pipeline_index_and_scheduler(merged):
    index = json.loads((merged / "model_index.json").read_text())
    assert index["_class_name"] == "TSDSRPipeline"
    pipe = TSDSRPipeline.from_pretrained(merged, local_files_only=True)
    assert pipe.config.use_shift_factor is False
    assert pipe.config.timestep == 1000
    assert pipe.scheduler.config.shift == 3.0
    assert pipe.text_encoder is None


def test_text_encoders_of_the_base_are_left_out(layout, convert, merged, tree, tmp_path):
    (layout.base / "text_encoder").mkdir()
    (layout.base / "text_encoder" / "model.safetensors").write_bytes(b"never read")
    (layout.base / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusion3Pipeline",
                "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            }
        )
    )
    assert tree(convert(layout, tmp_path / "out")).keys() == tree(merged).keys()


def test_nothing_in_the_folder_tells_where_it_was_made(merged, kept, published):
    for folder in (merged, kept):
        for file in folder.rglob("*"):
            if file.suffix in (".json", ".md"):
                text = file.read_text(encoding="utf-8")
                assert str(published.root) not in text, file
                assert str(folder.parent) not in text, file
                assert ".partial" not in text, file


def test_inputs_are_only_read(layout, convert, tree, tmp_path):
    before = tree(layout.root)
    convert(layout, tmp_path / "out")
    convert(layout, tmp_path / "out", keep_lora=True, overwrite=True)
    assert tree(layout.root) == before


# --- the model card -------------------------------------------------------------------------------------------------


def card(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_model_card(merged, kept):
    front, body = card(merged)
    assert front["library_name"] == "diffusers"
    assert "tsd-sr" in front["tags"]
    assert "license" not in front
    assert "could not be told" in body
    assert 'TSDSRPipeline.from_pretrained("model")' in body
    assert "rank 4 (transformer) and 4 (vae)" in body
    assert "load_lora_weights" not in body
    assert 'pipe.load_lora_weights("model")' in card(kept)[1]


def test_licence_of_the_base_is_handed_on(layout, convert, tmp_path):
    (layout.base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-community-licence\nlicense_link: https://example.org/licence\n---\n"
    )
    front, body = card(convert(layout, tmp_path / "out"))
    assert front["license"] == "other"
    assert front["license_name"] == "some-community-licence"
    assert front["license_link"] == "https://example.org/licence"
    assert "some-community-licence" in body


# --- the output folder ----------------------------------------------------------------------------------------------


def test_missing_parents_are_made_and_the_path_is_returned(published, convert, tree, tmp_path):
    out = convert(published, str(tmp_path / "a" / "b" / "out"))
    assert out == (tmp_path / "a" / "b" / "out").resolve()
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["out"]
    assert (out / "model_index.json").is_file()


def test_an_empty_output_folder_is_used(published, convert, tmp_path):
    (tmp_path / "out").mkdir()
    convert(published, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_an_existing_folder_is_kept_without_overwrite(merged, refused, tmp_path):
    shutil.copytree(merged, tmp_path / "out")
    refused(tmp_path / "out", "overwrit", output="out")


def test_overwrite_replaces_the_whole_pipeline_folder(merged, convert, layout, tree, tmp_path):
    shutil.copytree(merged, tmp_path / "out")
    (tmp_path / "out" / "stray.txt").write_text("of the old one")
    convert(layout, tmp_path / "out", overwrite=True, keep_lora=True)
    assert not (tmp_path / "out" / "stray.txt").exists()
    assert (tmp_path / "out" / LORA).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_overwrite_spares_a_folder_that_is_no_pipeline(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused(tmp_path / "out", "model_index.json", output="out", overwrite=True)


def test_a_file_at_the_output_is_refused(refused, tmp_path):
    (tmp_path / "out").write_text("a file")
    refused(tmp_path / "out", "not a folder", output="out", overwrite=True)


def test_a_linked_output_folder_is_replaced_behind_its_link(merged, published, convert, tmp_path):
    shutil.copytree(merged, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert convert(published, tmp_path / "link", overwrite=True, keep_lora=True) == (tmp_path / "real").resolve()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / LORA).is_file()


@pytest.mark.parametrize("output", ["in/sd3", "in/lora", "in/embeddings", "in"])
def test_output_over_an_input_is_refused(layout, refused, tmp_path, output):
    # Even where it passes for a pipeline folder that may be overwritten.
    (tmp_path / output / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    refused(tmp_path / output, "another output folder", output=output, overwrite=True)


def test_output_over_an_input_is_refused_through_a_link(layout, refused, tmp_path):
    (layout.base / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    (tmp_path / "link").symlink_to(layout.base, target_is_directory=True)
    refused("another output folder", output="link", overwrite=True)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("output", ["out", "fresh/deep/out"])
def test_a_failure_while_writing_leaves_nothing(merged, layout, convert, tree, tmp_path, monkeypatch, error, output):
    """`out` is there and to be replaced; the other one is not there, and neither are its parents."""
    shutil.copytree(merged, tmp_path / "out")
    before = tree(tmp_path)
    seen = []

    def fail(folder, *_):
        seen.append(sorted(path.name for path in folder.iterdir()))
        raise error

    monkeypatch.setattr(convert_module.model_card, "write_card", fail)
    with pytest.raises(type(error)):
        convert(layout, tmp_path / output, overwrite=True, keep_lora=True)
    assert LORA in seen[0]
    assert tree(tmp_path) == before


def test_a_failure_of_the_last_rename_brings_the_old_folder_back(merged, layout, convert, tree, tmp_path, monkeypatch):
    shutil.copytree(merged, tmp_path / "out")
    before = tree(tmp_path)
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".partial"):
            raise OSError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="in use"):
        convert(layout, tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before


def test_overflow_in_float16_leaves_nothing(layout, merged, refused, networks, tmp_path):
    model = networks.transformer()
    with torch.no_grad():
        model.proj_out.weight[0, 0] = 1e6
    model.save_pretrained(layout.base / "transformer")
    shutil.copytree(merged, tmp_path / "out")
    refused(WEIGHTS, "proj_out.weight", "float16", output="out", overwrite=True, dtype="fp16")


# --- the golden example ---------------------------------------------------------------------------------------------


def test_golden_layout_predicts_as_published(convert, tmp_path):
    if not GOLDEN.is_dir():
        pytest.skip(f"{GOLDEN} is not there")
    golden = SimpleNamespace(base=GOLDEN / "sd3", lora=GOLDEN / "lora", embeddings=GOLDEN / "embeddings")
    out = convert(golden, tmp_path / "out")
    transformer = SD3Transformer2DModel.from_pretrained(out / "transformer", local_files_only=True)
    prompt = PromptEmbeddings.from_pretrained(out / "prompt_embeddings", local_files_only=True)
    values = load_file(GOLDEN / "official_x4_nofix.safetensors")
    with torch.no_grad():
        prompt_embeds, pooled = prompt()
        result = transformer(
            values["square_128x128.png.latent_lq"], prompt_embeds, pooled, torch.tensor([1000.0]), return_dict=False
        )[0]
    expected = values["square_128x128.png.prediction"]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * float(expected.max() - expected.min()))


def test_error_class_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)
