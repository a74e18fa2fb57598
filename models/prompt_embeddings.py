"""The fixed prompt of a one-step model, kept as a saved component so that no text encoder is needed."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin


class PromptEmbeddings(ModelMixin, ConfigMixin):
    """Precomputed embeddings of one prompt, SD3's or SD2's.

    The published TSD-SR weights always run with one fixed caption (`dataset/default/*.pt` of the release).

    Args:
        sequence_length: number of text tokens, 333 for SD3 (77 CLIP + 256 T5), 77 for SD2.
        embed_dim: width of a token, 4096 for SD3 (`joint_attention_dim` of the transformer), 1024 for SD2
            (`cross_attention_dim` of the UNet).
        pooled_embed_dim: width of the pooled vector, 2048 for SD3 (`pooled_projection_dim` of the transformer), 0 for
            SD2, whose UNet takes none.

    Attributes:
        prompt_embeds: parameter of shape (1, sequence_length, embed_dim).
        pooled_prompt_embeds: parameter of shape (1, pooled_embed_dim).
    """

    @register_to_config
    def __init__(self, sequence_length: int = 333, embed_dim: int = 4096, pooled_embed_dim: int = 2048):
        super().__init__()
        self.prompt_embeds = torch.nn.Parameter(torch.zeros(1, sequence_length, embed_dim))
        self.pooled_prompt_embeds = torch.nn.Parameter(torch.zeros(1, pooled_embed_dim))

    @classmethod
    def from_tensors(
        cls, prompt_embeds: torch.Tensor, pooled_prompt_embeds: torch.Tensor | None = None
    ) -> "PromptEmbeddings":
        """Wrap embeddings of shape (1, tokens, width) and (1, pooled width); dtype and device are kept.

        Without pooled ones, `pooled_prompt_embeds` has the shape (1, 0).

        Raises:
            ValueError: if a tensor has another rank or a batch size other than 1.
        """
        if pooled_prompt_embeds is None:
            pooled_prompt_embeds = prompt_embeds.new_zeros(1, 0)
        for name, tensor, rank in (
            ("prompt_embeds", prompt_embeds, 3),
            ("pooled_prompt_embeds", pooled_prompt_embeds, 2),
        ):
            if tensor.ndim != rank or tensor.shape[0] != 1:
                raise ValueError(
                    f"{name} must have {rank} dimensions and a batch of 1, not shape {tuple(tensor.shape)}."
                )
        module = cls(prompt_embeds.shape[1], prompt_embeds.shape[2], pooled_prompt_embeds.shape[1])
        module.prompt_embeds = torch.nn.Parameter(prompt_embeds.detach().clone())
        module.pooled_prompt_embeds = torch.nn.Parameter(pooled_prompt_embeds.detach().clone())
        return module

    def forward(self, batch_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings repeated for a batch: (batch, tokens, width) and (batch, pooled width)."""
        return self.prompt_embeds.expand(batch_size, -1, -1), self.pooled_prompt_embeds.expand(batch_size, -1)


# What a saved pipeline names as the library of this class (model_index.json), whatever name this package was imported
# under: as a folder among ComfyUI's custom nodes it has another. The pipeline's module registers it with diffusers.
PromptEmbeddings.__module__ = "tsdsr"
