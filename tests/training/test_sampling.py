"""Many steps: against closed forms, against diffusers' schedulers, and on sheets."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from tsdsr.evaluation.sets import eight_bit
from tsdsr.imaging import Picture, read, write
from tsdsr.training import sampling as module
from tsdsr.training.base import load_base
from tsdsr.training.draws import SAMPLING, draws
from tsdsr.training.families import Ddpm, RectifiedFlow, guided_velocity
from tsdsr.training.objectives import add_noise, noise_levels
from tsdsr.training.sampling import Teacher, integrate, main, restoration_rows, restore, sample, trajectory
from tsdsr.training.validation import bicubic, psnr_y, validation_pairs

FAMILIES = ("flow", "epsilon", "v_prediction")
MEAN, DEVIATION = 0.5, 0.4


def family_of(name):
    if name == "flow":
        return RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0))
    # SD2's schedule of betas; clip_sample is of pictures, not latents.
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return Ddpm(DDPMScheduler(**betas, prediction_type=name, clip_sample=False))


class KnowsGaussians:
    """The best a network can predict where clean latents are N(MEAN, DEVIATION^2), in one parametrisation."""

    def __init__(self, name, scheduler):
        self.name, self.scheduler = name, scheduler

    def clean_and_noise(self, noisy, alpha, s):
        """E[clean | z] and E[noise | z] for z = alpha * clean + s * noise."""
        away = (noisy - alpha * MEAN) / (alpha**2 * DEVIATION**2 + s**2)
        return MEAN + alpha * DEVIATION**2 * away, s * away

    def __call__(self, noisy=None, timestep=None, hidden_states=None, **_):
        if self.name == "flow":
            sigma = (timestep / 1000).view(-1, 1, 1, 1)
            clean, noise = self.clean_and_noise(hidden_states, 1 - sigma, sigma)
            return (noise - clean,)
        cumulative = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        alpha, s = cumulative.sqrt(), (1 - cumulative).sqrt()
        clean, noise = self.clean_and_noise(noisy, alpha, s)
        predicted = noise if self.name == "epsilon" else alpha * noise - s * clean
        return type("Output", (), {"sample": predicted})


def flow_of_gaussians(z, sigma):
    """Where the probability-flow ODE leads z at sigma: quantiles stay what they are."""
    spread = ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) ** 0.5
    return MEAN + DEVIATION / spread * (z - (1 - sigma) * MEAN)


@pytest.fixture
def latents():
    """Latents and noise, (3, 2, 4, 4) each."""
    return torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def toy(name):
    family = family_of(name)
    return family.velocity(KnowsGaussians(name, family.scheduler), (torch.zeros(1, 1, 1), None)), family.scheduler


def real(make_pipeline, name):
    """Velocity, network and schedule of tiny networks with random weights."""
    family = family_of(name)
    pipeline = make_pipeline("kl", network="transformer" if name == "flow" else "unet")
    network = pipeline.transformer if name == "flow" else pipeline.unet
    prompt = pipeline.prompt_embeddings
    pooled = prompt.pooled_prompt_embeds.detach() if name == "flow" else None
    return family, network, (prompt.prompt_embeds.detach(), pooled)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("name", FAMILIES)
def test_samples_of_a_gaussian_in_closed_form(name, sampler, latents):
    """Noise goes where its quantile is; what is left is the error of the method, less for Heun's."""
    velocity, scheduler = toy(name)
    noise = latents[1]
    first = float(noise_levels(scheduler)[0])
    start = noise * (first**2 + (1 - first) ** 2) ** 0.5
    found = sample(velocity, scheduler, noise, steps=50, sampler=sampler)
    tolerance = {"euler": 0.1, "heun": 0.006}[sampler]  # of which 0.003 is the DDPM's step to 0
    torch.testing.assert_close(found, flow_of_gaussians(start, first), rtol=0, atol=tolerance)


