"""The measures of artefacts: what they are of known pictures, and how they follow the artefact."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tsdsr.evaluation.metrics.artefacts import edge_energy_ratio, grid_score, noise_floor, seam_score


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """Levels (320, 352, 1): a smooth picture with a noise of 2 levels, which has neither grid nor seam."""
    generator = np.random.Generator(np.random.PCG64(1))
    y, x = np.mgrid[:320, :352]
    smooth = 120 + 50 * np.sin(x / 37 + y / 91) + 30 * np.cos(y / 23)
    return (smooth + 2 * generator.standard_normal(smooth.shape))[..., None]


def blurred(picture: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def test_edge_energy(pair):
    hr = pair(120, 150)[1]
    soft, sharp = blurred(hr), (2 * hr - blurred(hr)).clamp(0, 1)
    assert edge_energy_ratio(hr, hr) == 1
    assert edge_energy_ratio(blurred(soft), hr) < edge_energy_ratio(soft, hr) < 0.8
    assert edge_energy_ratio(sharp, hr) > 1.2
    assert edge_energy_ratio(0.5 * hr, hr) == pytest.approx(0.25)  # an energy: of the square of the contrast


def test_edge_energy_of_a_moved_edge(from_levels):
    step = np.full((40, 60, 1), 50.0)
    step[:, 30:] = 150
    assert edge_energy_ratio(from_levels(np.roll(step, 2, 1))[..., 5:], from_levels(step)[..., 5:]) == pytest.approx(1)
    outside = step.copy()
    outside[:, 10:15] = 90
    assert edge_energy_ratio(from_levels(outside), from_levels(step)) == 1  # what is far from edges does not count
    ramp = np.interp(np.arange(60), [28, 31], [50, 150])[None, :, None].repeat(40, 0)
    assert 0.3 < edge_energy_ratio(from_levels(ramp), from_levels(step)) < 0.7


def test_edge_energy_without_edges(one_sentence):
    with pytest.raises(ValueError) as error:
        edge_energy_ratio(torch.rand(1, 3, 20, 20), torch.full((1, 3, 20, 20), 0.5))
    one_sentence(error.value, "edges")


@pytest.mark.parametrize("sigma", [1, 2, 5, 10])
def test_noise_floor_is_the_deviation_of_the_noise(sigma, from_levels):
    y, x = np.mgrid[:256, :256]
    noise = np.random.Generator(np.random.PCG64(2)).standard_normal((256, 256))
    picture = 40 + 0.3 * x + 0.2 * y + sigma * noise
    picture[:, 128:] = 120 + 100 * np.sin(x * y)[:, 128:]  # half of it is all texture
    assert noise_floor(from_levels(picture[..., None])) == pytest.approx(sigma, rel=0.12)


def test_noise_floor_of_white_noise_is_not_biased(from_levels):
    noise = np.random.Generator(np.random.PCG64(7)).standard_normal((256, 256, 1))
    assert noise_floor(from_levels(120 + 5 * noise)) == pytest.approx(5, rel=0.03)


def test_noise_floor_of_a_gradient(from_levels):
    y, x = np.mgrid[:64, :64]
    gradient = 40 + 0.7 * x + 1.1 * y
    assert noise_floor(torch.from_numpy(gradient / 255)[None, None].expand(1, 3, 64, 64)) < 1e-4
    assert noise_floor(from_levels(gradient[..., None])) < 0.35
    assert noise_floor(torch.zeros(1, 3, 16, 16)) == 0


def test_noise_floor_leaves_out_what_is_cut_off(from_levels):
    noise = 4 * np.random.Generator(np.random.PCG64(3)).standard_normal((64, 64, 1))
    assert noise_floor(from_levels(np.concatenate([128 + noise, 262 + noise]))) == pytest.approx(4, rel=0.15)


GRIDS = {
    "lines 16": np.pad(np.ones((15, 15)), ((1, 0), (1, 0))),
    "lines 8": np.pad(np.ones((7, 7)), ((1, 0), (1, 0))),
    "columns 16": np.pad(np.ones((16, 15)), ((0, 0), (1, 0))),
    "checks of 8": np.kron([[0, 1], [1, 0]], np.ones((8, 8))),
    "texture 16": np.random.Generator(np.random.PCG64(4)).integers(-1, 2, (16, 16)),
}


def with_grid(scene: np.ndarray, grid: np.ndarray, amplitude: float) -> np.ndarray:
    height, width = scene.shape[:2]
    tiles = np.tile(grid, (height // len(grid) + 1, width // grid.shape[1] + 1))
    return scene + amplitude * tiles[:height, :width, None]


@pytest.mark.parametrize("name", GRIDS)
def test_grid_score_follows_the_amplitude(name, scene, from_levels):
    scores = [grid_score(from_levels(with_grid(scene, GRIDS[name], amplitude))) for amplitude in (0, 1, 2, 8)]
    assert scores == sorted(scores)
    assert scores[0] < 1.15
    assert scores[1] > 1.5


def test_grid_score_does_not_depend_on_where_the_grid_lies(scene, from_levels):
    picture = from_levels(with_grid(scene, GRIDS["lines 16"], 2))
    score = grid_score(picture)
    views = [picture.flip(3), picture.flip(2), picture.mT, picture[..., 5:, 11:], picture[..., :301, :333]]
    assert [grid_score(view) for view in views] == pytest.approx([score] * 5, rel=0.15)
    assert grid_score(picture[..., :131, :129]) > 1.5


def test_other_periods_are_no_grid(scene, from_levels):
    lines = np.pad(np.ones((10, 10)), ((1, 0), (1, 0)))
    picture = from_levels(with_grid(scene, lines, 4))
    assert grid_score(picture) < 1.5
    assert grid_score(picture, periods=(11,)) > 5
    assert grid_score(from_levels(with_grid(scene, GRIDS["lines 8"], 4)), periods=(16, 8)) > 5
    every_16 = from_levels(with_grid(scene, GRIDS["texture 16"], 4))
    assert grid_score(every_16, periods=(16,)) == grid_score(every_16, periods=(16, 16)) > 5


def test_grid_score_of_noise_and_of_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = [grid_score(torch.rand(1, 3, 256, 256, generator=generator)) for _ in range(4)]
    assert scores == pytest.approx([1] * 4, abs=0.15)
    assert grid_score(torch.full((1, 3, 128, 128), 0.7)) == pytest.approx(1)


def test_grids_on_a_part_of_the_picture(scene, from_levels):
    grid = with_grid(np.zeros_like(scene), GRIDS["texture 16"], 2)
    margin = scene + grid * (np.arange(352) >= 256)[:, None]
    assert grid_score(from_levels(margin)) > 1.3
    rough = scene.copy()
    rough[:, :176] += 40 * np.random.Generator(np.random.PCG64(6)).standard_normal((320, 176, 1))
    assert grid_score(from_levels(rough)) < 1.15
    assert grid_score(from_levels(rough + grid)) > 2  # seen on the smooth half


def test_grid_score_needs_a_few_periods(one_sentence):
    assert math.isfinite(grid_score(torch.rand(1, 3, 128, 128)))
    with pytest.raises(ValueError) as error:
        grid_score(torch.rand(1, 3, 128, 127))
    one_sentence(error.value, "127x128", "128x128")


def with_seam(scene: np.ndarray, step: float) -> np.ndarray:
    return np.concatenate([scene[:150], scene[150:] + step])


def test_seams_at_given_lines(scene, from_levels):
    clean = from_levels(scene)
    assert seam_score(clean, rows=[150], columns=[100, 200]) == pytest.approx(1, abs=0.3)
    steps = [from_levels(with_seam(scene, step)) for step in (2, 4, 8)]
    scores = [seam_score(picture, rows=[150]) for picture in steps]
    assert scores == sorted(scores)
    assert scores[0] > 1.5
    assert seam_score(steps[-1], rows=[149]) < seam_score(steps[-1], rows=[150])
    assert seam_score(steps[-1], rows=[170]) < 1.5  # lines beside it have no seam
    assert seam_score(steps[-1], columns=[150]) < 1.5
    assert seam_score(steps[-1].mT, columns=[150]) == pytest.approx(scores[-1])
    assert seam_score(steps[-1], rows=[150], columns=[150]) < scores[-1]
    assert seam_score(steps[-1], rows=[], columns=[]) == 1


def test_seams_are_found(scene, from_levels):
    assert seam_score(from_levels(scene)) < 1.5
    found = [seam_score(from_levels(with_seam(scene, step))) for step in (4, 8, 16)]
    assert found == sorted(found)
    assert found[0] > 2
    assert seam_score(from_levels(with_seam(scene, 8)).mT) == pytest.approx(found[1])


def test_edges_of_photographs_are_no_seams(scene, from_levels):
    soft = scene + 80 / (1 + np.exp(-(np.arange(320) - 150) / 1.5))[:, None, None]
    assert seam_score(from_levels(soft)) < 2.2
    short = scene.copy()
    short[150:250, :140] += 60
    assert seam_score(from_levels(short)) < 2.2


def test_seams_outside_of_the_picture(scene, from_levels, one_sentence):
    picture = from_levels(scene)
    assert math.isfinite(seam_score(picture, rows=[6, 314], columns=[346]))
    for lines in ({"rows": [5]}, {"rows": [315]}, {"columns": [-1, 100]}):
        with pytest.raises(ValueError) as error:
            seam_score(picture, **lines)
        one_sentence(error.value, 6, *lines.values())


@pytest.mark.parametrize(
    ("measure", "least"), [(noise_floor, 16), (seam_score, 32), (lambda sr: edge_energy_ratio(sr, sr), 3)]
)
def test_least_sizes(measure, least, from_levels, one_sentence):
    picture = from_levels(np.random.Generator(np.random.PCG64(5)).integers(0, 256, (least, least, 1)))
    assert math.isfinite(measure(picture))
    with pytest.raises(ValueError) as error:
        measure(picture[..., 1:])
    one_sentence(error.value, f"{least}x{least}")
