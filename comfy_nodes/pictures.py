"""ComfyUI's IMAGE and MASK tensors to what the pipeline takes, and back."""

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_of(image: Tensor, name: str) -> Tensor:
    """An IMAGE as (B, H, W, C), as it is.

    Raises:
        ValueError: for anything that is not pictures of at least one pixel with 1, 3 or 4 channels of floating point.
    """
    wrong = not isinstance(image, Tensor) or image.ndim not in (3, 4) or image.shape[-1] not in (1, 3, 4)
    if wrong or not image.numel():
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"{name} must hold pictures of at least one pixel, (batch, height, width, 1, 3 or 4 channels), not {shape};"
            " connect an IMAGE output."
        )
    if not image.is_floating_point():
        kind = str(image.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must hold floating point values in 0..1, not {kind}; divide them by their maximum.")
    return image[None] if image.ndim == 3 else image


def frame(batch: Tensor, index: int, name: str) -> Tensor:
    """One picture of a batch (B, H, W, C): (1, C, H, W) with C 3 or 4, float32, 0..1.

    Greyscale becomes RGB; values outside 0..1, which other nodes may leave, are clamped.

    Raises:
        ValueError: if it holds NaN or infinite values.
    """
    picture = batch[index : index + 1].movedim(-1, 1).float()
    if not torch.isfinite(picture).all():
        raise ValueError(f"{name} holds NaN or infinite values; mend the node that made it.")
    picture = picture.clamp(0, 1)
    return picture.expand(-1, 3, -1, -1) if picture.shape[1] == 1 else picture


def resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) at another size, bicubic, antialiased, clamped to 0..1."""
    if tuple(pictures.shape[-2:]) == size:
        return pictures
    return F.interpolate(pictures.float(), size=size, mode="bicubic", antialias=True).clamp(0, 1)


def masks_of(mask: Tensor | None) -> Tensor | None:
    """A MASK as (B, 1, h, w), as it is; None for none and for an empty one.

    Raises:
        ValueError: for anything that is not masks, and for NaN and infinite values.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim < 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be (batch, height, width), not {shape}; connect a MASK output.")
    if not torch.isfinite(mask).all():
        raise ValueError("mask holds NaN or infinite values; mend the node that made it.")
    return mask.reshape(-1, 1, *mask.shape[-2:]) if mask.numel() else None


def upscaled_mask(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, h, w) from `masks_of` at the size of the result, (B, H, W) float32, 0..1."""
    result = torch.empty(masks.shape[0], *size, device=masks.device)
    for index in range(masks.shape[0]):
        result[index] = resized(masks[index : index + 1].float().clamp(0, 1), size)[0, 0]
    return result
