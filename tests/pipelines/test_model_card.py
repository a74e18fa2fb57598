"""The one writer of model cards."""

import ast
import re

import pytest
import yaml

from tsdsr.pipelines.model_card import (
    complete_card,
    front_matter,
    results,
    shown_pictures,
    training,
    usage,
    write_card,
)

DATA = front_matter({"license": "mit"}, "owner/base")


def parts(path):
    _, front, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def blocks(markdown):
    return re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)


@pytest.fixture
def complete(tmp_path):
    """A function that completes a card and returns it: front matter and body."""

    def run(text, **more):
        path = tmp_path / "README.md"
        path.write_text(text)
        complete_card(path, "me/model", DATA, "NEW USE", **more)
        return parts(path)

    return run


def test_front_matter_states_what_the_hub_reads():
    stability = {"license": "other", "license_name": "x", "license_link": "https://example.org"}
    found = front_matter(stability, "owner/base", lora=True)
    assert found == {
        **stability,
        "base_model": "owner/base",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["super-resolution", "image-upscaling", "one-step", "tsd-sr", "lora"],
    }
    assert front_matter({}).keys() == {"library_name", "pipeline_tag", "tags"}


def test_a_whole_card(tmp_path):
    write_card(tmp_path, "Name", "About.", ["one", "two"], "USE", DATA, pictures="![alt](a.png)", results="TABLE")
    front, body = parts(tmp_path / "README.md")
    assert front == DATA
    licence = "The base model's licence, **mit**, applies to these weights as well."
    assert body == (
        "\n# Name\n\nAbout.\n\n![alt](a.png)\n\n* one\n* two\n\n## Use\n\nUSE\n\n## Results\n\nTABLE\n\n"
        f"## Licence\n\n{licence}\n"
    )
    write_card(tmp_path, "Name", "About.", [], "USE", front_matter({}), "Ask them.", training="COMMAND")
    body = parts(tmp_path / "README.md")[1]
    assert body == "\n# Name\n\nAbout.\n\n## Use\n\nUSE\n\n## Training\n\nCOMMAND\n\n## Licence\n\nAsk them.\n"


# --- the code in it