@pytest.mark.parametrize("strength", [0.2, 0.6])
@pytest.mark.parametrize("name", FAMILIES)
def test_restorations_of_a_gaussian_in_closed_form(name, strength, latents):
    velocity, scheduler = toy(name)
    levels = noise_levels(scheduler)
    level = levels[(levels - strength).abs().argmin()]
    assert abs(level - strength) < 0.003
    clean, noise = MEAN + DEVIATION * latents[0], latents[1]
    start = add_noise(clean, noise, level.expand(3))
    found = sample(velocity, scheduler, noise, 50, "heun", clean, strength)
    torch.testing.assert_close(found, flow_of_gaussians(start, level), rtol=0, atol=0.006)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(sampler, order, latents):
    velocity, _ = toy("flow")
    exact = flow_of_gaussians(latents[1], 1.0)

    def error(steps):
        return float((integrate(velocity, latents[1], torch.linspace(1, 0, steps + 1), sampler) - exact).abs().max())

    errors = [error(steps) for steps in (16, 32, 64)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_calls_of_the_network(sampler):
    """Each level once, or twice between the first and the last; none at 0."""
    asked = []

    def velocity(z, sigma):
        asked.append(sigma.tolist())
        return torch.zeros_like(z)

    integrate(velocity, torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 0.5, 0.25, 0.0]), sampler)
    levels = [1.0, 0.5, 0.25] if sampler == "euler" else [1.0, 0.5, 0.5, 0.25, 0.25]
    assert asked == [[level] * 2 for level in levels]


