"""`tsdsr upscale`, from pictures on disk to pictures on disk."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tsdsr.cli import upscale as command
from tsdsr.cli.progress import Display
from tsdsr.imaging import SUPPORTED_OUTPUT_SUFFIXES, PictureWriter


def size(path):
    with Image.open(path) as image:
        image.load()
        return image.size


def assert_done(result):
    assert result.exit_code == 0, result.output
    assert result.stderr == ""


# Where results go


def test_default_name_and_factor(upscale, photo, files, tmp_path):
    result = upscale(photo(tmp_path / "photo.jpg"))
    assert_done(result)
    assert files(tmp_path) == ["photo.jpg", "photo_x4.png"]
    assert size(tmp_path / "photo_x4.png") == (48, 40)
    assert f"{tmp_path / 'photo.jpg'} -> {tmp_path / 'photo_x4.png'} (48x40, " in result.stdout


@pytest.mark.parametrize(
    ("factor", "width", "height", "expected"),
    [(2, 12, 10, (24, 20)), (1.5, 13, 9, (20, 14)), (1, 5, 7, (5, 7)), (3.3, 7, 3, (23, 10))],
)
def test_exact_sizes(upscale, photo, tmp_path, factor, width, height, expected):
    """Of odd factors and sizes: 1.5 * 13 = 19.5 and 1.5 * 9 = 13.5 are rounded to even."""
    assert_done(upscale(photo(tmp_path / "a.png", width, height), "--upscale", factor, "-o", tmp_path / "b.png"))
    assert size(tmp_path / "b.png") == expected


def test_a_pipeline_over_a_unet(tsdsr, make_pipeline, small_tiles, photo, tmp_path):
    make_pipeline("kl", network="unet").save_pretrained(tmp_path / "model")
    picture = photo(tmp_path / "a.png", 13, 9)
    assert_done(tsdsr("upscale", "-m", tmp_path / "model", *small_tiles, picture, "-o", tmp_path / "b.png"))
    assert size(tmp_path / "b.png") == (52, 36)


@pytest.fixture
def loras(kl_model, tmp_path):
    """Two published folders with LoRAs on one layer of the VAE and one of the transformer each."""
    folders = []
    for seed in (1, 2):
        generator, folder = torch.Generator().manual_seed(seed), tmp_path / f"lora{seed}"
        folder.mkdir()
        for side, module, out, rest in (
            ("vae", "encoder.conv_in", 8, (3, 3, 3)),
            ("transformer", "proj_out", 16, (16,)),
        ):
            down = torch.randn(2, *rest, generator=generator)
            up = torch.randn(out, 2, *(1 for _ in rest[1:]), generator=generator)
            state = {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
            save_file(state, folder / f"{side}.safetensors")
        folders.append(folder)
    return folders


def test_loras_and_their_mix(tsdsr, kl_model, loras, small_tiles, photo, tmp_path):
    picture = photo(tmp_path / "a.png", 13, 9)
    both = ("--lora", loras[0], "--lora", loras[1])
    results = []
    for number, options in enumerate(
        [(), ("--lora", loras[0]), (*both, "--fidelity", 0), (*both, "--fidelity", 1), ("--lora", loras[1])]
    ):
        output = tmp_path / f"{number}.png"
        assert_done(tsdsr("upscale", "-m", kl_model, *small_tiles, *options, picture, "-o", output))
        results.append(np.asarray(Image.open(output)).astype(int))
    plain, first, mixed_first, mixed_second, second = results
    assert np.abs(first - mixed_first).max() <= 1 and np.abs(second - mixed_second).max() <= 1
    assert np.abs(first - plain).max() > 20 and np.abs(first - second).max() > 20


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--lora", "{0}", "--lora", "{1}"), "--fidelity"),
        (("--lora", "{0}", "--fidelity", "0.5"), "loaded: ['lora_0']"),
        (("--lora", "{0}", "--lora", "{1}", "--fidelity", "2"), "from 0 to 1"),
        (("--lora", "nowhere"), "LoRA nowhere does not exist"),
        (("--lora", "{model}/vae"), "holds no LoRA for this model"),
        (("--lora", "{0}", "--model", "embedded"), "holds no LoRA for this model"),
    ],
)
def test_loras_that_cannot_be_used(tsdsr, kl_model, loras, small_tiles, photo, tmp_path, options, named):
    options = [option.format(*loras, model=kl_model) for option in options]
    picture = photo(tmp_path / "a.png")
    result = tsdsr("upscale", "-m", kl_model, *small_tiles, *options, picture, "-o", tmp_path / "b.png")
    assert result.exit_code == 2 and named in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not (tmp_path / "b.png").exists()


def test_output_file_decides_the_format(upscale, photo, files, tmp_path):
    assert_done(upscale(photo(tmp_path / "a.png"), "-o", tmp_path / "b.jpg", "--quality", 80, "--upscale", 2))
    assert files(tmp_path) == ["a.png", "b.jpg"]
    with Image.open(tmp_path / "b.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (24, 20))


def test_output_folder_is_made(upscale, photo, files, tmp_path):
    assert_done(upscale(photo(tmp_path / "a.jpg"), "-o", f"{tmp_path}/new/folder/", "--upscale", 2))
    assert files(tmp_path) == ["a.jpg", "new/folder/a.png"]


def test_folder_in_folder_out_and_again(upscale, photo, files, tmp_path):
    for name in ("2.jpg", "10.png", "1.bmp"):
        photo(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    result = upscale(tmp_path / "in", "-o", tmp_path / "out", "--upscale", 2)
    assert_done(result)
    assert files(tmp_path / "out") == ["1.png", "10.png", "2.png"]
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["[1/3]", "[2/3]", "[3/3]"]
    assert [os.path.basename(line.split()[1]) for line in lines] == ["1.bmp", "2.jpg", "10.png"]

    # A picture that came later is all that a second run has to do.
    photo(tmp_path / "in" / "3.png")
    result = upscale(tmp_path / "in", "-o", tmp_path / "out", "--upscale", 2)
    assert_done(result)
    assert files(tmp_path / "out") == ["1.png", "10.png", "2.png", "3.png"]
    assert result.stdout.count("kept ") == 3 and result.stdout.count(" -> ") == 1


def test_format_of_results(upscale, photo, files, tmp_path):
    assert_done(upscale(photo(tmp_path / "a.png"), photo(tmp_path / "b.tif"), "--format", "jpg", "--upscale", 1))
    assert files(tmp_path) == ["a.png", "a_x1.jpg", "b.tif", "b_x1.jpg"]


def test_existing_results_are_kept_unless_overwrite(upscale, photo, tmp_path):
    result_file = tmp_path / "b.png"
    result_file.write_bytes(b"an older result")
    result = upscale(photo(tmp_path / "a.png"), "-o", result_file, "--upscale", 1)
    assert_done(result)
    assert result_file.read_bytes() == b"an older result"
    assert f"kept {result_file}" in result.stdout and "--overwrite" in result.stdout
    result = upscale(photo(tmp_path / "a.png"), "-o", result_file, "--upscale", 1, "--overwrite")
    assert_done(result)
    assert size(result_file) == (12, 10)


def test_existing_results_are_kept_under_every_name(upscale, photo, files, tmp_path):
    (tmp_path / "b.png").write_bytes(b"an older result")
    assert_done(upscale(photo(tmp_path / "a.png"), "-o", f"{tmp_path}/new/../b.png", "--upscale", 1))
    assert files(tmp_path) == ["a.png", "b.png"]
    assert (tmp_path / "b.png").read_bytes() == b"an older result"


def test_a_picture_is_never_overwritten(upscale, photo, assert_refused, tmp_path):
    path = photo(tmp_path / "a.png")
    before = path.read_bytes()
    assert_refused(upscale(path, "-o", path, "--overwrite"), path, "never overwritten")
    assert path.read_bytes() == before


# Every kind of picture


@pytest.fixture(scope="module")
def gallery(upscale, photo, tmp_path_factory):
    """Folder of results, x2, of one picture of every kind, all in one run."""
    folder = tmp_path_factory.mktemp("gallery")
    red_blue = Image.open(photo(folder / "rgb.png", 20, 12)).copy()
    alpha = Image.new("L", red_blue.size, 255)
    alpha.paste(0, (0, 0, 10, 12))

    with_alpha = red_blue.copy()
    with_alpha.putalpha(alpha)
    with_alpha.save(folder / "rgba.png")
    deep = np.linspace(0, 65535, 20 * 12).reshape(12, 20).astype(np.uint16)
    Image.fromarray(deep).save(folder / "grey16.png", dpi=(300, 300))
    Image.fromarray((deep / 65535).astype(np.float32)).save(folder / "float.tif")
    red_blue.convert("L").save(folder / "grey.png")
    red_blue.quantize(8).save(folder / "palette.png", transparency=0)
    red_blue.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    red_blue.convert("1").save(folder / "bilevel.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    red_blue.save(folder / "turned.jpg", quality=95, exif=exif)
    photo(folder / "dot.png", 1, 1)
    photo(folder / "strip.png", 3, 40)
    result = upscale(folder, "-o", folder / "out", "--upscale", 2)
    assert_done(result)
    return folder / "out"


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("rgb", "RGB", (40, 24)),
        ("rgba", "RGBA", (40, 24)),
        ("grey16", "I;16", (40, 24)),
        ("float", "I;16", (40, 24)),
        ("grey", "L", (40, 24)),
        ("palette", "RGBA", (40, 24)),
        ("cmyk", "RGB", (40, 24)),
        ("bilevel", "L", (40, 24)),
        ("turned", "RGB", (24, 40)),
        ("dot", "RGB", (2, 2)),
        ("strip", "RGB", (6, 80)),
    ],
)
def test_size_and_mode_of_every_kind(gallery, name, mode, expected):
    with Image.open(gallery / f"{name}.png") as image:
        image.load()
        assert (image.mode, image.size) == (mode, expected)


@pytest.mark.parametrize("name", ["rgb", "rgba", "cmyk", "palette"])
def test_colours_are_those_of_the_picture(gallery, name):
    """The wavelet correction gives the random network's result the colours of its input: red left, blue right."""
    pixels = np.asarray(Image.open(gallery / f"{name}.png").convert("RGB")).astype(int)
    left, right = pixels[:, :10].mean(axis=(0, 1)), pixels[:, -10:].mean(axis=(0, 1))
    assert right[2] - right[0] > 30
    # Hidden colours are those of the visible neighbours.
    assert (left[2] - left[0] > 30) if name in ("rgba", "palette") else (left[0] - left[2] > 30)


