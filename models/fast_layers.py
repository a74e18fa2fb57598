"""Layers of VAEs that compute the same in less time or memory; weights, and so files, stay as they are."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class AccurateGroupNorm(nn.GroupNorm):
    """Group normalisation that is as accurate with channels last as with channels first.

    torch's own kernel sums naively there: its error is about 1e-4 of the range at 512x512.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        last = (
            # No map of strips, which is normalised as a whole, and where this was measured.
            isinstance(input, Tensor)
            and input.device.type == "cpu"
            and input.dtype == torch.float32
            and input.ndim == 4
            and input.is_contiguous(memory_format=torch.channels_last)
            and not input.is_contiguous()
        )
        if not last:
            return super().forward(input)
        pixels = input.permute(0, 2, 3, 1)
        # Row by row, and the rows in float64: short sums are accurate ones.
        shape = (len(input), self.num_groups, -1)
        mean = pixels.mean(dim=2).double().mean(dim=1).view(shape).mean(dim=-1, keepdim=True)
        square = torch.linalg.vector_norm(pixels, dim=2).double().square().mean(dim=1).view(shape).mean(dim=-1)
        variance = square[..., None] / input.shape[-1] - mean.square()
        deviation = (variance.clamp(min=0) + self.eps).rsqrt()
        slope = self.weight.view(1, *shape[1:]) * deviation
        offset = self.bias.view(1, *shape[1:]) - mean * slope
        slope, offset = (part.to(input.dtype).view(len(input), -1, 1, 1) for part in (slope, offset))
        return torch.addcmul(offset, input, slope)


class FreshSiLU(nn.SiLU):
    """SiLU of what nothing else reads, as after a normalisation: in place, but for training."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same."""
        return F.silu(input, inplace=not torch.is_grad_enabled())


class PlainResnetBlock2D(ResnetBlock2D):
    """diffusers' residual block where it knows no time and scales its sum by 1, which is then not divided by."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, C', H, W); raises a ValueError for an embedding of time."""
        if temb is not None:
            raise ValueError("This block of a VAE takes no embedding of time.")
        hidden_states = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        hidden_states = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden_states))))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        if torch.is_grad_enabled() or not isinstance(hidden_states, Tensor):
            return input_tensor + hidden_states
        return hidden_states.add_(input_tensor)


class UpsamplingConv2d(nn.Conv2d):
    """A 3x3 convolution, of a picture or of that enlarged twice by repeating its pixels, without making it so large.

    Of the nine pixels that such a convolution reads only four differ, so that it is a transposed convolution of stride
    2 whose 4x4 weights are sums of the nine: 4/9 of the operations.
    """

    def forward(self, input: Tensor, upsample: bool = False) -> Tensor:
        """(B, C, H, W) to (B, C', H, W), or with `upsample` to (B, C', 2H, 2W)."""
        if not upsample:
            return super().forward(input)
        if input.device.type != "cpu" or input.dtype != torch.float32:  # where it was measured to pay
            return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))
        weight = self.weight.transpose(0, 1)
        for dim in (2, 3):
            first, middle, last = weight.unbind(dim)
            weight = torch.stack([last, middle + last, first + middle, first], dim)
        return F.conv_transpose2d(input, weight, self.bias, stride=2, padding=1)


class FoldedUpsample2D(Upsample2D):
    """diffusers' layer of a decoder that enlarges twice and convolves."""

    def forward(self, hidden_states: Tensor, output_size: int | None = None) -> Tensor:
        """(B, C, H, W) to (B, C', 2H, 2W)."""
        # With a LoRA it is another class.
        if output_size is None and type(self.conv) is UpsamplingConv2d:
            return self.conv(hidden_states, upsample=True)
        return super().forward(hidden_states, output_size)


class FoldedSequential(nn.Sequential):
    """Layers of AutoencoderTiny's decoder, of which some enlarge twice for a convolution that follows."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', f H, f W)."""
        layers, doubled = list(self), False
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if doubled:
                input, doubled = layer(input, upsample=True), False
            elif _doubles(layer) and type(following) is UpsamplingConv2d:
                doubled = True
            else:
                input = layer(input)
        return input


def _doubles(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Upsample) and layer.mode == "nearest" and layer.scale_factor == 2 and layer.size is None


def _folds(layer: nn.Module) -> bool:
    """Whether it is a convolution that `UpsamplingConv2d` can be."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and layer.padding == (1, 1)
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether a residual block is one that `PlainResnetBlock2D` can be."""
    layers = (block.upsample, block.downsample, block.time_emb_proj)
    return all(layer is None for layer in layers) and block.output_scale_factor == 1


def use_fast_layers(vae: nn.Module) -> None:
    """Let the layers of a VAE (AutoencoderKL, AutoencoderTiny) compute the same in less time.

    Only classes change: names and weights stay, so that the VAE is saved, moved, trained and given LoRAs as before.
    """
    for module in list(vae.modules()):
        if type(module) is nn.GroupNorm and module.affine:
            module.__class__ = AccurateGroupNorm
        for name in ("nonlinearity", "conv_act"):
            if type(getattr(module, name, None)) is nn.SiLU:
                getattr(module, name).__class__ = FreshSiLU
        if type(module) is ResnetBlock2D and _is_plain(module):
            module.__class__ = PlainResnetBlock2D
        plain = type(module) is Upsample2D and module.use_conv and module.interpolate and module.norm is None
        if plain and _folds(module.conv):
            module.__class__, module.conv.__class__ = FoldedUpsample2D, UpsamplingConv2d
    if isinstance(vae, AutoencoderTiny) and type(vae.decoder.layers) is nn.Sequential:
        layers = list(vae.decoder.layers)
        for layer, following in pairwise(layers):
            if _doubles(layer) and _folds(following):
                following.__class__ = UpsamplingConv2d
        vae.decoder.layers.__class__ = FoldedSequential
