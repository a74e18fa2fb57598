"""Second-order degradation of photographs: sharp picture in, small damaged picture out.

The random pipeline of Real-ESRGAN (Wang et al., 2021, sections 3.1 to 3.4: blur, resize, noise, JPEG, twice over,
with sinc ringing) with the ranges that OSEDiff and TSD-SR train with. Every draw comes from one `torch.Generator`,
each picture of a batch has its own parameters.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..imaging import jpeg_round_trip

KERNEL_SIZE = 21  # all kernels are centred in a square of this side, pixels
BLURS = (0.5, 1.0, 1.5)  # that `evidence` looks for: sigmas in pixels of small pictures, beyond making them small


@dataclass(frozen=True)
class StageConfig:
    """One blur - resize - noise - JPEG pass. Probabilities in 0..1, sigmas of noise in 8-bit levels."""

    blur_probability: float
    blur_sigma: tuple[float, float]  # pixels
    resize_probabilities: tuple[float, float, float]  # up, down, keep
    resize_range: tuple[float, float]
    gaussian_noise_sigma: tuple[float, float]  # 8-bit levels
    poisson_noise_scale: tuple[float, float]
    generalised_beta: tuple[float, float] = (0.5, 4.0)
    plateau_beta: tuple[float, float] = (1.0, 2.0)
    kind_probabilities: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sinc_probability: float = 0.1
    gaussian_noise_probability: float = 0.5
    grey_noise_probability: float = 0.4
    jpeg_quality: tuple[float, float] = (30.0, 95.0)


@dataclass(frozen=True)
class DegradationConfig:
    """The published ranges (Real-ESRGAN's, as OSEDiff and TSD-SR use them)."""

    scale: int = 4
    first: StageConfig = field(
        default_factory=lambda: StageConfig(
            blur_probability=1.0,
            blur_sigma=(0.2, 3.0),
            resize_probabilities=(0.2, 0.7, 0.1),
            resize_range=(0.15, 1.5),
            gaussian_noise_sigma=(1.0, 30.0),
            poisson_noise_scale=(0.05, 3.0),
        )
    )
    second: StageConfig = field(
        default_factory=lambda: StageConfig(
            blur_probability=0.8,
            blur_sigma=(0.2, 1.5),
            resize_probabilities=(0.3, 0.4, 0.3),
            resize_range=(0.3, 1.2),
            gaussian_noise_sigma=(1.0, 25.0),
            poisson_noise_scale=(0.05, 2.5),
        )
    )
    final_sinc_probability: float = 0.8
    # Unsharp masking of the small picture, which is not part of the published degradation.
    sharpen_probability: float = 0.0
    sharpen_amount: tuple[float, float] = (0.2, 1.2)
    sharpen_sigma: tuple[float, float] = (0.5, 1.2)  # pixels of the small picture

    @classmethod
    def mild(cls) -> "DegradationConfig":
        """What a fair camera and careful saving do: optical blur, a little noise, sharpening, JPEG of high quality.

        Not published; a share of it in training keeps the fine texture of pictures that have any.
        """
        return cls(
            sharpen_probability=0.5,
            first=StageConfig(
                blur_probability=1.0,
                blur_sigma=(0.5, 4.5),
                resize_probabilities=(0.0, 0.3, 0.7),
                resize_range=(0.5, 1.0),
                gaussian_noise_sigma=(0.0, 4.0),
                poisson_noise_scale=(0.0, 0.4),
                sinc_probability=0.05,
                jpeg_quality=(85.0, 100.0),
            ),
            second=StageConfig(
                blur_probability=0.2,
                blur_sigma=(0.2, 0.8),
                resize_probabilities=(0.1, 0.1, 0.8),
                resize_range=(0.8, 1.2),
                gaussian_noise_sigma=(0.0, 2.5),
                poisson_noise_scale=(0.0, 0.2),
                sinc_probability=0.0,
                jpeg_quality=(80.0, 100.0),
            ),
            final_sinc_probability=0.2,
        )


# Each draw is one number: the random stream does not depend on the batch size of later draws.
def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _chance(generator: torch.Generator, probability: float) -> bool:
    return _uniform(generator, 0.0, 1.0) < probability


def _choice(generator: torch.Generator, probabilities: tuple[float, ...]) -> int:
    return int(torch.multinomial(torch.tensor(probabilities, dtype=torch.float64), 1, generator=generator))


def _shape_parameter(generator: torch.Generator, low: float, high: float) -> float:
    """Beta: half of the draws below 1 (heavy tails), half above (flat top)."""
    return _uniform(generator, min(low, 1.0), 1.0) if _chance(generator, 0.5) else _uniform(generator, 1.0, high)


def gaussian_kernel(
    size: int, sigma: tuple[float, float], angle: float = 0.0, beta: float = 1.0, plateau: bool = False
) -> Tensor:
    """Blur kernel of shape (size, size) with sum 1.

    With q = x^T S^-1 x and S the covariance of standard deviations `sigma` (pixels) turned by `angle` (radians), the
    value is exp(-q^beta / 2) (generalised Gaussian; beta 1 is the Gaussian) or 1 / (q^beta + 1) (plateau).
    """
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    along = (math.cos(angle) * x + math.sin(angle) * y) / sigma[0]
    across = (-math.sin(angle) * x + math.cos(angle) * y) / sigma[1]
    q = (along.square() + across.square()).pow(beta)
    kernel = 1 / (q + 1) if plateau else torch.exp(-0.5 * q)
    return (kernel / kernel.sum()).float()


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Circular low-pass kernel of shape (size, size) with sum 1; `cutoff` in radians a pixel (Real-ESRGAN eq. 5).

    h(i, j) = cutoff / (2 pi r) * J1(cutoff * r),  r = sqrt(i^2 + j^2);  cutoff^2 / (4 pi) in the centre.
    """
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    r = torch.sqrt(x.square() + y.square())
    kernel = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r.clamp(min=1e-12))
    kernel[r == 0] = cutoff**2 / (4 * math.pi)
    return (kernel / kernel.sum()).float()


def _random_size(generator: torch.Generator) -> int:
    return 2 * int(torch.randint(3, 11, (), generator=generator)) + 1


def _centred(kernel: Tensor) -> Tensor:
    margin = (KERNEL_SIZE - kernel.shape[-1]) // 2
    return F.pad(kernel, (margin, margin, margin, margin))


def random_blur_kernel(stage: StageConfig, generator: torch.Generator) -> Tensor:
    """A kernel of shape (21, 21) of random kind, size and strength; the identity where the stage does not blur."""
    size = _random_size(generator)
    if not _chance(generator, stage.blur_probability):
        return _centred(torch.ones(1, 1))
    if _chance(generator, stage.sinc_probability):
        return _centred(sinc_kernel(size, _uniform(generator, math.pi / (3 if size < 13 else 5), math.pi)))
    kind = _choice(generator, stage.kind_probabilities)
    sigma_x = _uniform(generator, *stage.blur_sigma)
    anisotropic = kind % 2 == 1
    sigma_y = _uniform(generator, *stage.blur_sigma) if anisotropic else sigma_x
    angle = _uniform(generator, -math.pi, math.pi) if anisotropic else 0.0
    beta = 1.0
    if kind in (2, 3):
        beta = _shape_parameter(generator, *stage.generalised_beta)
    elif kind in (4, 5):
        beta = _shape_parameter(generator, *stage.plateau_beta)
    return _centred(gaussian_kernel(size, (sigma_x, sigma_y), angle, beta, plateau=kind in (4, 5)))


def random_sharpening(config: DegradationConfig, generator: torch.Generator) -> Tensor | None:
    """A kernel (21, 21) that adds a share of what a Gaussian blur takes away; None where nothing is sharpened."""
    if not config.sharpen_probability or not _chance(generator, config.sharpen_probability):
        return None
    amount, sigma = _uniform(generator, *config.sharpen_amount), _uniform(generator, *config.sharpen_sigma)
    return (1 + amount) * _centred(torch.ones(1, 1)) - amount * gaussian_kernel(KERNEL_SIZE, (sigma, sigma))


def random_final_sinc(probability: float, generator: torch.Generator) -> Tensor:
    """The last ringing filter, shape (21, 21): sinc with `probability`, else the identity."""
    if not _chance(generator, probability):
        return _centred(torch.ones(1, 1))
    return _centred(sinc_kernel(_random_size(generator), _uniform(generator, math.pi / 3, math.pi)))


def filter2d(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each picture of (B, C, H, W) with its own kernel of (B, k, k), reflected at the borders."""
    batch, channels, height, width = images.shape
    size = kernels.shape[-1]
    # Trimming the empty rim that all kernels share makes small blurs cheap.
    rim = 0
    while 2 * rim + 1 < size and not _inside(kernels, rim).any():
        rim += 1
    kernels = kernels[:, rim : size - rim, rim : size - rim]
    size -= 2 * rim
    pad = size // 2
    mode = "reflect" if pad < min(height, width) else "replicate"
    padded = F.pad(images, (pad, pad, pad, pad), mode=mode)
    weight = kernels.to(images).repeat_interleave(channels, dim=0).unsqueeze(1)
    flat = padded.reshape(1, batch * channels, *padded.shape[-2:])
    return F.conv2d(flat, weight, groups=batch * channels).reshape(images.shape)


def _inside(kernels: Tensor, rim: int) -> Tensor:
    """The values of the square ring `rim` pixels from the edge."""
    size = kernels.shape[-1]
    inner = kernels[:, rim : size - rim, rim : size - rim]
    return torch.cat([inner[:, 0], inner[:, -1], inner[:, :, 0], inner[:, :, -1]], dim=-1)


def random_resize(image: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Resize (B, C, H, W) to `size` by area, bilinear or bicubic interpolation, at random."""
    mode = ("area", "bilinear", "bicubic")[_choice(generator, (1.0, 1.0, 1.0))]
    return F.interpolate(image, size=size, mode=mode)


def _random_factor(stage: StageConfig, generator: torch.Generator) -> float:
    direction = _choice(generator, stage.resize_probabilities)
    if direction == 0:
        return _uniform(generator, 1.0, stage.resize_range[1])
    if direction == 1:
        return _uniform(generator, stage.resize_range[0], 1.0)
    return 1.0


def add_random_noise(image: Tensor, stage: StageConfig, generator: torch.Generator) -> Tensor:
    """Gaussian or Poisson noise on one picture (1, 3, H, W) in 0..1, grey or coloured; clamped to 0..1."""
    grey = _chance(generator, stage.grey_noise_probability)
    if _chance(generator, stage.gaussian_noise_probability):
        sigma = _uniform(generator, *stage.gaussian_noise_sigma) / 255
        shape = (1, 1 if grey else 3, *image.shape[-2:])
        return (image + sigma * torch.randn(shape, generator=generator).to(image)).clamp(0, 1)
    scale = _uniform(generator, *stage.poisson_noise_scale)
    rounded = (image.clamp(0, 1) * 255).round() / 255
    if grey:
        rounded = (rounded * rounded.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        rounded = (rounded * 255).round() / 255
    # Shot noise: photons per unit of light follow from how many grey levels the picture holds.
    levels = 2 ** math.ceil(math.log2(max(len(torch.unique(rounded)), 2)))
    photons = torch.poisson(rounded.cpu() * levels, generator=generator).to(image)
    return (image + scale * (photons / levels - rounded)).clamp(0, 1)


def jpeg(image: Tensor, quality: float) -> Tensor:
    """One picture (1, 3, H, W) in 0..1 through JPEG (4:2:0) at `quality` 1..100."""
    pixels = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return torch.from_numpy(jpeg_round_trip(pixels, round(quality))).permute(2, 0, 1)[None].to(image) / 255


def degrade(hq: Tensor, generator: torch.Generator, config: DegradationConfig | None = None) -> Tensor:
    """Damaged low-resolution pictures for sharp ones.

    Args:
        hq: (B, 3, H, W), values 0..1; H and W multiples of `config.scale`.
        generator: a CPU generator; the same state gives the same result.
        config: probabilities and ranges; the published ones by default.

    Returns:
        (B, 3, H / scale, W / scale), values k / 255 in 0..1, dtype and device of `hq`.

    Raises:
        ValueError: if the size is not a multiple of the scale or the tensor has another shape.
    """
    config = config or DegradationConfig()
    if hq.ndim != 4 or hq.shape[1] != 3:
        raise ValueError(f"hq must have shape (B, 3, H, W), not {tuple(hq.shape)}.")
    height, width = hq.shape[-2:]
    if height % config.scale or width % config.scale:
        raise ValueError(f"hq is {height}x{width}; both sides must be multiples of the scale {config.scale}.")
    target = (height // config.scale, width // config.scale)
    first, second = config.first, config.second

    blurred = filter2d(hq, torch.stack([random_blur_kernel(first, generator) for _ in range(hq.shape[0])]))
    results = []
    for image in blurred.split(1):
        factor = _random_factor(first, generator)
        size = (max(1, int(height * factor)), max(1, int(width * factor)))
        image = random_resize(image, size, generator)
        image = add_random_noise(image, first, generator)
        image = jpeg(image, _uniform(generator, *first.jpeg_quality))

        image = filter2d(image, random_blur_kernel(second, generator)[None])
        factor = _random_factor(second, generator)
        size = (max(1, int(target[0] * factor)), max(1, int(target[1] * factor)))
        image = random_resize(image, size, generator)
        image = add_random_noise(image, second, generator)

        sinc = random_final_sinc(config.final_sinc_probability, generator)[None]
        quality = _uniform(generator, *second.jpeg_quality)
        sharpening = random_sharpening(config, generator)
        if _chance(generator, 0.5):
            image = _last(random_resize(image, target, generator), sinc, sharpening)
            image = jpeg(image, quality)
        else:
            image = jpeg(image, quality)
            image = _last(random_resize(image, target, generator), sinc, sharpening)
        results.append((image.clamp(0, 1) * 255).round() / 255)
    return torch.cat(results)


def _last(image: Tensor, sinc: Tensor, sharpening: Tensor | None) -> Tensor:
    image = filter2d(image, sinc)
    return image if sharpening is None else filter2d(image, sharpening[None]).clamp(0, 1)


def evidence(pictures: Tensor, hq: Tensor, scale: int, lowest: float, full: float) -> Tensor:
    """How much of each photograph its LQ picture still shows: 0 where nearly nothing, 1 where nearly all.

    The photograph is made as small as the LQ picture, and blurred or sharpened by the mixture of Gaussians that makes
    them most alike: the PSNR that is left tells of noise, compression and resampling. It is mapped to 0 at `lowest` and
    1 at `full`, in a line between them. Not published: detail that a discriminator asks for is invented where damage
    left nothing to go by, and costs fidelity there.

    Args:
        pictures: LQ pictures, enlarged, (B, 3, H, W) in -1..1.
        hq: the photographs, the same shape and range.
        scale: how much smaller the LQ pictures were.
        lowest: dB.
        full: dB, above `lowest`.

    Returns:
        (B,), 0..1, without gradient.
    """
    with torch.no_grad():
        # In float64, which autocast leaves alone.
        small, wanted = (
            F.interpolate(one.double(), scale_factor=1 / scale, mode="bicubic", antialias=True)
            for one in (pictures, hq)
        )
        # LQ = photograph + sum of c (blurred photograph - photograph): c > 0 blurs, c < 0 sharpens, colours stay.
        kernels = [gaussian_kernel(KERNEL_SIZE, (sigma, sigma)) for sigma in BLURS]
        blurred = [filter2d(wanted, kernel.expand(len(wanted), -1, -1)) for kernel in kernels]
        changes = torch.stack([one - wanted for one in blurred], -1).flatten(1, 3)
        error = (small - wanted).flatten(1)[..., None]
        ridge = 1e-8 * changes.shape[1] * torch.eye(len(BLURS), dtype=torch.float64, device=changes.device)
        found = torch.linalg.solve(changes.mT @ changes + ridge, changes.mT @ error)
        left = (error - changes @ found).square().mean((1, 2)).float()
        psnr = 10 * torch.log10(4 / left.clamp_min(1e-10))
        return ((psnr - lowest) / (full - lowest)).clamp(0, 1)
