"""TinySR's VAE: a TAESD whose convolutions are separable in one half or in both."""

from diffusers import AutoencoderTiny
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class SeparableConv2d(nn.Module):
    """A convolution in two: of each channel alone, without bias, then of the channels of each pixel.

    Args:
        convolution: the one it replaces, whose channels, kernel, stride, padding and bias it has; not its weights.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        channels = convolution.in_channels
        self.depthwise = nn.Conv2d(
            channels,
            channels,
            convolution.kernel_size,
            convolution.stride,
            convolution.padding,
            groups=channels,
            bias=False,
        )
        self.pointwise = nn.Conv2d(channels, convolution.out_channels, 1, bias=convolution.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h', w')."""
        return self.pointwise(self.depthwise(x))


class AutoencoderTinySeparable(AutoencoderTiny):
    """diffusers' `AutoencoderTiny` with depthwise separable convolutions (TinySR, arXiv 2508.17434, section 3.4).

    In a half that is separable every convolution is, the first and the last too: `.depthwise.weight`,
    `.pointwise.weight` and, where the layer has one, `.pointwise.bias` below the name that the layer has in
    `AutoencoderTiny`. At TinySR's sizes an encoder has 0.158 M parameters rather than 1.229 M, and 7.76 G
    multiply-accumulates at 512x512 rather than 61.2 G. TinySR's decoder is a plain one.

    Args:
        in_channels, out_channels, encoder_block_out_channels, decoder_block_out_channels, act_fn, upsample_fn,
            latent_channels, upsampling_scaling_factor, num_encoder_blocks, num_decoder_blocks, latent_magnitude,
            latent_shift, force_upcast, scaling_factor, shift_factor: as in `AutoencoderTiny`.
        block_out_channels: saved by `AutoencoderTiny`, which takes `decoder_block_out_channels` for it.
        separable_encoder, separable_decoder: which halves are.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 16,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] | None = None,
        separable_encoder: bool = True,
        separable_decoder: bool = False,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            encoder_block_out_channels=encoder_block_out_channels,
            decoder_block_out_channels=decoder_block_out_channels,
            act_fn=act_fn,
            upsample_fn=upsample_fn,
            latent_channels=latent_channels,
            upsampling_scaling_factor=upsampling_scaling_factor,
            num_encoder_blocks=num_encoder_blocks,
            num_decoder_blocks=num_decoder_blocks,
            latent_magnitude=latent_magnitude,
            latent_shift=latent_shift,
            force_upcast=force_upcast,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
        for half, separable in ((self.encoder, separable_encoder), (self.decoder, separable_decoder)):
            if separable:
                for name, module in list(half.named_modules()):
                    if isinstance(module, nn.Conv2d):
                        half.set_submodule(name, SeparableConv2d(module))


# As with `PromptEmbeddings`: the library that a saved pipeline names.
AutoencoderTinySeparable.__module__ = "tsdsr"