def test_an_exif_turned_picture_is_upright_once(gallery):
    """Orientation 6: the stored left side, red, is the top."""
    with Image.open(gallery / "turned.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
        assert image.getexif().get(0x0112, 1) == 1
    top, bottom = pixels[:10].mean(axis=(0, 1)), pixels[-10:].mean(axis=(0, 1))
    assert top[0] - top[2] > 30 and bottom[2] - bottom[0] > 30


def test_alpha_is_that_of_the_picture(gallery):
    alpha = np.asarray(Image.open(gallery / "rgba.png"))[..., 3]
    assert (alpha[:, :17] < 10).all() and (alpha[:, 23:] > 245).all()


def test_16_bit_values_use_their_depth(gallery):
    with Image.open(gallery / "grey16.png") as image:
        values = np.asarray(image)
        assert image.info["dpi"] == pytest.approx((600, 600), rel=1e-3)
    assert len(np.unique(values)) > 256
    assert (values % 257 != 0).mean() > 0.9  # not 8-bit values spread out


@pytest.mark.parametrize("color_fix", ["none", "adain", "lab"])
def test_colour_corrections_differ_from_the_default(upscale, gallery, tmp_path, color_fix):
    source = gallery.parent / "rgb.png"
    assert_done(upscale(source, "--upscale", 2, "--color-fix", color_fix, "-o", tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes() != (gallery / "rgb.png").read_bytes()


def test_repetition_gives_the_same_file_whatever_the_seed(upscale, gallery, tmp_path):
    source = gallery.parent / "rgb.png"
    for name, seed in (("a.png", 7), ("b.png", 2**64 - 1)):
        assert_done(upscale(source, "--upscale", 2, "--seed", seed, "-o", tmp_path / name))
        assert (tmp_path / name).read_bytes() == (gallery / "rgb.png").read_bytes()


def test_the_seed_decides_the_draw_from_the_posterior(upscale, kl_model, gallery, tmp_path):
    source = gallery.parent / "rgb.png"
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        arguments = ("--model", kl_model, "--upscale", 2, "--sample-posterior", "--seed", seed)
        assert_done(upscale(source, *arguments, "-o", tmp_path / name))
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == again != other


def test_dtype_reaches_the_networks(upscale, photo, tmp_path):
    source = photo(tmp_path / "a.png")
    for dtype in ("fp32", "bf16"):
        arguments = ("--upscale", 2, "--color-fix", "none", "--dtype", dtype, "--device", "cpu")
        assert_done(upscale(source, *arguments, "-o", tmp_path / f"{dtype}.png"))
    pictures = [np.asarray(Image.open(tmp_path / f"{dtype}.png")).astype(int) for dtype in ("fp32", "bf16")]
    difference = np.abs(pictures[0] - pictures[1])
    assert 0 < difference.max() < 16


# What goes wrong


@pytest.fixture
def broken():
    """Function that saves a file that is none of the pictures it says it is."""

    def save(path, kind):
        if kind == "truncated":
            Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(path)
            path.write_bytes(path.read_bytes()[:900])
        else:
            path.write_bytes({"zero-byte": b"", "text": b"Dear diary, ...\n"}[kind])
        return path

    return save


@pytest.mark.parametrize("kind", ["truncated", "zero-byte", "text"])
def test_a_single_broken_picture(upscale, broken, assert_refused, files, tmp_path, kind):
    path = broken(tmp_path / "broken.png", kind)
    assert_refused(upscale(path, "-o", f"{tmp_path}/out/"), path)
    assert files(tmp_path) == ["broken.png"]
    assert not (tmp_path / "out").exists()


def test_broken_ones_among_many_are_skipped(upscale, photo, broken, files, tmp_path):
    for kind in ("truncated", "zero-byte", "text"):
        broken(tmp_path / f"1-{kind}.png", kind)
    photo(tmp_path / "0.png")
    photo(tmp_path / "2.png")
    result = upscale(tmp_path, "-o", tmp_path / "out", "--upscale", 1)
    assert result.exit_code == 1
    assert files(tmp_path / "out") == ["0.png", "2.png"]
    lines = result.stderr.splitlines()
    assert len(lines) == 4
    for line, kind in zip(lines, ("text", "truncated", "zero-byte"), strict=False):
        assert f"skipped {tmp_path / f'1-{kind}.png'}: " in line
    assert lines[-1] == "tsdsr: 3 of 5 pictures were skipped."
    assert "Traceback" not in result.output


def test_debug_shows_where(upscale, photo, broken, tmp_path):
    broken(tmp_path / "broken.png", "text")
    assert "Traceback" in upscale(tmp_path / "broken.png", "--debug").stderr


@pytest.mark.skipif(".webp" not in SUPPORTED_OUTPUT_SUFFIXES, reason="this Pillow has no WebP")
def test_a_result_that_cannot_be_written_among_many_is_skipped(upscale, photo, files, tmp_path):
    """WebP allows sides of up to 16383 pixels. The first picture is too long for it, the second is not."""
    photo(tmp_path / "1.png", 16384, 1)
    photo(tmp_path / "2.png")
    small = ("--upscale", 1, "--process-size", 0, "--tile-size", 128)
    result = upscale(tmp_path, "-o", tmp_path / "out", "--format", "webp", *small)
    assert files(tmp_path / "out") == ["2.webp"]
    assert result.exit_code == 1
    assert f"skipped {tmp_path / '1.png'}: " in result.stderr and "16384" in result.stderr


def test_too_large_a_picture_names_the_option(upscale, photo, assert_refused, monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = photo(tmp_path / "a.png")
    assert_refused(upscale(path), path, "--allow-large")
    assert_done(upscale(path, "--allow-large", "--upscale", 1))
    monkeypatch.undo()
    assert size(tmp_path / "a_x1.png") == (12, 10)


def test_missing_input(upscale, photo, assert_refused, files, tmp_path):
    photo(tmp_path / "a.png")
    assert_refused(upscale(tmp_path / "a.png", tmp_path / "none.png"), tmp_path / "none.png", "does not exist")
    assert files(tmp_path) == ["a.png"]


def test_empty_folder(upscale, assert_refused, tmp_path):
    assert_refused(upscale(tmp_path), tmp_path, "no pictures")


def test_several_pictures_into_one_file(upscale, photo, assert_refused, tmp_path):
    assert_refused(upscale(photo(tmp_path / "a.png"), photo(tmp_path / "b.png"), "-o", "out.png"), "out.png", "folder")


def test_unknown_models(tsdsr, photo, assert_refused, files, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    path = photo(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    for model, part in (
        (tmp_path / "none", "does not exist"),
        ("./none", "does not exist"),
        (tmp_path / "folder", "not a pipeline folder"),
        ("nonsense", "neither a folder nor a Hub id"),
        ("no-such-owner-here/nothing", "no-such-owner-here/nothing"),
    ):
        assert_refused(tsdsr("upscale", path, "--model", model), part)
    assert files(tmp_path) == ["a.png"]


def test_a_model_folder_that_lacks_a_part(tsdsr, model, photo, assert_refused, tmp_path):
    import shutil

    shutil.copytree(model, tmp_path / "model")
    next((tmp_path / "model" / "vae").glob("*.safetensors")).unlink()
    assert_refused(tsdsr("upscale", photo(tmp_path / "a.png"), "--model", tmp_path / "model"))


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--upscale", "0.5", "upscale"),
        ("--upscale", "nan", "upscale"),
        ("--upscale", "inf", "upscale"),
        ("--tile-size", "4", "tile_size"),
        ("--tile-overlap", "64", "tile_overlap"),
        ("--tile-batch-size", "0", "tile_batch_size"),
        ("--process-size", "-1", "process_size"),
        ("--device", "cuda:99", "cuda:99"),
        ("--device", "abacus", "abacus"),
    ],
)
def test_values_that_the_pipeline_refuses(upscale, photo, assert_refused, files, tmp_path, option, value, part):
    """At once, not once a picture."""
    assert_refused(upscale(photo(tmp_path / "a.png"), photo(tmp_path / "b.png"), option, value), part)
    assert files(tmp_path) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--upscale", "four"),
        ("--color-fix", "sepia"),
        ("--dtype", "int8"),
        ("--format", "xyz"),
        ("--quality", "0"),
        ("--quality", "101"),
        ("--seed", "x"),
        ("--seed", str(2**64)),
        ("--tile", "7"),
        ("--no-such-option",),
    ],
)
def test_options_that_are_none(upscale, photo, files, tmp_path, arguments):
    result = upscale(photo(tmp_path / "a.png"), *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr and "Usage" in result.stderr
    assert files(tmp_path) == ["a.png"]


def test_no_input_at_all(tsdsr):
    result = tsdsr("upscale")
    assert result.exit_code == 2
    assert "INPUT" in result.stderr


# Ctrl-C


def test_interrupt_keeps_what_is_finished(upscale, photo, files, monkeypatch, tmp_path):
    tiles = Display.tiles

    def interrupt_in_the_second(display, done, total):
        if display.finished == 1 and done > 1:
            raise KeyboardInterrupt
        tiles(display, done, total)

    monkeypatch.setattr(Display, "tiles", interrupt_in_the_second)
    for name in ("1.png", "2.png", "3.png"):
        photo(tmp_path / name)
    result = upscale(tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert files(tmp_path / "out") == ["1.png"]
    assert size(tmp_path / "out" / "1.png") == (48, 40)
    assert result.stderr == "tsdsr: interrupted. 1 of 3 pictures are finished and kept.\n"


@pytest.mark.parametrize("name", ["b.png", "b.jpg"])
def test_interrupt_while_a_result_is_written(upscale, photo, files, monkeypatch, tmp_path, name):
    def interrupt(writer, rows):
        write(writer, rows[:3])
        raise KeyboardInterrupt

    path = photo(tmp_path / "a.png")
    write = PictureWriter.write
    monkeypatch.setattr(PictureWriter, "write", interrupt)
    result = upscale(path, "--upscale", 1, "-o", tmp_path / name)
    assert result.exit_code == 130
    assert files(tmp_path) == ["a.png"]
    assert result.stderr == "tsdsr: interrupted.\n"


# Defaults


def test_options_left_out_have_the_defaults_of_the_pipeline(photo, monkeypatch, tmp_path):
    """The command hands over what was given and nothing else: no default is written down a second time."""
    seen = []
    monkeypatch.setattr(command, "run", lambda jobs, settings, *rest: seen.append(settings))
    from typer.testing import CliRunner

    from tsdsr.cli import app

    assert CliRunner().invoke(app, ["upscale", str(photo(tmp_path / "a.png"))]).exit_code == 0
    assert seen == [command.Settings("embedded", loading={}, calling={}, writing={})]


# As users run it


def test_as_a_program_of_its_own(model, small_tiles, photo, files, tmp_path):
    photo(tmp_path / "in" / "a.jpg")
    photo(tmp_path / "in" / "b.png")
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "PYTHONWARNINGS")}
    finished = subprocess.run(
        [sys.executable, "-m", "tsdsr", "upscale", "in", "-o", "out", "--model", str(model), *small_tiles],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert len(finished.stdout.splitlines()) == 2
    assert files(tmp_path / "out") == ["a.png", "b.png"]
    assert size(tmp_path / "out" / "a.png") == (48, 40)
