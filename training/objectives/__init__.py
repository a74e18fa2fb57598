"""What a student is trained towards: pure functions of tensors and of velocity callables, one equation each.

They know nothing of adapters, accelerators or files. A velocity callable is `(z, sigma) -> v`: latents z (B, C, h, w)
at noise levels sigma (B,), 0..1, with z = sigma * noise + (1 - sigma) * clean, and v = noise - clean.
"""

from .adversarial import (
    balanced,
    feature_matching,
    hinge_discriminator_loss,
    hinge_student_loss,
    r1_penalty,
    relativistic_discriminator_loss,
    relativistic_student_loss,
)
from .noise import add_noise, clean_from_velocity, ddpm_velocity, noise_levels
from .reconstruction import EncoderFeatureDistance, frequency_l1, gradient_l1, grid_l1, latent_mse, pixel_l1
from .residual_shift import ResidualShift, residual_velocity
from .tad import draw_levels, draw_noise, hsd_gradient, sds_gradient
from .tsd import (
    TSDGradient,
    classifier_free_guidance,
    dasm_trajectory,
    fake_score_loss,
    tsd_gradient,
    tsd_loss,
)

__all__ = [
    "EncoderFeatureDistance",
    "ResidualShift",
    "TSDGradient",
    "add_noise",
    "balanced",
    "classifier_free_guidance",
    "clean_from_velocity",
    "dasm_trajectory",
    "ddpm_velocity",
    "draw_levels",
    "draw_noise",
    "fake_score_loss",
    "feature_matching",
    "frequency_l1",
    "gradient_l1",
    "grid_l1",
    "hinge_discriminator_loss",
    "hinge_student_loss",
    "hsd_gradient",
    "latent_mse",
    "noise_levels",
    "pixel_l1",
    "r1_penalty",
    "relativistic_discriminator_loss",
    "relativistic_student_loss",
    "residual_velocity",
    "sds_gradient",
    "tsd_gradient",
    "tsd_loss",
]
