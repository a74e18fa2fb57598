"""Colours of one picture given to another."""

import torch
from comfy_api.latest import io

from ..pipelines.color import COLOR_FIXES
from .pictures import batch_of, frame, resized
from .schema import CATEGORY


class TSDSRColorMatch(io.ComfyNode):
    """The pipeline's colour corrections as a node of their own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TSDSRColorMatch",
            display_name="TSD-SR Color Match",
            category=CATEGORY,
            description="Gives a picture the colours of a reference, for example of the photograph it was made from.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to correct; any size, alpha is kept."),
                io.Image.Input(
                    "reference",
                    tooltip="Where the colours come from; any size. One for all pictures, or one for each.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(COLOR_FIXES),
                    default="wavelet",
                    tooltip="wavelet: the coarse colours of the reference under the details of the image (both must "
                    "show the same). adain: mean and contrast of each RGB channel. lab: the same in CIELAB, so that "
                    "colours move together with lightness.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 leaves the picture as it is, 1 corrects it fully.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The corrected picture, of the size of the image.")],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, reference: torch.Tensor, method: str, strength: float) -> io.NodeOutput:
        pictures, references = batch_of(image, "image"), batch_of(reference, "reference")
        if len(references) not in (1, len(pictures)):
            raise ValueError(
                f"reference holds {len(references)} pictures for {len(pictures)} in image; connect one for all or one "
                "for each."
            )
        results = torch.empty(*pictures.shape[:3], max(3, pictures.shape[3]), device=pictures.device)
        for index in range(len(pictures)):
            picture = frame(pictures, index, "image")
            model = frame(references, index % len(references), "reference")[:, :3].to(picture.device)
            rgb = picture[:, :3]
            # The low frequencies of a larger reference are those of a smaller copy; statistics know no size.
            size = (min(model.shape[-2], rgb.shape[-2]), min(model.shape[-1], rgb.shape[-1]))
            if method == "wavelet":
                model = resized(model, size)
            fixed = torch.lerp(rgb, COLOR_FIXES[method](rgb, model), strength)
            results[index] = torch.cat([fixed, picture[:, 3:]], dim=1)[0].movedim(0, -1)
        return io.NodeOutput(results)
