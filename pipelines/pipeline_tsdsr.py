"""One-step super-resolution: resize, encode, one step, decode, stitch, colour."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput, scale_lora_layers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from ..models.attention import check_fused_projections, use_dispatcher
from ..models.autoencoder_tiny_separable import AutoencoderTinySeparable
from ..models.fast_layers import use_fast_layers
from ..models.one_step_sd3 import OneStepSD3Transformer2DModel
from ..models.prompt_embeddings import PromptEmbeddings
from .codec import WINDOW, plan_codec, run_in_strips, sample_windows
from .color import COLOR_FIXES
from .degrid import remove_grid
from .grain import add_grain
from .lora import TSDSRLoraLoaderMixin, keeps_adapters
from .memory import Tiles, is_out_of_memory, smaller_tiles
from .placement import TSDSRPlacementMixin
from .precision import Overflowed, Precision, announce
from .saving import TSDSRSavingMixin
from .strips import Rows, per_pixel
from .tiling import TilePlan, TileProgress, TilesDone, pad_to_multiple, reduce_bicubic, run_tiled, working_size


@dataclass
class TSDSRPipelineOutput(BaseOutput):
    """Result of `TSDSRPipeline`.

    Attributes:
        images: for `output_type` "pil" a list of PIL images; "np" an array (B, H, W, 3) and "pt" a tensor
            (B, 3, H, W), values 0..1; "latent" the latents (B, C, h, w) of the padded working size, scaled.
            Results of different sizes come as a list of single (H, W, 3), (3, H, W) or (C, h, w) ones.
    """

    images: Any


def _picture_rows(picture: Any) -> Rows:
    """A picture that gives float32 (n, W, 3) in 0..1 by `rows(top, bottom)` as a map (1, 3, H, W)."""

    def read(top: int, bottom: int) -> Tensor:
        rows = torch.from_numpy(picture.rows(top, bottom)).movedim(-1, 0)[None]
        if not torch.isfinite(rows).all():
            raise ValueError("`image` holds NaN or infinite values.")
        return rows.clamp(0, 1)

    return Rows((1, 3, picture.height, picture.width), torch.float32, "cpu", read)


class TSDSRPipeline(TSDSRSavingMixin, TSDSRLoraLoaderMixin, TSDSRPlacementMixin, DiffusionPipeline):
    """Enlarges photographs with one step of a diffusion model (TSD-SR, arXiv 2411.18263).

    The model is a rectified-flow transformer (SD3) or a DDPM's UNet (SD2, table 5 of the paper); one of the two is
    given. As in diffusers, components may be None for as long as no call needs them: a pipeline of text encoders alone
    can encode prompts.

    Args:
        vae: encodes the enlarged picture and decodes the result.
        transformer: predicts the velocity v; the result is z - v at t = 1000. One that is baked (`bake`) holds its
            prompt and timestep.
        scheduler: takes the one step: a flow-matching scheduler for a transformer; for a UNet a DDPM's, or any other
            whose config has a DDPM's betas and prediction type (DDIM, PNDM, ...).
        prompt_embeddings: the fixed prompt, so that no text encoder is needed. Without it, calls need `prompt` or
            `prompt_embeds`.
        text_encoder, text_encoder_2, text_encoder_3, tokenizer, tokenizer_2, tokenizer_3: the base's, for other
            prompts: SD3's for a transformer, SD2's `text_encoder` and `tokenizer` for a UNet.
        use_shift_factor: whether latents are (z - shift_factor) * scaling_factor as in SD3, or z * scaling_factor as
            the published TSD-SR weights want them. Saved in the pipeline's config.
        timestep: the one timestep, 0..1000, by default 1000, or what the transformer is baked for; for a UNet a whole
            number below the length of its schedule, by default 999. Saved in the pipeline's config.
        grain: added to results unless a call says otherwise, in levels of 255. Saved in the pipeline's config.
        degrid: taken off results unless a call says otherwise, in levels of 255: patterns of patches. Saved in the
            pipeline's config.
        unet: predicts the noise eps; the result is (z - sqrt(1 - abar) eps) / sqrt(abar) at t = 999, with z the
            picture's latents as they are. One that predicts v gives sqrt(abar) z - sqrt(1 - abar) v.

    Raises:
        ValueError: if both networks are given; for a VAE, or a UNet's scheduler or timestep, that does not fit; and for
            a prompt or a timestep beside a transformer that is baked for others.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->prompt_embeddings->transformer->unet->vae"
    _optional_components = [
        "transformer",
        "scheduler",
        "prompt_embeddings",
        "unet",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ]
    _callback_tensor_inputs = ["latents"]

    retries_smaller = True
    """Whether a call that runs out of memory tries again with smaller tiles. Hosts that manage memory themselves set it
    to False and get the error."""

    # Other prompts are encoded exactly as SD3 does it; `encode_prompt` calls these.
    _get_clip_prompt_embeds = StableDiffusion3Pipeline._get_clip_prompt_embeds
    _get_t5_prompt_embeds = StableDiffusion3Pipeline._get_t5_prompt_embeds

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderTinySeparable | None,
        transformer: SD3Transformer2DModel | OneStepSD3Transformer2DModel | None = None,
        scheduler: FlowMatchEulerDiscreteScheduler | DDPMScheduler | None = None,
        prompt_embeddings: PromptEmbeddings | None = None,
        text_encoder: CLIPTextModelWithProjection | CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5TokenizerFast | None = None,
        use_shift_factor: bool = False,
        timestep: float | None = None,
        unet: UNet2DConditionModel | None = None,
        grain: float = 0.0,
        degrid: float = 0.0,
    ):
        super().__init__()
        if transformer is not None and unet is not None:
            raise ValueError("TSDSRPipeline takes one network, `transformer` or `unet`, not both.")
        # SD3's own config has none.
        baked_for = None if transformer is None else transformer.config.get("timestep")
        if timestep is None:
            timestep = baked_for if baked_for is not None else 1000.0 if unet is None else 999.0
        if baked_for is not None and prompt_embeddings is not None:
            raise ValueError(
                "This transformer is baked for one prompt, so that `prompt_embeddings` would be without effect: leave"
                " them out, or bake the original transformer with them."
            )
        if baked_for not in (None, timestep):
            raise ValueError(
                f"This transformer is baked for `timestep` {baked_for:g}, not {timestep!r}: bake the"
                " original transformer with that."
            )
        if unet is not None and scheduler is not None:
            if "beta_schedule" not in scheduler.config:
                raise ValueError(
                    f"A UNet needs a `scheduler` with a DDPM's betas, such as DDPMScheduler, not "
                    f"{type(scheduler).__name__}."
                )
            if timestep not in range(scheduler.config.num_train_timesteps):
                raise ValueError(
                    f"`timestep` must be a whole number from 0 to {scheduler.config.num_train_timesteps - 1} for a "
                    f"UNet, not {timestep!r}."
                )
        self.register_modules(
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            prompt_embeddings=prompt_embeddings,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            unet=unet,
        )
        if vae is not None and self.denoiser is not None:
            made, read = vae.config.latent_channels, self.denoiser.config.in_channels
            if made != read:
                raise ValueError(
                    f"The VAE's latents have {made} channels, but the network reads {read}; use the VAE of its base."
                )
        for network in filter(None, (vae, transformer, unet)):
            use_dispatcher(network)
        if vae is not None:
            use_fast_layers(vae)
        if transformer is not None and not transformer._repeated_blocks:
            # diffusers names none for this class; `compile_repeated_blocks` needs them.
            transformer._repeated_blocks = ["JointTransformerBlock"]
        if isinstance(vae, AutoencoderTiny):
            # As AutoencoderKL has it: group offloading brings these two in, since `encode` and `decode` do not pass
            # through the forward of the whole.
            vae._group_offload_block_modules = ["encoder", "decoder"]
        # What a pipeline was made with is not optional in it; others do without a transformer or without a UNet.
        self._optional_components = [name for name in self._optional_components if getattr(self, name) is None]
        self.register_to_config(use_shift_factor=use_shift_factor, timestep=timestep, grain=grain, degrid=degrid)
        self.vae_scale_factor = 8
        if vae is not None:
            channels = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
            self.vae_scale_factor = 2 ** (len(channels) - 1)
        # Sides of the working picture are multiples of what one patch, or one pixel of the UNet's middle, covers.
        coarsest = 2
        if transformer is not None:
            coarsest = transformer.config.patch_size
        elif unet is not None:
            coarsest = 2 ** (len(unet.config.block_out_channels) - 1)
        self.size_multiple = self.vae_scale_factor * coarsest
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_resize=False, do_normalize=False, do_convert_rgb=True
        )
        self.tokenizer_max_length = 77 if tokenizer is None else tokenizer.model_max_length

    @property
    def denoiser(self) -> Any:
        """The network of the one step: the transformer, the UNet, or None."""
        return self.transformer if self.unet is None else self.unet

    @property
    def is_baked(self) -> bool:
        """Whether the transformer holds its prompt and timestep, so that calls take no other."""
        return self.transformer is not None and "timestep" in self.transformer.config

    @property
    def num_timesteps(self) -> int:
        """Of every call: one."""
        return 1

    def encode_prompt(
        self,
        prompt: str | list[str],
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Embed prompts with the base's text encoders, exactly as diffusers' own SD3 and SD2 pipelines do it.

        Args:
            prompt: one or more.
            prompt_2, prompt_3: what SD3's second CLIP and T5 read instead.
            device: where the encoders are.
            num_images_per_prompt: how often each is repeated.
            do_classifier_free_guidance: embed `negative_prompt` as well. The one step has no use for it.
            negative_prompt: by default the empty one.
            kwargs: further ones of `StableDiffusion3Pipeline.encode_prompt` (`max_sequence_length`, `clip_skip`,
                ...), for SD2 of `StableDiffusionPipeline.encode_prompt`.

        Returns:
            prompt_embeds (B, tokens, width), negative_prompt_embeds, pooled_prompt_embeds (B, pooled width) and
            negative_pooled_prompt_embeds; None where there are none.

        Raises:
            ValueError: if the pipeline has not all of the text encoders.
        """
        of_sd2 = self.unet is not None or (self.transformer is None and self.text_encoder_2 is None)
        needed = ["text_encoder", "tokenizer", *([] if of_sd2 else ["text_encoder_2", "tokenizer_2"])]
        absent = [name for name in needed if getattr(self, name) is None]
        if absent:
            raise ValueError(
                f"`prompt` needs the base model's text encoders, but this pipeline was loaded without {absent[0]}; "
                "leave `prompt` out to use the built-in one, or load the pipeline with text encoders and tokenizers."
            )
        shared = {
            "device": device,
            "num_images_per_prompt": num_images_per_prompt,
            "do_classifier_free_guidance": do_classifier_free_guidance,
            "negative_prompt": negative_prompt,
            **kwargs,
        }
        if of_sd2:
            pooled_prompt_embeds = negative_pooled_prompt_embeds = None
            prompt_embeds, negative_prompt_embeds = StableDiffusionPipeline.encode_prompt(self, prompt, **shared)
        else:
            prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds = (
                StableDiffusion3Pipeline.encode_prompt(self, prompt, prompt_2, prompt_3, **shared)
            )
        return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds

    def check_inputs(
        self,
        pictures: int,
        upscale: float,
        height: int | None,
        width: int | None,
        prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
        fidelity: float | None,
        process_size: int,
        color_fix: str,
        degrid: float | None,
        grain: float | None,
        tile_size: int,
        tile_overlap: int,
        tile_batch_size: int,
        vae_tile_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raises a `ValueError` of one sentence for the first argument that cannot be used."""
        parts = {"vae": self.vae, "transformer": self.denoiser, "scheduler": self.scheduler}
        absent = [name for name, part in parts.items() if part is None]
        if absent:
            raise ValueError(f"This pipeline was made without `{absent[0]}`; pass one to `from_pretrained`.")
        if not (isinstance(upscale, Real) and 1 <= upscale < float("inf")):
            raise ValueError(f"`upscale` must be a number of at least 1, not {upscale!r}.")
        for name, value in (("height", height), ("width", width)):
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of pixels of at least 1, not {value!r}.")
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("Pass either `prompt` or `prompt_embeds`, not both.")
        if self.is_baked and not (prompt is None and prompt_embeds is None and pooled_prompt_embeds is None):
            raise ValueError(
                "This pipeline is baked for one prompt: leave `prompt` and `prompt_embeds` out, or call the original."
            )
        if not self.is_baked and prompt is None and prompt_embeds is None and self.prompt_embeddings is None:
            raise ValueError(
                "This pipeline holds no `prompt_embeddings`: pass `prompt_embeds`, or `prompt` if it has text encoders."
            )
        if isinstance(prompt, list) and len(prompt) not in (1, pictures):
            raise ValueError(f"`prompt` must be one string, or as many as pictures ({pictures}), not {len(prompt)}.")
        if prompt is not None and not all(
            isinstance(text, str) for text in (prompt if isinstance(prompt, list) else [prompt])
        ):
            raise ValueError(f"`prompt` must be a string or a list of them, not {type(prompt).__name__}.")
        if self.unet is not None and pooled_prompt_embeds is not None:
            raise ValueError("A UNet takes no `pooled_prompt_embeds`; pass `prompt_embeds` alone.")
        if self.unet is None and (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise ValueError("Pass `prompt_embeds` and `pooled_prompt_embeds` together.")
        for name, embeds in (("prompt_embeds", prompt_embeds), ("pooled_prompt_embeds", pooled_prompt_embeds)):
            if embeds is not None and embeds.shape[0] not in (1, pictures):
                raise ValueError(f"`{name}` must have a batch of 1 or {pictures}, not {embeds.shape[0]}.")
        if fidelity is not None and not (isinstance(fidelity, Real) and 0 <= fidelity <= 1):
            raise ValueError(f"`fidelity` must be a number from 0 to 1, not {fidelity!r}.")
        if not isinstance(process_size, Integral) or process_size < 0:
            raise ValueError(f"`process_size` must be a whole number of pixels, 0 for none, not {process_size!r}.")
        if color_fix not in (*COLOR_FIXES, "none"):
            raise ValueError(f"`color_fix` must be one of {', '.join([*COLOR_FIXES, 'none'])}, not {color_fix!r}.")
        for name, levels in (("degrid", degrid), ("grain", grain)):
            if levels is not None and not (isinstance(levels, Real) and 0 <= levels <= 255):
                raise ValueError(f"`{name}` must be a number from 0 to 255 levels, not {levels!r}.")
        multiple = self.size_multiple
        for name, size in (("tile_size", tile_size), ("vae_tile_size", vae_tile_size)):
            if not isinstance(size, Integral) or size < multiple:
                raise ValueError(f"`{name}` must be a whole number of at least {multiple} pixels, not {size!r}.")
        if not isinstance(tile_overlap, Integral) or not 0 <= tile_overlap <= tile_size - multiple:
            raise ValueError(
                f"`tile_overlap` must be a whole number from 0 to {tile_size - multiple} pixels "
                f"({multiple} less than `tile_size`), not {tile_overlap!r}."
            )
        if not isinstance(tile_batch_size, Integral) or tile_batch_size < 1:
            raise ValueError(f"`tile_batch_size` must be a whole number of at least 1, not {tile_batch_size!r}.")
        if isinstance(generator, list) and len(generator) != pictures:
            raise ValueError(f"`generator` must be one or as many as pictures ({pictures}), not {len(generator)}.")
        if latents is not None and (latents.ndim != 4 or latents.shape[0] != pictures):
            raise ValueError(f"`latents` must be (B, C, h, w) with B = {pictures}, not {tuple(latents.shape)}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be one of pil, np, pt, latent, not {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, not {unknown}."
            )

    def prepare_images(self, image: PipelineImageInput) -> list[Tensor | Rows]:
        """One tensor (1, 3, H, W), float32, 0..1, for every picture of PIL, NumPy, tensor, or lists of them.

        Greyscale becomes RGB and alpha is dropped; 8 and 16-bit integers are divided by their maximum. Pictures with
        `rows(top, bottom)` become maps that are read strip by strip.

        Raises:
            ValueError: for other types, channel counts, empty pictures, and values far outside 0..1.
        """
        tensors: list[Tensor | Rows] = []
        for item in image if isinstance(image, list | tuple) else [image]:
            if hasattr(item, "rows"):
                tensors.append(_picture_rows(item))
                continue
            if isinstance(item, Tensor):
                batch = item.detach()
                batch = batch[None] if batch.ndim == 3 else batch[None, None] if batch.ndim == 2 else batch
                integer = {torch.uint8: 255, torch.uint16: 65535}.get(batch.dtype)
            else:
                if not isinstance(item, np.ndarray):
                    if not hasattr(item, "convert"):
                        raise ValueError(
                            f"`image` must be a PIL image, a NumPy array, a tensor or a list of them, "
                            f"not {type(item).__name__}."
                        )
                    # 16-bit greyscale would be clipped by a conversion to RGB.
                    deep = item.mode.startswith("I")
                    item = (
                        np.asarray(item).clip(0, 65535).astype(np.uint16) if deep else np.asarray(item.convert("RGB"))
                    )
                integer = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}.get(item.dtype)
                array = np.ascontiguousarray(item, dtype=np.float32)
                array = array[None, ..., None] if array.ndim == 2 else array[None] if array.ndim == 3 else array
                batch = torch.from_numpy(array).movedim(-1, 1) if array.ndim == 4 else torch.from_numpy(array)
            batch = batch.to(device="cpu" if batch.device.type == "mps" else batch.device, dtype=torch.float32)
            if integer:
                batch = batch / integer
            if batch.ndim != 4 or batch.shape[1] not in (1, 2, 3, 4) or batch.numel() == 0:
                raise ValueError(
                    "`image` must hold pictures of 1 to 4 channels and at least one pixel: arrays (H, W, C) or "
                    f"(B, H, W, C), tensors (C, H, W) or (B, C, H, W), not shape {tuple(item.shape)}."
                )
            if not torch.isfinite(batch).all() or batch.min() < -0.5 or batch.max() > 1.5:
                raise ValueError(
                    f"`image` must have values in 0..1 (or be of an 8 or 16-bit integer type), "
                    f"not {float(batch.min()):g}..{float(batch.max()):g}."
                )
            batch = batch[:, :3] if batch.shape[1] >= 3 else batch[:, :1].expand(-1, 3, -1, -1)
            # The layout of a permuted array would spread through the networks; whoever wants channels last lays the
            # weights out so.
            tensors.extend(batch.clamp(0, 1).contiguous().split(1))
        if not tensors:
            raise ValueError("`image` is an empty list; pass at least one picture.")
        return tensors

    def _with_less_memory(self, tiles: Tiles, longest: int, shortage: str, device: torch.device) -> Tiles:
        """The next thing to try where memory ran out; says so.

        Raises:
            MemoryError: if nothing is left.
        """
        if device.type == "cuda":
            torch.cuda.empty_cache()
        smaller = smaller_tiles(tiles, longest)
        if smaller is not None:
            changed = {name: value for name, value in asdict(smaller).items() if value != getattr(tiles, name)}
            announce(
                "Out of memory: trying again with %s.", ", ".join(f"{name}={value}" for name, value in changed.items())
            )
            return smaller
        if device.type != "cpu" and not getattr(self, "_offloads_on_shortage", False):
            announce("Out of memory: trying again with the weights kept on the CPU until they are needed.")
            self._offloads_on_shortage = True
            self.enable_model_cpu_offload(device=device)
            return tiles
        words = (shortage.splitlines() or ["no further word"])[0]
        raise MemoryError(
            f"Not enough memory even with the smallest tiles ({words}); close other programs, choose a smaller"
            " `upscale`, or load the model in half precision."
        )

    @torch.no_grad()
    @keeps_adapters
    def __call__(
        self,
        image: PipelineImageInput,
        upscale: float = 4,
        height: int | None = None,
        width: int | None = None,
        prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        fidelity: float | None = None,
        process_size: int = 512,
        color_fix: str = "wavelet",
        degrid: float | None = None,
        grain: float | None = None,
        tile_size: int = 512,
        tile_overlap: int = 64,
        tile_batch_size: int = 1,
        vae_tile_size: int = 2048,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["TSDSRPipeline", int, float, dict[str, Tensor]], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  (diffusers' signature)
        tile_callback: Callable[[TilesDone], None] | None = None,
        rows_callback: Callable[[np.ndarray, int], None] | None = None,
    ) -> TSDSRPipelineOutput | tuple:
        """Enlarge one or more pictures. No registered component is changed.

        Args:
            image: PIL images, NumPy arrays (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W), float in 0..1
                or 8/16-bit integers, or a list of them; sizes may differ. Also pictures that are read as they are
                needed: anything with `height`, `width` and `rows(top, bottom)` that gives float32 (n, W, 3) in 0..1,
                as `tsdsr.imaging.Picture`.
            upscale: any factor of at least 1; the result is exactly `round(upscale * size)`. Ignored where `height`
                or `width` is given.
            height, width: size of the result in pixels; where only one is given the other keeps the proportions.
            prompt: another prompt than the built-in one, for all pictures or one for each; needs the base model's text
                encoders.
            prompt_embeds, pooled_prompt_embeds: embedded prompt, (B, tokens, width) and (B, width) with B of 1 or one
                for each picture. A UNet takes the first alone.
            fidelity: mixes two LoRAs in this call, from 0, the realism adapter alone, to 1, the fidelity adapter alone:
                the adapters `tsdsr` and `tsdsr-mse` where they are loaded, else the only two, in the order they were
                loaded. Their weights and strengths are afterwards what they were.
            process_size: pictures whose result has a shorter side than this, in pixels, are enlarged further for the
                networks and reduced afterwards (the published small-picture rule). 0 switches it off.
            color_fix: "wavelet", "adain", "lab" or "none".
            degrid: the most that is taken off a pattern which repeats every 16 pixels (the grid that patches of the
                network leave on flat parts), in levels of 255; None for what the pipeline's config says, 0 for none.
            grain: standard deviation, in levels of 255, of the grain that is added to the result; None for what the
                pipeline's config says, 0 for none.
            tile_size: side of the network's tiles in pixels of the result (512 are the published 64 latents).
                Pictures of no more than `tile_size` squared are not tiled.
            tile_overlap: of tiles, in pixels of the result.
            tile_batch_size: the network's tiles of one forward pass.
            vae_tile_size: larger pictures are encoded and decoded in strips of as many pixels as a square of this side,
                fewer where memory is short. Strips do not change the result: group norms and attention work on the
                whole picture up to 2048 squared pixels, beyond on an even sample of it.
            sample_posterior: draw from the encoder's posterior, as the published code does, instead of its mode.
            generator: for that draw; a list holds one for each picture.
            latents: encoded pictures (B, C, h, w) of the padded working size, as `output_type="latent"` scales them,
                in place of the encoder's.
            joint_attention_kwargs: handed to the transformer's attention, for a UNet as its `cross_attention_kwargs`;
                `{"scale": s}` is the strength of all LoRAs in this call, the VAE's too.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: return a `TSDSRPipelineOutput` rather than a tuple.
            callback_on_step_end: called for every picture as `(pipeline, 0, timestep, {"latents": ...})` after its one
                step; latents in the returned dictionary replace the result's.
            callback_on_step_end_tensor_inputs: names of the tensors that callback receives.
            tile_callback: called after each network call with a `tiling.TilesDone`: how many tiles of this picture are
                done, where they lie and what came out. An exception it raises ends the call, which is how a host stops
                between tiles.
            rows_callback: called with each finished strip, float32 (n, W', 3) in 0..1, and its first row: from top to
                bottom, picture after picture. Nothing is kept then, `images` is empty, and memory does not grow with
                the picture's height.

        Returns:
            A `TSDSRPipelineOutput`, or a tuple with its images.

        Raises:
            ValueError: for arguments that cannot be used, and for a result with NaN or Inf in float32; what overflows
                in half precision is redone in float32.
            MemoryError: if memory runs out with the smallest tiles as well.
        """
        # 1. Arguments
        pictures = self.prepare_images(image)
        self.check_inputs(
            len(pictures),
            upscale,
            height,
            width,
            prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            fidelity,
            process_size,
            color_fix,
            degrid,
            grain,
            tile_size,
            tile_overlap,
            tile_batch_size,
            vae_tile_size,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device, vae, denoiser = self._execution_device, self.vae, self.denoiser
        for network in (vae, denoiser):
            check_fused_projections(network)
        if fidelity is not None:
            self.mix_adapters(fidelity)
        if joint_attention_kwargs and "scale" in joint_attention_kwargs:
            # The denoiser does this itself.
            scale_lora_layers(vae, joint_attention_kwargs["scale"])

        # 2. Prompt
        if prompt is not None:
            prompt_embeds, _, pooled_prompt_embeds, _ = self.encode_prompt(
                prompt, device=device, do_classifier_free_guidance=False
            )
        elif prompt_embeds is None and not self.is_baked:
            prompt_embeds, pooled_prompt_embeds = self.prompt_embeddings()
        given = {"encoder_hidden_states": prompt_embeds}
        if self.unet is None:
            given["pooled_projections"] = pooled_prompt_embeds
        embeds = {name: each.to(device, denoiser.dtype) for name, each in given.items() if each is not None}
        attention_name = "joint_attention_kwargs" if self.unet is None else "cross_attention_kwargs"

        # 3. The step
        step_at: dict[str, list]
        if self.unet is None:
            # sigma is timestep / 1000 without the shift that spreads the steps of longer schedules.
            scheduler = type(self.scheduler).from_config(
                self.scheduler.config, shift=1.0, use_dynamic_shifting=False, shift_terminal=None
            )
            step_at = {"sigmas": [self.config.timestep / scheduler.config.num_train_timesteps]}
        else:
            scheduler = DDPMScheduler.from_config(self.scheduler.config, clip_sample=False, thresholding=False)
            step_at = {"timesteps": [int(self.config.timestep)]}
        scheduler.set_timesteps(**step_at, device=device)
        # A UNet's stays a whole number: in bfloat16 999 would be 1000.
        timestep = scheduler.timesteps[:1].to(denoiser.dtype) if self.unet is None else scheduler.timesteps[:1]

        # 4. Units
        factor = self.vae_scale_factor
        coarsest = self.size_multiple // factor
        # A transformer's tiles begin at whole patches and are no longer than its table of positions.
        patch, longest = 1, sys.maxsize
        if self.unet is None:
            patch, longest = coarsest, denoiser.config.pos_embed_max_size * coarsest
        scaling = vae.config.scaling_factor
        shift = (getattr(vae.config, "shift_factor", None) or 0.0) if self.config.use_shift_factor else 0.0

        def encode(pixels: Tensor | Rows) -> Tensor | Rows:
            draws = generator[index] if isinstance(generator, list) else generator
            encoded = vae.encode(pixels.to(vae.dtype))
            if hasattr(encoded, "latents"):
                return encoded.latents
            posterior = encoded.latent_dist
            return posterior.sample(draws) if sample_posterior else posterior.mode()

        def predict(latent_tiles: Tensor) -> Tensor:
            count = latent_tiles.shape[0]
            return denoiser(
                **{"hidden_states" if self.unet is None else "sample": latent_tiles},
                # The picture's own embeddings, or the one for all.
                **{name: own[index % len(own)].expand(count, *own.shape[1:]) for name, own in embeds.items()},
                **({} if self.is_baked else {"timestep": timestep.expand(count)}),
                **{attention_name: joint_attention_kwargs},
                return_dict=False,
            )[0]

        def one_step(prediction: Tensor, noisy: Tensor) -> Tensor:
            """The result's latents, of the whole picture or of a part."""
            # Anew, because flow-matching schedulers count their steps.
            scheduler.set_timesteps(**step_at, device=device)
            if self.unet is None:
                return scheduler.step(prediction, scheduler.timesteps[0], noisy, return_dict=False)[0]
            # The second of the results is the clean sample. The first gets noise, which is not to come from the global
            # random state. In float32, because the division by sqrt(abar), 0.07 in SD2, enlarges what is rounded.
            clean = scheduler.step(
                prediction.float(),
                scheduler.timesteps[0],
                noisy.float(),
                generator=torch.Generator().manual_seed(0),
                return_dict=False,
            )[1]
            return clean.to(noisy.dtype)

        def decode(latents: Tensor | Rows) -> Tensor | Rows:
            return vae.decode(latents.to(vae.dtype), return_dict=False)[0]

        def sizes(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
            """Of the result, and of the picture that the networks work at."""
            if height is None and width is None:
                target = (round(upscale * size[0]), round(upscale * size[1]))
                return target, working_size(size, target, upscale, process_size)
            target = (
                height or max(1, round(size[0] * (width or 0) / size[1])),
                width or max(1, round(size[1] * (height or 0) / size[0])),
            )
            return target, working_size(size, target, None, process_size)

        def enlarge(lq: Tensor | Rows, target: tuple[int, int], working: tuple[int, int]) -> Tensor | Rows:
            """Steps 6 to 11 for one picture: (1, 3, H', W') in 0..1, or its latents."""
            # 6. Plan, in latent pixels; the working picture is padded to whole patches
            rows, columns = (-(-side // self.size_multiple) * coarsest for side in working)
            latent_tile = min(tiles.tile_size // self.size_multiple * coarsest, longest)
            latent_overlap = min(tiles.tile_overlap // factor, latent_tile - patch) // patch * patch
            small = rows * columns <= latent_tile**2 and max(rows, columns) <= longest
            step_plan = TilePlan.even(
                (rows, columns), max(rows, columns) if small else latent_tile, latent_overlap, patch
            )
            codec = plan_codec(
                vae,
                rows * factor,
                columns * factor,
                tiles.vae_tile_size,
                self.size_multiple,
                device,
                keep_colors=color_fix in ("adain", "lab"),
            )
            by_rows = codec.strips > 1
            if isinstance(lq, Rows) and not by_rows:
                lq = lq.whole()
            lq = (Rows.of(lq) if isinstance(lq, Tensor) and by_rows else lq).to(device)
            total = len(step_plan.corners) + codec.strips * ((latents is None) + (output_type != "latent"))
            bar = self.progress_bar(total=total)
            progress = TileProgress(total, (rows * factor, columns * factor), bar, tile_callback)

            def of_vae(stage: str, network: Callable, x: Any, windows: Callable[[], Tensor]) -> Any:
                """The VAE's half over the whole picture, at once or in strips."""
                pixels_each = factor if stage == "encode" else 1

                def strip_done(top: int, bottom: int, rows: Tensor, inputs: Tensor | None = None) -> None:
                    box = (top * pixels_each, 0, (bottom - top) * pixels_each, columns * factor)
                    progress.tell(stage, [box], inputs, lambda: rows)

                if by_rows:
                    return run_in_strips(stage, network, x, codec, windows, precision, strip_done)
                if x.device.type == "cpu":
                    # What torch's convolutions are fastest with there.
                    x = x.contiguous(memory_format=torch.channels_last)
                result = precision.run(stage, network, x)
                strip_done(0, result.shape[-2], result, x)
                return result

            def tiles_done(corners: list[tuple[int, int]], inputs: Tensor, outputs: Tensor) -> None:
                sides = inputs.shape[-2:]
                boxes = [(*(edge * factor for edge in (*corner, *sides)),) for corner in corners]
                progress.tell("step", boxes, inputs, lambda: one_step(outputs, inputs))

            # 7. Resize: bicubic, antialiased only where a requested size makes the picture smaller
            def resized() -> Any:
                shrinks = working[0] < lq.shape[-2] or working[1] < lq.shape[-1]
                pixels = F.interpolate(lq, size=working, mode="bicubic", align_corners=False, antialias=shrinks)
                return pad_to_multiple((pixels * 2 - 1).clamp(-1, 1), self.size_multiple)

            # 8. Encode
            if latents is None:
                lq_latents = of_vae("encode", encode, resized(), lambda: sample_windows(resized(), *WINDOW))
                lq_latents = (lq_latents - shift) * scaling
            else:
                lq_latents = latents[index : index + 1].to(device)
                if lq_latents.shape[-2:] != (rows, columns):
                    raise ValueError(
                        f"`latents` must be {rows}x{columns} for this picture, "
                        f"not {lq_latents.shape[-2]}x{lq_latents.shape[-1]}."
                    )
            lq_latents = lq_latents.to(denoiser.dtype)

            # 9. One step
            prediction = run_tiled(
                lambda latent_tiles: precision.run("step", predict, latent_tiles),
                lq_latents,
                step_plan,
                tiles.tile_batch_size,
                on_tiles_done=tiles_done,
            )
            hq_latents = per_pixel(one_step, prediction, lq_latents)
            if isinstance(hq_latents, Rows) and (callback_on_step_end or output_type == "latent" or codec.sampled):
                hq_latents = hq_latents.whole()
            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, hq_latents)
                changed = callback_on_step_end(self, 0, scheduler.timesteps[0], tensors) or {}
                hq_latents = changed.get("latents", hq_latents)
            if output_type == "latent":
                return hq_latents

            # 10. Decode
            hq_latents = hq_latents / scaling + shift
            decoded = of_vae(
                "decode",
                decode,
                Rows.of(hq_latents) if by_rows and isinstance(hq_latents, Tensor) else hq_latents,
                lambda: sample_windows(hq_latents, *(side // factor for side in WINDOW)),
            )
            decoded = decoded[:, :, : working[0], : working[1]].float()

            # 11. The patches' grid, size, colour and grain, once for the whole picture
            picture = decoded.clamp(-1, 1) / 2 + 0.5
            picture = remove_grid(picture, self.config.degrid if degrid is None else degrid)
            if working != target:
                picture = reduce_bicubic(picture, target)
            if color_fix != "none":
                picture = COLOR_FIXES[color_fix](picture, lq)
            return add_grain(picture, self.config.grain if grain is None else grain)

        # 5. Each picture, again where memory ran out or a strip overflowed
        results: list[Tensor] = []
        tiles = Tiles(tile_size, tile_overlap, tile_batch_size, vae_tile_size)
        overflowed: set[str] = set()
        for index, lq in enumerate(pictures):
            target, working = sizes((lq.shape[-2], lq.shape[-1]))
            precision, handed = Precision(overflowed), 0
            draws = generator[index] if isinstance(generator, list) else generator
            state = None if draws is None else draws.get_state()
            while True:
                shortage = None
                try:
                    result = enlarge(lq, target, working)
                    if rows_callback is None or output_type == "latent":
                        results.append(result.whole() if isinstance(result, Rows) else result)
                        break
                    for top, strip in result.strips() if isinstance(result, Rows) else [(0, result)]:
                        bottom = top + strip.shape[-2]
                        if bottom > handed:
                            fresh = strip[..., max(handed - top, 0) :, :]
                            handed = bottom
                            rows_callback(VaeImageProcessor.pt_to_numpy(fresh)[0], bottom - fresh.shape[-2])
                    break
                except Overflowed:
                    pass
                except Exception as error:
                    if not (self.retries_smaller and is_out_of_memory(error)):
                        raise
                    # Words alone: the traceback would hold on to the tensors that filled the memory.
                    shortage = str(error)
                result = None
                if shortage is not None:
                    tiles = self._with_less_memory(tiles, max(working), shortage, device)
                if draws is not None:
                    draws.set_state(state)

        # 12. Output
        self.maybe_free_model_hooks()
        same_size = all(result.shape == results[0].shape for result in results)
        images: Any
        if output_type in ("latent", "pt"):
            images = torch.cat(results) if same_size else [result[0] for result in results]
        else:
            arrays = [VaeImageProcessor.pt_to_numpy(result)[0] for result in results]
            if output_type == "pil":
                images = [VaeImageProcessor.numpy_to_pil(array)[0] for array in arrays]
            else:
                images = np.stack(arrays) if same_size else arrays
        return TSDSRPipelineOutput(images=images) if return_dict else (images,)


# `DiffusionPipeline.from_pretrained` looks up the class that model_index.json names among diffusers' own, and a
# component's among the modules of diffusers.pipelines, whatever name this package was imported under. The first stays:
# code that comes with a folder does not take the place of an installed package.
if not hasattr(diffusers.pipelines, "tsdsr"):
    diffusers.TSDSRPipeline = diffusers.pipelines.TSDSRPipeline = TSDSRPipeline
    diffusers.pipelines.tsdsr = sys.modules[__name__]