@pytest.mark.parametrize("name", FAMILIES)
def test_euler_is_diffusers_own_sampler(make_pipeline, name):
    """FlowMatchEulerDiscreteScheduler, and DDIM."""
    family, network, prompt = real(make_pipeline, name)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    z, embeds = noise, prompt[0].expand(2, -1, -1)
    with torch.no_grad():
        if name == "flow":
            scheduler, start = family.scheduler, noise
            scheduler.set_timesteps(8)
            levels = scheduler.sigmas
            for t in scheduler.timesteps:
                velocity = network(z, embeds, prompt[1].expand(2, -1), t.expand(2), return_dict=False)[0]
                z = scheduler.step(velocity, t, z).prev_sample
        else:
            scheduler = DDIMScheduler.from_config(family.scheduler.config, timestep_spacing="trailing")
            scheduler.set_timesteps(8)
            levels = torch.cat([noise_levels(scheduler).flip(0)[scheduler.timesteps], torch.zeros(1)])
            cumulative = scheduler.alphas_cumprod[999]
            start = noise / (cumulative.sqrt() + (1 - cumulative).sqrt())
            for t in scheduler.timesteps:
                z = scheduler.step(network(z, t, encoder_hidden_states=embeds).sample, t, z).prev_sample
    found = integrate(family.velocity(network, prompt), start, levels, "euler")
    torch.testing.assert_close(found, z, rtol=1e-3, atol=1e-3 * float(z.abs().max()))
    # A sample begins there too.
    first = sample(lambda z, sigma: torch.zeros_like(z), family.scheduler, noise)
    torch.testing.assert_close(first, start, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flow", "epsilon"])
def test_trajectories(name):
    scheduler = family_of(name).scheduler
    table = noise_levels(scheduler)
    for steps in (1, 7, 28, 1000):
        levels = trajectory(scheduler, steps)
        assert levels.shape == (steps + 1,) and levels[0] == table[0] and levels[-1] == 0
        assert steps == 1 or levels[-2] == table[-1]
        assert (levels.diff() < 0).all() and torch.isin(levels[:-1], table).all()
    levels = trajectory(scheduler, 10, 0.5)
    assert levels.shape == (11,) and levels[0] == pytest.approx(0.5, abs=0.003)
    assert trajectory(scheduler, 10, 0).tolist() == [0]
    # Fewer steps than asked for, and no level twice, where the schedule has no more.
    few = trajectory(scheduler, 28, float(table[-5]))
    assert torch.equal(few[:-1], table[-5:])
    for steps, strength, message in ((0, 1, "steps must be"), (1, 1.5, "strength must be"), (1, -0.1, "not -0.1")):
        with pytest.raises(ValueError, match=message):
            trajectory(scheduler, steps, strength)


def test_the_whole_trajectory_is_diffusers_own():
    """To the rounding of an index; with a shift, diffusers applies it twice to the lowest level."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(28)
    torch.testing.assert_close(trajectory(scheduler, 28), scheduler.sigmas, rtol=0, atol=0.00051)


@pytest.mark.parametrize("name", FAMILIES)
def test_strength_goes_from_all_of_the_input_to_none(make_pipeline, name):
    family, network, prompt = real(make_pipeline, name)
    velocity, generator = family.velocity(network, prompt), torch.Generator().manual_seed(2)
    one, other, noise = torch.randn(3, 1, 4, 8, 8, generator=generator)

    def run(latents, strength):
        return sample(velocity, family.scheduler, noise, 3, "heun", latents, strength)

    assert torch.equal(run(one, 0.0), one)
    assert torch.equal(run(one, 1.0), run(other, 1.0))
    assert torch.equal(run(one, 1.0), sample(velocity, family.scheduler, noise, 3, "heun"))
    assert not torch.equal(run(one, 0.9), run(other, 0.9))
    small, large = ((run(one, strength) - one).square().mean() for strength in (0.1, 0.9))
    assert 0 < small < large
    with pytest.raises(ValueError, match=r"strength of 0\.5 needs latents"):
        sample(velocity, family.scheduler, noise, strength=0.5)


@pytest.mark.parametrize("name", ["flow", "epsilon"])
def test_a_batch_is_its_pictures_and_guidance_counts(make_pipeline, name):
    family, network, prompt = real(make_pipeline, name)
    null = tuple(part if part is None else torch.zeros_like(part) for part in prompt)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    plain, guided = (guided_velocity(family, network, prompt, null, scale) for scale in (1.0, 4.0))
    both = sample(guided, family.scheduler, noise, 3)
    for index in range(2):
        alone = sample(guided, family.scheduler, noise[index : index + 1], 3)
        torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    assert not torch.allclose(both, sample(plain, family.scheduler, noise, 3), rtol=1e-2)


def test_samplers_that_do_not_exist(latents):
    with pytest.raises(ValueError, match="must be one of euler, heun, not 'dpm'"):
        integrate(lambda z, sigma: z, latents[0], torch.tensor([1.0, 0.0]), "dpm")


@pytest.fixture(scope="module")
def unet_folder(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    make_pipeline("kl", network="unet").save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(base_folder, config, tmp_path):
    """A function that makes a teacher of the tiny base: `teacher(shift, guidance_scale)`."""

    def make(shift=0.0, guidance_scale=1.0, null_prompt=None):
        base = load_base(config(tmp_path / "run"), str(base_folder))
        base.null_prompt = null_prompt
        return Teacher.of(base, shift, torch.device("cpu"), guidance_scale)

    return make


def pictures(count=1, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4))


def test_strength_0_is_the_autoencoder_and_1_a_sample(teacher, base_folder):
    """With the shift factor and without it the round trip is the same; what the network sees is not."""
    vae, results = load_vae(base_folder), []
    with torch.no_grad():
        expected = vae.decode(vae.encode(pictures() * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    for shift in (0.0, 0.06):
        made = teacher(shift)
        generators = (draws(0, SAMPLING, 0) for _ in range(2))
        untouched = restore(made, pictures(), 0.0, next(generators), steps=3)
        torch.testing.assert_close(untouched, expected.clamp(0, 1), rtol=1e-4, atol=1e-4)
        results.append(restore(made, pictures(), 1.0, next(generators), steps=3))
        drawn = module.draw(made, (16, 16), draws(0, SAMPLING, 0), steps=3)
        assert torch.equal(drawn, results[-1]) and drawn.shape == (1, 3, 16, 16)
        assert drawn.min() >= 0 and drawn.max() <= 1
    assert not torch.allclose(*results)


def load_vae(base_folder):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(base_folder, subfolder="vae").eval()


def test_the_generator_is_all_of_the_draw(teacher):
    made = teacher()
    torch.manual_seed(5)
    first = restore(made, pictures(2), 0.7, draws(0, SAMPLING, 0), steps=2)
    again = restore(made, pictures(2), 0.7, draws(0, SAMPLING, 0), steps=2)
    other = restore(made, pictures(2), 0.7, draws(1, SAMPLING, 0), steps=2)
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (2, 3, 16, 16)


def test_guidance_reaches_a_teacher(teacher):
    null = torch.zeros(1, 3, 12), torch.zeros(1, 10)
    plain, guided = (
        module.draw(teacher(0.0, scale, null), (16, 16), draws(0, SAMPLING, 0), steps=2) for scale in (1.0, 5.0)
    )
    assert not torch.allclose(plain, guided)


def flags(base, output, **changed):
    values = {"count": 2, "size": 32, "steps": 2, "device": "cpu", **changed}
    words = [str(base), "-o", str(output)]
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *(str(one) for one in (value if isinstance(value, list) else [value]))]
    return words


@pytest.mark.parametrize("network", ["flow", "unet"])
def test_a_sheet_of_samples(base_folder, unet_folder, network, tmp_path, capsys):
    base = {"flow": base_folder, "unet": unet_folder}[network]
    main(flags(base, tmp_path / "new" / "a.png", count=5))
    assert capsys.readouterr().out == (f"wrote {tmp_path}/new/a.png: 5 samples, 2 steps of heun, guidance 1, seed 0\n")
    main(flags(base, tmp_path / "b.png", count=5))
    main(flags(base, tmp_path / "c.png", count=5, seed=1))
    main(flags(base, tmp_path / "d.png", count=2, sampler="euler"))
    first, again, other, fewer = (read(tmp_path / name).rgb for name in ("new/a.png", "b.png", "c.png", "d.png"))
    # Four in a row; each as a square of 256 below its label.
    assert first.shape == (44 + 2 * (26 + 256 + 8), 8 + 4 * 264, 3) and fewer.shape == (44 + 290, 8 + 2 * 264, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[70:326, 8:264], first[70:326, 272:528]), "each sample has noise of its own"
    assert not np.array_equal(first[70:326, 8:264], fewer[70:326, 8:264]), "of another sampler"
    assert not np.array_equal(first[70:326, 8:264], other[70:326, 8:264]), "of another seed"


@pytest.mark.parametrize("network", ["flow", "unet"])
def test_a_sheet_of_restorations(base_folder, unet_folder, photographs, network, tmp_path, capsys):
    base = {"flow": base_folder, "unet": unet_folder}[network]
    output = tmp_path / "sheet.png"
    main(flags(base, output, photographs=photographs, strength=[0, 0.4, 1]))
    assert "2 photographs" in capsys.readouterr().out
    sheet = read(output).rgb
    # Title; two rows of label, note and pictures; five columns.
    assert sheet.shape == (44 + 2 * (49 + 256 + 8), 8 + 5 * 264, 3)
    # Spread over the folder: the first and the fifth of eight.
    paths = sorted(photographs.iterdir())
    for row, (_, _, hq) in enumerate(validation_pairs([paths[0], paths[4]], None, 32, 4, 0)):
        top = 44 + row * 313 + 49
        shown = sheet[top : top + 256 : 8, 8:264:8]
        np.testing.assert_allclose(shown, hq[0].permute(1, 2, 0).numpy(), atol=1 / 255)
    columns = [sheet[93:349, 8 + 264 * index : 264 * (index + 1)] for index in range(5)]
    assert all(not np.array_equal(one, other) for one, other in pairwise(columns))


def test_all_strengths_of_a_photograph_see_the_same_noise(teacher, photographs):
    """Cells are what `restore` makes of the centre, with its PSNR-Y; another photograph has noise of its own."""
    made, pairs = teacher(), validation_pairs(sorted(photographs.iterdir())[:2], None, 64, 4, 0)
    rows = restoration_rows(made, pairs, [0.4, 0.9], seed=3, size=30, steps=2)
    for index, (row, (name, lq, hq)) in enumerate(zip(rows, pairs, strict=True)):
        hq, lq = (whole[..., 18:46, 18:46] for whole in (hq, bicubic(lq, (64, 64))))  # multiples of 4
        expected = {"HQ": hq, "LQ, bicubic": lq}
        for strength in (0.4, 0.9):
            expected[f"strength {strength}"] = restore(made, lq, strength, draws(3, SAMPLING, index), steps=2)
        assert [cell.label for cell in row] == list(expected)
        for cell, picture in zip(row, expected.values(), strict=True):
            np.testing.assert_allclose(cell.rgb, eight_bit(picture)[0].permute(1, 2, 0), atol=1e-6)
            psnr = f"PSNR-Y {psnr_y(eight_bit(picture), hq):.2f} dB"
            assert cell.note == (name if cell.label == "HQ" else psnr)


def test_the_teachers_lora_and_the_shift_count(make_pipeline, base_folder, tmp_path):
    """A LoRA that doubles a projection; a folder that asks for the shift factor."""
    weights = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 16),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(16, 2),
    }
    save_file(weights, tmp_path / "teacher.safetensors")
    make_pipeline("kl", use_shift_factor=True).save_pretrained(tmp_path / "shifted")
    main(flags(base_folder, tmp_path / "a.png", count=1))
    main(flags(base_folder, tmp_path / "b.png", count=1, teacher_lora=tmp_path / "teacher.safetensors"))
    main(flags(tmp_path / "shifted", tmp_path / "c.png", count=1))
    plain, taught, shifted = (read(tmp_path / f"{name}.png").rgb[70:] for name in "abc")
    assert not np.array_equal(plain, taught) and not np.array_equal(plain, shifted)


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"size": 30, "scale": 1}, "resolution must be a multiple of 4 for"),
        ({"size": 30}, "resolution (30) must be a multiple of scale (4)."),
        ({"size": 0}, "resolution must be at least 1, not 0."),
        ({"size": 68}, "resolution must be at most 64 for"),
        ({"count": 0}, "count must be at least 1, not 0."),
        ({"steps": 0}, "steps must be at least 1, not 0."),
        ({"strength": [0.5, 1.5]}, "strength must be within 0..1, not 1.5."),
        ({"seed": -1}, "seed must be at least 0, not -1."),
        ({"photographs": "nowhere"}, "nowhere cannot be listed"),
        ({"photographs": "."}, ". holds no pictures."),
        ({"guidance_scale": 4}, "Guidance needs the empty prompt"),
        ({"prompt": "a cat"}, "has no text encoders"),
        ({"device": "toaster"}, "The device 'toaster' is not available here"),
        ({"teacher_lora": "none.safetensors"}, "teacher_lora none.safetensors cannot be used"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(base_folder, changed, words, tmp_path, monkeypatch, capsys, one_sentence):
    monkeypatch.chdir(tmp_path)
    code, said = refused(flags(base_folder, tmp_path / "a.png", **changed), capsys)
    assert code == 2 and said.startswith("Error: ") and words in said
    one_sentence(said.removeprefix("Error: ").strip())
    assert list(tmp_path.iterdir()) == []


def test_bases_and_files_that_cannot_be_used(base_folder, photographs, tmp_path, monkeypatch, capsys):
    code, said = refused(flags(tmp_path / "none", tmp_path / "a.png"), capsys)
    assert code == 2 and "none cannot be loaded" in said and said.count("\n") == 1
    code, said = refused(flags(base_folder, tmp_path / "a.txt"), capsys)
    assert code == 2 and "a.txt cannot be written: name a file whose suffix is one of" in said
    (tmp_path / "small").mkdir()
    write(Picture(np.zeros((4, 4, 3), np.float32)), tmp_path / "small" / "tiny.png")
    monkeypatch.setattr(module, "sides", lambda *_: (2, 8))
    code, said = refused(flags(base_folder, tmp_path / "a.png", photographs=tmp_path / "small"), capsys)
    assert code == 2 and said == "Error: tiny is smaller than 8 pixels a side, which the base needs.\n"
    assert not (tmp_path / "a.png").exists()


def test_a_sheet_is_replaced_only_when_asked_to_and_whole(base_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "a.png"
    output.write_bytes(b"mine")
    code, said = refused(flags(base_folder, output, count=1), capsys)
    assert code == 2 and said == f"Error: {output} exists: choose another name, or replace it (--overwrite).\n"
    with monkeypatch.context() as patched:
        patched.setattr(module, "draw_rows", lambda *_: Picture(np.full((4, 4, 3), np.nan, np.float32)))
        code, said = refused([*flags(base_folder, output, count=1), "--overwrite"], capsys)
    assert code == 2 and output.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [output]
    main([*flags(base_folder, output, count=1), "--overwrite"])
    assert read(output).rgb.shape == (334, 272, 3)
