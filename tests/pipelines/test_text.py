"""Prompts through a base's text encoders."""

import json
import warnings
from weakref import finalize

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from tsdsr import PromptEmbeddings, TSDSRPipeline
from tsdsr.pipelines.text import NoTextEncoders, TruncatedPromptWarning, embed_prompt, load_text_encoder

SMALL = {"upscale": 2, "process_size": 32, "tile_size": 32, "tile_overlap": 8, "output_type": "latent"}
LAYOUTS = ["sd3", "sd3 without t5", "sd2"]
PROMPTS = ["red", "", "many words of letters"]


@pytest.fixture(scope="module")
def bases(save_text_base, tmp_path_factory):
    """The folders of a base of every layout."""
    folder = tmp_path_factory.mktemp("bases")
    return {layout: save_text_base(folder / layout, layout[:3], t5=layout == "sd3") for layout in LAYOUTS}


def parts_of(base, layout):
    """Text encoders and tokenizers, loaded by transformers, in the number formats that prompts are embedded in."""
    clip = CLIPTextModel if layout == "sd2" else CLIPTextModelWithProjection
    found = {}
    for suffix in ("",) if layout == "sd2" else ("", "_2"):
        folder = base / f"text_encoder{suffix}"
        found[f"text_encoder{suffix}"] = clip.from_pretrained(folder, dtype=torch.float32)
        found[f"tokenizer{suffix}"] = CLIPTokenizer.from_pretrained(base / f"tokenizer{suffix}")
    if layout == "sd3":
        found["text_encoder_3"] = T5EncoderModel.from_pretrained(base / "text_encoder_3", dtype=torch.bfloat16)
        found["tokenizer_3"] = T5TokenizerFast.from_pretrained(base / "tokenizer_3")
    return found


@pytest.fixture(scope="module")
def reference(bases):
    """What diffusers' own pipeline of a layout makes of prompts, the negative prompt included, in our order."""
    names = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]

    def encode(layout, prompt, **more):
        parts = parts_of(bases[layout], layout)
        with torch.no_grad():
            if layout == "sd2":
                others = dict.fromkeys(["vae", "unet", "scheduler", "safety_checker", "feature_extractor"])
                pipeline = StableDiffusionPipeline(**parts, **others, requires_safety_checker=False)
                embeds, negative = pipeline.encode_prompt(prompt, torch.device("cpu"), 1, True)
                return embeds, negative, None, None
            config = SD3Transformer2DModel.load_config(bases[layout] / "transformer")
            others = {"transformer": SD3Transformer2DModel.from_config(config), "scheduler": None, "vae": None}
            pipeline = StableDiffusion3Pipeline(**dict.fromkeys(names) | parts, **others)
            return pipeline.encode_prompt(prompt, None, None, device=torch.device("cpu"), **more)

    return encode


@pytest.fixture(scope="module")
def with_encoders(make_pipeline, bases):
    """A pipeline with the text encoders of a layout."""

    def make(layout, **more):
        return make_pipeline(
            "tiny", "unet" if layout == "sd2" else "transformer", **parts_of(bases[layout], layout), **more
        )

    return make


@pytest.mark.filterwarnings("ignore::tsdsr.pipelines.text.TruncatedPromptWarning")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_is_that_of_diffusers(bases, reference, layout, prompt):
    prompt_embeds, _, pooled_prompt_embeds, _ = reference(layout, prompt)
    embedded = embed_prompt(prompt, bases[layout])
    assert torch.equal(embedded.prompt_embeds, prompt_embeds.float())
    assert embedded.config.sequence_length == (8 if layout == "sd2" else 8 + 256)
    if layout == "sd2":
        assert embedded.pooled_prompt_embeds.shape == (1, 0)
    else:
        assert torch.equal(embedded.pooled_prompt_embeds, pooled_prompt_embeds.float())
        assert bool((prompt_embeds[:, 8:] == 0).all()) == (layout == "sd3 without t5")


def test_length_and_dtype_of_an_embedding(bases, reference):
    embedded = embed_prompt("red", bases["sd3"], dtype=torch.float16, max_sequence_length=9)
    expected = reference("sd3", "red", max_sequence_length=9)
    assert embedded.config.sequence_length == 17
    assert torch.equal(embedded.prompt_embeds, expected[0].half())
    assert torch.equal(embedded.pooled_prompt_embeds, expected[2].half())


def test_encoders_are_in_memory_one_at_a_time(bases, monkeypatch):
    alive, most = set(), []
    load = TSDSRPipeline.from_pretrained

    def counted(*arguments, **options):
        pipeline = load(*arguments, **options)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if (encoder := getattr(pipeline, name)) is not None:
                alive.add(name)
                finalize(encoder, alive.discard, name)
        most.append(len(alive))
        return pipeline

    monkeypatch.setattr(TSDSRPipeline, "from_pretrained", counted)
    embed_prompt("red", bases["sd3"])
    assert most == [0, 1, 1, 1] and not alive