def calls(code):
    """The calls of a piece of code, by the name of the function: their arguments as they are written."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            arguments = [ast.unparse(value) for value in node.args]
            arguments += [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords]
            found[name] = [*found.get(name, []), arguments]
    return found


def test_code_for_a_pipeline():
    found = calls(*blocks(usage("me/model")))
    assert found["from_pretrained"] == [["'me/model'"]] and found["pipe"] == [["Image.open('photo.jpg')", "upscale=4"]]
    assert "load_lora_weights" not in found
    found = calls(*blocks(usage("me/model", lora=True, variant="fp16", prompt_embeddings=False, scale=2)))
    assert found["from_pretrained"] == [["'me/model'", "variant='fp16'"]]
    assert found["load_lora_weights"] == [["'me/model'"]]
    assert found["pipe"][0][1:] == ["upscale=2", "prompt='a sharp, detailed photograph'"]
    assert found["save"] == [["'photo_x2.png'"]]


def test_code_for_a_lora():
    found = calls(*blocks(usage("me/lora", base="owner/base", subfolder="lora")))
    assert found["from_pretrained"] == [
        ["'me/lora'", "subfolder='lora/prompt_embeddings'"],
        ["'owner/base'", "prompt_embeddings=prompt"],
    ]
    assert found["load_lora_weights"] == [["'me/lora'", "subfolder='lora'"]]
    found = calls(*blocks(usage("me/lora", base="owner/base", prompt_embeddings=False)))
    assert found["from_pretrained"] == [["'owner/base'"]] and found["load_lora_weights"] == [["'me/lora'"]]


def test_code_for_a_repository_with_code():
    with_package, without = blocks(usage("me/model", with_code=True))
    assert "tsdsr" in with_package and "tsdsr" not in without
    assert calls(without)["from_pretrained"] == [["'me/model'", "trust_remote_code=True"]]


# --- results, training


def test_results():
    metrics = {"student": {"psnr_y": 23.456, "lpips": 0.1}, "bicubic": {"psnr_y": 20, "lpips": 0.25}, "start": None}
    assert results(metrics, "two pictures") == (
        "On two pictures:\n\n| | PSNR-Y | LPIPS |\n| --- | --- | --- |\n| bicubic | 20 | 0.25 |\n"
        "| **this model** | 23.46 | 0.1 |"
    )
    assert results({}) == "" and not results(metrics).startswith("On")


def test_training():
    settings = {"train_data_dir": "photographs", "learning_rate": 0.001}
    text = training(settings, "my recipe.yaml")
    assert "--config 'my recipe.yaml' --train_data_dir PHOTOGRAPHS --output_dir OUTPUT\n" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == settings
    assert "PHOTOGRAPHS" not in training({"dataset_name": "owner/photographs"})


# --- cards that are there


def test_what_the_author_states_wins(complete):
    front, body = complete("---\nlicense: apache-2.0\ntags: [mine]\nextra: {a: 1}\n---\n# Title\n\nMy words.\n")
    assert front == {**DATA, "license": "apache-2.0", "tags": ["mine"], "extra": {"a": 1}}
    assert body == "# Title\n\nMy words.\n\n## Use\n\nNEW USE\n"


def test_a_card_without_front_matter(complete):
    front, body = complete("# Title\n")
    assert front == DATA and body.startswith("# Title\n")


def test_a_stated_front_matter_that_is_whole_stays_as_it_is_written(tmp_path):
    path = tmp_path / "README.md"
    text = "---\n# a remark\n" + yaml.safe_dump(DATA) + '---\n\n## Use\n\n`"me/model"`\n'
    path.write_text(text)
    complete_card(path, "me/model", DATA, "NEW USE")
    assert path.read_text() == text


@pytest.mark.parametrize("front", ["- a\n- b\n", "a: [1\n"])
def test_front_matter_that_cannot_be_read(complete, one_sentence, front):
    with pytest.raises(ValueError) as refused:
        complete(f"---\n{front}---\n# Title\n")
    one_sentence(refused.value, "README.md", "YAML")


@pytest.mark.parametrize("heading", ["## Use", "## Usage", "## USE  "])
def test_use_is_rewritten_where_it_leads_elsewhere(complete, heading):
    old = '```python\n## Deep\nload("me/model-large")\n```\n\n### Tips\n\nold'
    assert (
        complete(f"# T\n\n{heading}\n\n{old}\n\n## More\n\nkept\n")[1]
        == "# T\n\n## Use\n\nNEW USE\n\n## More\n\nkept\n"
    )


def test_use_that_names_the_repository_is_kept(complete):
    body = "# T\n\n## Use\n\n```python\n# T\n## Use\nload('me/model')\n```\n\n## More\n"
    assert complete(body)[1] == body


def test_use_comes_before_the_first_section(complete):
    body = "# T\n\nIntro.\n\n```sh\n## no heading\n```\n## Data\n\nx\n"
    expected = "# T\n\nIntro.\n\n```sh\n## no heading\n```\n\n## Use\n\nNEW USE\n\n## Data\n\nx\n"
    assert complete(body)[1] == expected


def test_pictures_go_below_the_title(complete):
    body = complete("```\n# no title\n```\n# T\nIntro.\n", pictures="![alt](a.png)")[1]
    assert body.startswith("```\n# no title\n```\n# T\n\n![alt](a.png)\n\nIntro.\n")
    assert complete("No title.\n", pictures="![alt](a.png)")[1].startswith("\n![alt](a.png)\n\nNo title.\n")


def test_shown_pictures(tmp_path):
    (tmp_path / "README.md").write_text(
        '![a](images/a%20b.PNG "title") [![b](https://img.shields.io/badge/x-y-blue)](b.png) '
        '<img width="9" src="c.webp">'
        " ![d](https://example.org/d.jpg?download=1) [no picture](e.png) ![f](f.pdf)"
    )
    assert shown_pictures(tmp_path / "README.md") == [
        "images/a b.PNG",
        "c.webp",
        "https://example.org/d.jpg?download=1",
    ]
