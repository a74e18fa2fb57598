"""A pipeline whose memory the host manages, and a run of it over a batch of pictures."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..pipelines.memory import STREAMED, Tiles, is_out_of_memory, smaller_tiles, vae_bytes_per_pixel
from .pictures import batch_of, frame, masks_of, resized, upscaled_mask
from .preview import Progress

if TYPE_CHECKING:
    from ..pipelines.pipeline_tsdsr import TSDSRPipeline

logger = logging.getLogger("tsdsr")


class TSDSRNetworks(torch.nn.Module):
    """The networks of a pipeline as one module, which the host moves as a whole."""

    def __init__(self, pipeline: "TSDSRPipeline"):
        super().__init__()
        self.vae = pipeline.vae
        self.denoiser = pipeline.denoiser
        self.prompt_embeddings = pipeline.prompt_embeddings


class HostedModel:
    """What travels along a TSDSR_MODEL link.

    Attributes:
        pipeline: the pipeline; its networks lie where the host has put them.
        patcher: the host's handle on them: it is evicted when others need room, and comes back when it is used.
        info: what the model is, for people.
    """

    def __init__(self, pipeline: "TSDSRPipeline", info: str):
        self.pipeline = pipeline
        self.info = info
        self.patcher = ModelPatcher(
            TSDSRNetworks(pipeline),
            load_device=model_management.get_torch_device(),
            offload_device=model_management.unet_offload_device(),
        )
        self._strength = 1.0
        # The host moves weights, and `_Runner` remembers for a whole batch what fits.
        pipeline.retries_smaller = False
        pipeline.set_progress_bar_config(disable=True)

    @property
    def adapters(self) -> list[str]:
        """Names of LoRAs that are kept beside the weights, so that their strength can be changed."""
        return sorted({name for names in self.pipeline.get_list_adapters().values() for name in names})

    def set_lora_strength(self, strength: float) -> None:
        """Scale the LoRAs that are kept beside the weights; a merged or absent one is left as it is, with a word."""
        names = self.adapters
        if not names:
            if strength != 1:
                logger.warning("[tsdsr] lora_strength has no effect: this model has no LoRA kept beside its weights.")
        elif strength != self._strength:
            self.pipeline.set_adapters(names, [strength] * len(names))
            self._strength = strength

    @contextmanager
    def ready(self, memory: float) -> Iterator[None]:
        """The networks on the device they run on, with `memory` bytes free beside them as far as the host can.

        Raises:
            MemoryError: if the weights themselves do not fit.
        """
        try:
            model_management.load_models_gpu([self.patcher], memory_required=memory, force_full_load=True)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"The model's {self.patcher.model_size() / 1e9:.1f} GB of weights do not fit into memory; choose dtype"
                " fp8 or bf16 in the loader, or close what else uses the memory."
            ) from error
        networks, device = self.patcher.model, self.patcher.load_device
        # With --novram the host leaves in place what it cannot cast layer by layer.
        stranded = any(weight.device.type != torch.device(device).type for weight in networks.parameters())
        if stranded:
            networks.to(device)
        try:
            yield
        finally:
            if stranded:
                networks.to(self.patcher.offload_device)

    def vae_bytes(self, pixels: int, tiles: Tiles) -> float:
        """About what the VAE takes for a picture of so many pixels, in strips where it is large."""
        from ..pipelines.codec import needs

        widths, itemsize, local = needs(self.pipeline.vae)
        side = min(tiles.vae_tile_size, STREAMED) if local else tiles.vae_tile_size
        return min(pixels, side**2) * vae_bytes_per_pixel(widths, itemsize, local)


def upscale_batch(
    model: HostedModel,
    image: Tensor,
    mask: Tensor | None,
    tiles: Tiles,
    lora_strength: float,
    seed: int,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Run the pipeline on the pictures of a batch, one after the other: memory does not grow with their number.

    Args:
        model: from the loader.
        image: (B, H, W, C) with 1, 3 or 4 channels, 0..1; a fourth is alpha, enlarged and rejoined.
        mask: (B', h, w) of any size, or None.
        tiles: what to begin with; smaller ones follow where memory runs out.
        lora_strength: of LoRAs that are kept beside the weights.
        seed: for each picture's draw of the posterior, where that is asked for.
        arguments: of the pipeline.

    Returns:
        The pictures, (B, H', W', 3 or 4) float32, and a mask (B', H', W'): the enlarged one, or the transparency of the
        pictures, or zeros.
    """
    batch, masks = batch_of(image, "image"), masks_of(mask)
    count = batch.shape[0]
    model.set_lora_strength(lora_strength)
    progress = Progress(count)
    results = None
    runner = _Runner(model, tiles, progress, arguments)
    size = (batch.shape[1], batch.shape[2])
    with model.ready(runner.memory_for(size)):
        for index in range(count):
            model_management.throw_exception_if_processing_interrupted()
            picture = frame(batch, index, "image")
            generator = torch.Generator().manual_seed(seed) if arguments.get("sample_posterior") else None
            rgb = runner.run(picture[:, :3], generator)
            if results is None:
                results = _room_for(count, rgb.shape[-2], rgb.shape[-1], picture.shape[1])
            results[index, ..., :3] = rgb[0].movedim(0, -1)
            if picture.shape[1] == 4:
                results[index, ..., 3] = resized(picture[:, 3:], tuple(rgb.shape[-2:]))[0, 0]
    assert results is not None
    shape = (results.shape[1], results.shape[2])
    if masks is not None:
        enlarged = upscaled_mask(masks, shape)
    else:
        # ComfyUI's masks mark what is transparent.
        enlarged = 1 - results[..., 3] if results.shape[-1] == 4 else torch.zeros(1, *shape, device=results.device)
    return results, enlarged.to(results.device)