@pytest.mark.parametrize(
    ("layout", "prompt", "length", "cut"),
    [
        ("sd3", "many words", 256, {"CLIP": "rds"}),
        ("sd3", "many words", 6, {"CLIP": "rds", "T5": "words"}),
        ("sd2", "many words", 256, {"CLIP": "rds"}),
        ("sd3", "abcdef", 256, {}),  # 8 tokens with those of beginning and end
        ("sd3 without t5", "abcdefg", 4, {"CLIP": "g"}),
    ],
)
def test_what_is_cut_is_said(bases, layout, prompt, length, cut):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TruncatedPromptWarning)
        embed_prompt(prompt, bases[layout], max_sequence_length=length)
    said = [str(one.message) for one in caught if one.category is TruncatedPromptWarning]
    assert [text.split()[0] for text in said] == list(cut)
    for text, end in zip(said, cut.values(), strict=True):
        assert text.endswith(f"the end of the prompt: {end}")


@pytest.mark.parametrize("prompt", ["red", ["red", "blue"]], ids=["one", "two"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pipelines_encode_as_diffusers_does(with_encoders, reference, layout, prompt):
    with torch.no_grad():
        ours = with_encoders(layout).encode_prompt(prompt, device=torch.device("cpu"))
    for mine, expected in zip(ours, reference(layout, prompt), strict=True):
        assert (mine is None and expected is None) or torch.equal(mine, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_is_the_same_as_text_and_embedded_before(
    make_pipeline, with_encoders, bases, picture, tmp_path, layout
):
    """As text; as tensors; as a component that was saved, where there are no text encoders."""
    pipeline, image = with_encoders(layout), picture(8, 8)
    expected = pipeline(image, prompt="red", **SMALL).images
    assert not torch.equal(expected, pipeline(image, **SMALL).images)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            "red", device=torch.device("cpu"), do_classifier_free_guidance=False
        )
    tensors = {"prompt_embeds": embeds, **({} if pooled is None else {"pooled_prompt_embeds": pooled})}
    assert torch.equal(pipeline(image, **tensors, **SMALL).images, expected)
    embed_prompt("red", bases[layout]).save_pretrained(tmp_path)
    network = "unet" if layout == "sd2" else "transformer"
    plain = make_pipeline("tiny", network, prompt_embeddings=PromptEmbeddings.from_pretrained(tmp_path))
    assert torch.equal(plain(image, **SMALL).images, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions(bases, reference, layout):
    """Several at once, in float32 whatever the encoders were saved in."""
    embeds, pooled = load_text_encoder(str(bases[layout]))(["red", "blue"])
    assert embeds.dtype == torch.float32 and len(embeds) == 2 and not torch.equal(*embeds)
    expected, _, expected_pooled, _ = reference(layout, ["red", "blue"])
    assert torch.equal(embeds, expected.float())
    assert (pooled is None and layout == "sd2") or torch.equal(pooled, expected_pooled.float())


def test_encoders_saved_in_half_precision(bases, tmp_path, reference, save_text_base):
    base = save_text_base(tmp_path, "sd2")
    CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float16).save_pretrained(base / "text_encoder")
    embeds, _ = load_text_encoder(str(base))(["red"])
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds, reference("sd2", "red")[0], atol=2e-2, rtol=0)
    assert torch.equal(embed_prompt("red", base).prompt_embeds, embeds)


def edit_index(base, **parts):
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({k: v for k, v in (index | parts).items() if v != "gone"}))


def test_parts_that_an_index_does_not_name(save_text_base, tmp_path):
    base = save_text_base(tmp_path, "sd3", t5=False)
    expected = embed_prompt("red", base)
    edit_index(base, text_encoder_3="gone", tokenizer_3="gone")
    assert torch.equal(embed_prompt("red", base).prompt_embeds, expected.prompt_embeds)


@pytest.mark.parametrize(
    ("kind", "parts", "named"),
    [
        ("sd3", {"text_encoder": [None, None]}, "no text_encoder,"),
        ("sd3", {"text_encoder_2": "gone"}, "no text_encoder_2,"),
        ("sd3", {"tokenizer_3": [None, None]}, "no tokenizer_3,"),
        ("sd2", {"tokenizer": [None, None]}, "no tokenizer,"),
        ("sd2", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "neither an SD3 nor an SD2"),
        ("sd3", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "neither an SD3 nor an SD2"),
    ],
)
def test_what_a_base_lacks_is_one_sentence(save_text_base, tmp_path, kind, parts, named):
    base = save_text_base(tmp_path, kind)
    edit_index(base, **parts)
    assert load_text_encoder(str(base)) is None
    with pytest.raises(NoTextEncoders, match=named) as caught:
        embed_prompt("red", base)
    assert "\n" not in str(caught.value) and str(base) in str(caught.value)


@pytest.mark.parametrize(
    ("base", "named"),
    [("embedded", "is baked"), ("./nowhere", "does not exist"), ("nowhere", "neither a folder")],
)
def test_names_that_are_no_base_with_text_encoders(base, named):
    with pytest.raises(ValueError, match=named):
        embed_prompt("red", base)
