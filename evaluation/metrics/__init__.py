"""Metrics that need no weights, by name."""

from .artefacts import edge_energy_ratio, grid_score, noise_floor, seam_score
from .fidelity import gmsd, haarpsi, ms_ssim, psnr, ssim
from .metric import Column, Metric
from .niqe import niqe

__all__ = ["METRICS", "Column", "Metric"]


_ALL = (
    Metric(
        name="psnr",
        title="PSNR-Y",
        kind="full-reference",
        better="higher",
        unit="dB",
        digits=2,
        about="Peak signal-to-noise ratio of the luma (BT.601, 16..235), no border left out, at most 80.",
        measure=psnr,
    ),
    Metric(
        name="ssim",
        title="SSIM-Y",
        kind="full-reference",
        better="higher",
        about="Structural similarity of the luma (BT.601, 16..235); Wang et al. 2004.",
        measure=ssim,
    ),
    Metric(
        name="ms_ssim",
        title="MS-SSIM-Y",
        kind="full-reference",
        better="higher",
        about="Structural similarity of the luma at five scales; Wang et al. 2003.",
        measure=ms_ssim,
    ),
    Metric(
        name="gmsd",
        title="GMSD",
        kind="full-reference",
        better="lower",
        about="How unevenly gradients are kept, of the luma: gradient magnitude similarity deviation; Xue et al. 2014.",
        measure=gmsd,
    ),
    Metric(
        name="haarpsi",
        title="HaarPSI",
        kind="full-reference",
        better="higher",
        about="Similarity of Haar wavelet coefficients, weighted by what is seen; Reisenhofer et al. 2018.",
        measure=haarpsi,
    ),
    Metric(
        name="niqe",
        title="NIQE",
        kind="no-reference",
        better="lower",
        digits=3,
        about="Distance of the luma's statistics from those of undistorted photographs; Mittal et al. 2013.",
        measure=lambda sr, hr=None: niqe(sr),
    ),
    Metric(
        name="edge_energy",
        title="Edge energy",
        kind="full-reference",
        better="one",
        digits=3,
        about="Gradient energy at the ground truth's edges, over its own: below 1 is soft, above over-sharpened.",
        measure=edge_energy_ratio,
    ),
    Metric(
        name="noise_floor",
        title="Noise floor",
        kind="no-reference",
        better="lower",
        unit="levels",
        digits=2,
        about="Standard deviation of the luma, in levels of 255, where the picture is flattest.",
        measure=lambda sr, hr=None: noise_floor(sr),
    ),
    Metric(
        name="grid_score",
        title="Grid",
        kind="no-reference",
        better="lower",
        digits=2,
        about="How far grids of 8 and 16 pixels (latents, patches) stand out of the spectrum: 1 is none.",
        measure=lambda sr, hr=None: grid_score(sr),
    ),
    Metric(
        name="seam_score",
        title="Seam",
        kind="no-reference",
        better="lower",
        digits=2,
        about="How much the sharpest line across the picture stands out, as borders of tiles do: up to 2 is none.",
        measure=lambda sr, hr=None: seam_score(sr),
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""Name -> metric, in the order they are shown."""