def _room_for(count: int, height: int, width: int, channels: int) -> Tensor:
    """Memory for all results, where the host wants what travels between nodes.

    Raises:
        MemoryError: if there is not that much.
    """
    try:
        return torch.empty(count, height, width, channels, device=model_management.intermediate_device())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"Not enough memory to hold {count} results of {width}x{height}"
            f" ({4 * count * channels * height * width / 1e9:.1f} GB); choose a smaller upscale, or fewer pictures at"
            " once."
        ) from error


class _Runner:
    """Runs pictures with one set of arguments, and remembers with which tiles that went."""

    def __init__(self, model: HostedModel, tiles: Tiles, progress: Progress, arguments: dict[str, Any]):
        self.model, self.tiles, self.progress, self.arguments = model, tiles, progress, arguments

    def memory_for(self, size: tuple[int, int]) -> float:
        """About how many bytes a picture of this height and width takes beside the weights."""
        height, width = self._result_size(size)
        # The picture in float32 at several stages, and the strip that is being decoded.
        return 6 * 12 * height * width + self.model.vae_bytes(height * width, self.tiles)

    def run(self, picture: Tensor, generator: torch.Generator | None) -> Tensor:
        """One picture (1, 3, H, W) in 0..1 -> (1, 3, H', W')."""
        while True:
            self.progress.start(picture)
            failure: Exception | None = None
            try:
                return self.model.pipeline(
                    image=picture,
                    output_type="pt",
                    generator=generator,
                    tile_callback=self.progress.tiles_done,
                    **asdict(self.tiles),
                    **self.arguments,
                ).images
            except Exception as error:
                if _is_compile_failure(error) and _stop_compiling(self.model.pipeline):
                    logger.warning("[tsdsr] torch.compile failed (%s); going on without it.", type(error).__name__)
                elif is_out_of_memory(error):
                    # Kept as words: the traceback would hold on to the tensors that filled the memory.
                    failure = MemoryError(str(error).splitlines()[0] if str(error) else "memory ran out")
                else:
                    raise
            if failure is not None:
                model_management.soft_empty_cache()
                self._shrink(tuple(picture.shape[-2:]), failure)

    def _shrink(self, size: tuple[int, int], failure: Exception) -> None:
        height, width = self._result_size(size)
        smaller = smaller_tiles(self.tiles, max(height, width))
        if smaller is None:
            raise MemoryError(
                f"Not enough memory for {width}x{height} even with tiles of {self.tiles.tile_size} px, one at a time"
                f" ({failure}); unload other models, close other programs, choose a smaller upscale, or load the model"
                " with dtype fp8."
            )
        logger.warning(
            "[tsdsr] Out of memory: trying again with tile_batch_size %d, tile_size %d, vae_tile_size %d.",
            smaller.tile_batch_size,
            smaller.tile_size,
            smaller.vae_tile_size,
        )
        self.tiles = smaller

    def _result_size(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = self.arguments.get("height"), self.arguments.get("width")
        if height is None and width is None:
            factor = self.arguments["upscale"]
        else:
            factor = max((height or 0) / size[0], (width or 0) / size[1])
        # Small pictures are worked on larger.
        factor = max(factor, self.arguments.get("process_size", 0) / min(size))
        return round(size[0] * factor), round(size[1] * factor)


def _is_compile_failure(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def compiled_parts(pipeline: "TSDSRPipeline") -> list[torch.nn.Module]:
    """The modules that the pipeline calls as such; the VAE's own call is not among them."""
    return [pipeline.vae.encoder, pipeline.denoiser, pipeline.vae.decoder]


def _stop_compiling(pipeline: "TSDSRPipeline") -> bool:
    """Whether something was compiled; it no longer is."""
    compiled = [module for module in compiled_parts(pipeline) if module._compiled_call_impl is not None]
    for module in compiled:
        module._compiled_call_impl = None
    return bool(compiled)
