"""SD3's transformer for one timestep and one prompt, without what would compute constants.

TSD-SR always runs at t = 1000 with one caption, so SD3's modulation (adaLN-zero) is constant: its scales and shifts are
part of the linear layer that follows, its gates of the one before. What is left of the prompt's side are the layers
that see the picture.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from .attention import Dispatched
from .prompt_embeddings import PromptEmbeddings

# Of all of SD3's normalisations, which have no weights but those of queries and keys.
EPS = 1e-6


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


class OneStepAttention(nn.Module, AttentionModuleMixin):
    """Attention over the tokens of the picture, and of the prompt where there are any.

    Args:
        dim: width of a token.
        heads, head_dim: as in SD3.
        prompt_tokens: of a block that sees a prompt, else 0.
        first: the prompt's queries, keys and values are weights, because they depend on nothing.
        last: the prompt is not asked for after it, so that it has keys and values alone.
        qk_norm: whether queries and keys are normalised (SD3.5).
    """

    _default_processor_cls = Dispatched
    _available_processors = [Dispatched]
    _supports_qkv_fusion = False

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        prompt_tokens: int = 0,
        first: bool = False,
        last: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * inner)
        self.to_out = nn.Linear(inner, dim)
        self.norm_q = RMSNorm(head_dim, EPS) if qk_norm else None
        self.norm_k = RMSNorm(head_dim, EPS) if qk_norm else None
        self.to_added_qkv = self.to_added_out = self.norm_added_q = self.norm_added_k = None
        # Query (but in the last block), key and value of the prompt, (2 or 3, tokens, inner)
        self.added_qkv = None
        if prompt_tokens:
            parts = 2 if last else 3
            if first:
                self.added_qkv = nn.Parameter(torch.zeros(parts, prompt_tokens, inner))
            else:
                self.to_added_qkv = nn.Linear(dim, parts * inner)
                self.norm_added_q = RMSNorm(head_dim, EPS) if qk_norm and not last else None
                self.norm_added_k = RMSNorm(head_dim, EPS) if qk_norm else None
            self.to_added_out = None if last else nn.Linear(inner, dim)
        self.set_processor(Dispatched())

    def forward(self, picture: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalised tokens (B, tokens, dim) of the picture, and of the prompt, to what each stream adds to its own."""

        def heads(projected: Tensor, parts: int) -> list[Tensor]:
            return [part.unflatten(-1, (self.heads, -1)) for part in projected.chunk(parts, dim=-1)]

        def normed(part: Tensor, norm: nn.Module | None) -> Tensor:
            return part if norm is None else norm(part)

        query, key, value = heads(self.to_qkv(picture), 3)
        query, key = normed(query, self.norm_q), normed(key, self.norm_k)
        if self.added_qkv is not None:
            added = [part.unflatten(-1, (self.heads, -1)).expand(len(picture), -1, -1, -1) for part in self.added_qkv]
        elif self.to_added_qkv is not None:
            added = heads(self.to_added_qkv(prompt), 2 if self.to_added_out is None else 3)
            added[-2] = normed(added[-2], self.norm_added_k)
        else:
            return self.to_out(self.processor.attend(query, key, value)), None
        key, value = torch.cat([key, added[-2]], dim=1), torch.cat([value, added[-1]], dim=1)
        if self.to_added_out is None:
            return self.to_out(self.processor.attend(query, key, value)), None
        query = torch.cat([query, normed(added[0], self.norm_added_q)], dim=1)
        of_picture, of_prompt = self.processor.attend(query, key, value).tensor_split([picture.shape[1]], dim=1)
        return self.to_out(of_picture), self.to_added_out(of_prompt)


class OneStepBlock(nn.Module):
    """A block of SD3's transformer, its modulation part of its layers.

    Args:
        dim, heads, head_dim, prompt_tokens, first, last, qk_norm: as in `OneStepAttention`.
        dual: a second attention, over the picture alone (SD3.5 medium).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        prompt_tokens: int = 0,
        first: bool = False,
        last: bool = False,
        qk_norm: bool = False,
        dual: bool = False,
    ):
        super().__init__()
        self.attn = OneStepAttention(dim, heads, head_dim, prompt_tokens, first, last, qk_norm)
        self.attn2 = OneStepAttention(dim, heads, head_dim, qk_norm=qk_norm) if dual else None
        self.ff = FeedForward(dim, activation_fn="gelu-approximate")
        self.ff_context = FeedForward(dim, activation_fn="gelu-approximate") if prompt_tokens and not last else None

    def forward(self, hidden_states: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, tokens, dim) of the picture and the prompt to the same; no prompt after the last that has one."""
        normed = _layer_norm(hidden_states)
        reads_prompt = prompt is not None and self.attn.to_added_qkv is not None
        attended, added = self.attn(normed, _layer_norm(prompt) if reads_prompt else None)
        hidden_states = hidden_states + attended
        if self.attn2 is not None:
            hidden_states = hidden_states + self.attn2(normed)[0]
        hidden_states = hidden_states + self.ff(_layer_norm(hidden_states))
        if self.ff_context is None:
            return hidden_states, None
        prompt = prompt + added
        return hidden_states, prompt + self.ff_context(_layer_norm(prompt))


class OneStepSD3Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """SD3's multimodal transformer (arXiv 2403.03206) for one timestep and one prompt.

    Computes what `SD3Transformer2DModel` computes with that timestep and prompt, without its embedders of time and
    text and without adaLN layers, which are a third of SD3-medium's parameters. `from_sd3` makes one. With
    `text_stream="none"` it is TinySR's network (arXiv 2508.17434, section 3.3): the picture's tokens alone.

    Args:
        patch_size, in_channels, out_channels, num_layers, attention_head_dim, num_attention_heads,
            dual_attention_layers, qk_norm, pos_embed_max_size: as in `SD3Transformer2DModel`.
        text_stream: "full": the prompt's tokens go through the network beside the picture's, as in SD3; or "none".
        prompt_tokens: of the prompt; 0 for `text_stream="none"`.
        timestep: the one it is for, 0..1000.
        separable_positions: the table of positions is [column | row], each (pos_embed_max_size, width / 2), as sines
            and cosines are. Otherwise it is (pos_embed_max_size, pos_embed_max_size, width).

    Raises:
        ValueError: for a text stream that does not exist or does not fit the number of tokens.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["OneStepBlock"]
    _repeated_blocks = ["OneStepBlock"]
    _skip_layerwise_casting_patterns = ["proj_in", "norm"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int = 16,
        num_layers: int = 24,
        attention_head_dim: int = 64,
        num_attention_heads: int = 24,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        pos_embed_max_size: int = 192,
        text_stream: str = "full",
        prompt_tokens: int = 333,
        timestep: float = 1000.0,
        separable_positions: bool = True,
    ):
        super().__init__()
        if text_stream not in ("full", "none") or (text_stream == "full") != (prompt_tokens > 0):
            raise ValueError(
                f"`text_stream` must be 'full' with `prompt_tokens` above 0 or 'none' with 0 of them, not"
                f" {text_stream!r} with {prompt_tokens!r}."
            )
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"`qk_norm` must be None or 'rms_norm', not {qk_norm!r}.")
        heads, head_dim, side = num_attention_heads, attention_head_dim, pos_embed_max_size
        dim = heads * head_dim
        self.proj_in = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        if separable_positions:
            self.register_buffer("column_positions", torch.zeros(side, dim // 2))
            self.register_buffer("row_positions", torch.zeros(side, dim - dim // 2))
        else:
            self.register_buffer("positions", torch.zeros(side, side, dim))
        # After the context embedder; where the first block is the last as well, nothing asks for it.
        self.prompt = nn.Parameter(torch.zeros(1, prompt_tokens, dim)) if prompt_tokens and num_layers > 1 else None
        self.transformer_blocks = nn.ModuleList(
            OneStepBlock(
                dim,
                heads,
                head_dim,
                prompt_tokens,
                first=index == 0,
                last=index == num_layers - 1,
                qk_norm=qk_norm is not None,
                dual=index in dual_attention_layers,
            )
            for index in range(num_layers)
        )
        self.proj_out = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.gradient_checkpointing = False

    def position_table(self, height: int, width: int) -> Tensor:
        """Of the patches of a picture, from the middle of the table: (1, height * width, dim).

        Raises:
            ValueError: for a picture larger than the table.
        """
        side = self.config.pos_embed_max_size
        if max(height, width) > side:
            raise ValueError(
                f"The latents have {height}x{width} patches, but the table of positions only {side}x{side}; use tiles."
            )
        rows, columns = (slice((side - length) // 2, (side - length) // 2 + length) for length in (height, width))
        if not self.config.separable_positions:
            return self.positions[rows, columns].flatten(0, 1)[None]
        of_columns, of_rows = self.column_positions[columns], self.row_positions[rows]
        return torch.cat(
            [of_columns[None].expand(height, -1, -1), of_rows[:, None].expand(-1, width, -1)], dim=-1
        ).flatten(0, 1)[None]

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity of latents (B, in_channels, h, w) as (B, out_channels, h, w); sides are whole patches.

        Args:
            hidden_states: scaled latents.
            joint_attention_kwargs: `{"scale": s}` is the strength of LoRAs.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.
        """
        patch = self.config.patch_size
        height, width = (length // patch for length in hidden_states.shape[-2:])
        tokens = self.proj_in(hidden_states).flatten(2).mT.contiguous() + self.position_table(height, width)
        prompt = self.prompt
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens, prompt = self._gradient_checkpointing_func(block, tokens, prompt)
            else:
                tokens, prompt = block(tokens, prompt)
        patches = self.proj_out(_layer_norm(tokens)).unflatten(-1, (patch, patch, -1)).unflatten(1, (height, width))
        sample = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def from_sd3(
        cls,
        transformer: SD3Transformer2DModel,
        prompt_embeddings: PromptEmbeddings,
        timestep: float = 1000.0,
        text_stream: str = "full",
        dtype: torch.dtype | None = None,
    ) -> "OneStepSD3Transformer2DModel":
        """SD3's transformer with everything constant worked out, in float64 before it is rounded to `dtype`.

        Args:
            transformer: its LoRAs added to the weights for good.
            prompt_embeddings: the one prompt, of the widths of the transformer.
            timestep: 0..1000.
            text_stream: "full", or "none" to leave out the prompt's tokens, for a transformer that was trained so.
            dtype: of the result; None for the transformer's own.

        Raises:
            ValueError: for a transformer with LoRAs beside its weights or quantized weights, and for a prompt of other
                widths.
        """
        if getattr(transformer, "peft_config", None):
            raise ValueError(
                "LoRAs lie beside the transformer's weights, where they cannot be baked in: call `fuse_lora()` and"
                " `unload_lora_weights()` first."
            )
        state = transformer.state_dict()
        if not all(type(tensor) is Tensor and tensor.is_floating_point() for tensor in state.values()):
            raise ValueError("The transformer is quantized; bake it first and quantize the result.")
        config = transformer.config
        wanted = (config.joint_attention_dim, config.pooled_projection_dim)
        given = (prompt_embeddings.config.embed_dim, prompt_embeddings.config.pooled_embed_dim)
        if given != wanted:
            raise ValueError(
                f"The prompt has tokens of {given[0]} numbers and pooled ones of {given[1]}, but this transformer takes"
                f" {wanted[0]} and {wanted[1]}."
            )
        prompt, pooled = prompt_embeddings.prompt_embeds, prompt_embeddings.pooled_prompt_embeds
        return cls.from_sd3_state_dict(
            state, config, pooled, prompt if text_stream == "full" else None, timestep, dtype or transformer.dtype
        )

    @classmethod
    def from_sd3_state_dict(
        cls,
        state: Mapping[str, Tensor],
        config: Mapping[str, Any],
        pooled_prompt_embeds: Tensor,
        prompt_embeds: Tensor | None = None,
        timestep: float = 1000.0,
        dtype: torch.dtype = torch.float32,
    ) -> "OneStepSD3Transformer2DModel":
        """`from_sd3` of weights under the names of `SD3Transformer2DModel`; without a prompt its layers may be absent.

        Args:
            state: the weights.
            config: of `SD3Transformer2DModel`.
            pooled_prompt_embeds: (1, pooled_projection_dim).
            prompt_embeds: (1, tokens, joint_attention_dim), or None for a network without a text stream.
            timestep: 0..1000.
            dtype: of the result.
        """
        count, heads, side = config["num_layers"], config["num_attention_heads"], config["pos_embed_max_size"]
        dual = tuple(config.get("dual_attention_layers") or ())
        made: dict[str, Tensor] = {}

        def get(name: str) -> Tensor:
            return state[name].detach().double()

        def layer(name: str) -> tuple[Tensor, Tensor]:
            return get(f"{name}.weight"), get(f"{name}.bias")

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, *layer(name))

        def put(name: str, *layers: tuple[Tensor, Tensor], gate: Tensor | None = None) -> None:
            """Store layers of the same input as one, their outputs times `gate`."""
            weight, bias = (torch.cat(parts) for parts in zip(*layers, strict=True))
            if gate is not None:
                weight, bias = gate[:, None] * weight, gate * bias
            made[f"{name}.weight"], made[f"{name}.bias"] = weight.to(dtype), bias.to(dtype)

        def modulated(name: str, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
            """The layer that takes x where `name` takes x * (1 + scale) + shift."""
            weight, bias = layer(name)
            return weight * (1 + scale), bias + weight @ shift

        # The sinusoid in float32, as the networks compute it
        waves = get_timestep_embedding(
            torch.tensor([float(timestep)]), 256, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        embedding = torch.zeros((), dtype=torch.float64)
        for name, x in (("timestep_embedder", waves), ("text_embedder", pooled_prompt_embeds)):
            x = x.detach().to(state["time_text_embed.timestep_embedder.linear_1.weight"].device).double()
            x = F.silu(linear(f"time_text_embed.{name}.linear_1", x))
            embedding = embedding + linear(f"time_text_embed.{name}.linear_2", x)
        activated = F.silu(embedding)[0]

        def modulation(name: str, parts: int) -> tuple[Tensor, ...]:
            return linear(f"{name}.linear", activated).chunk(parts)

        def per_head(x: Tensor, norm: str) -> Tensor:
            """Queries or keys after their normalisation, where they have one."""
            if config.get("qk_norm") is None:
                return x
            split = x.unflatten(-1, (heads, -1))
            return (split * (split.square().mean(-1, keepdim=True) + EPS).rsqrt() * get(f"{norm}.weight")).flatten(-2)

        def attention(name: str, scale: Tensor, shift: Tensor, gate: Tensor) -> None:
            put(f"{name}.to_qkv", *(modulated(f"{name}.{part}", scale, shift) for part in ("to_q", "to_k", "to_v")))
            put(f"{name}.to_out", layer(f"{name}.to_out.0"), gate=gate)
            for norm in ("norm_q", "norm_k"):
                if config.get("qk_norm") is not None:
                    made[f"{name}.{norm}.weight"] = get(f"{name}.{norm}.weight").to(dtype)

        def feed_forward(name: str, scale: Tensor, shift: Tensor, gate: Tensor) -> None:
            put(f"{name}.net.0.proj", modulated(f"{name}.net.0.proj", scale, shift))
            put(f"{name}.net.2", layer(f"{name}.net.2"), gate=gate)

        tokens = None
        if prompt_embeds is not None:
            tokens = linear("context_embedder", prompt_embeds.detach().to(activated.device).double())
            if count > 1:
                made["prompt"] = tokens.to(dtype)
        for index in range(count):
            name = f"transformer_blocks.{index}"
            if index in dual:
                shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = modulation(f"{name}.norm1", 9)
                attention(f"{name}.attn2", second[1], second[0], second[2])
            else:
                shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation(f"{name}.norm1", 6)
            attention(f"{name}.attn", scale, shift, gate)
            feed_forward(f"{name}.ff", ff_scale, ff_shift, ff_gate)
            if tokens is None:
                continue
            last = index == count - 1
            if last:
                # Here, as in the head, diffusers has the scale first.
                scale, shift = modulation(f"{name}.norm1_context", 2)
            else:
                shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation(f"{name}.norm1_context", 6)
                put(f"{name}.attn.to_added_out", layer(f"{name}.attn.to_add_out"), gate=gate)
                feed_forward(f"{name}.ff_context", ff_scale, ff_shift, ff_gate)
            kinds = ("k", "v") if last else ("q", "k", "v")
            layers = [modulated(f"{name}.attn.add_{kind}_proj", scale, shift) for kind in kinds]
            if index == 0:
                parts = [F.linear(_layer_norm(tokens[0]), *each) for each in layers]
                parts[:-1] = [
                    per_head(part, f"{name}.attn.norm_added_{kind}")
                    for part, kind in zip(parts[:-1], kinds[:-1], strict=True)
                ]
                made[f"{name}.attn.added_qkv"] = torch.stack(parts).to(dtype)
            else:
                put(f"{name}.attn.to_added_qkv", *layers)
                for kind in kinds[:-1]:
                    if config.get("qk_norm") is not None:
                        norm = f"{name}.attn.norm_added_{kind}"
                        made[f"{norm}.weight"] = get(f"{norm}.weight").to(dtype)

        scale, shift = modulation("norm_out", 2)
        put("proj_out", modulated("proj_out", scale, shift))
        put("proj_in", layer("pos_embed.proj"))
        table = state["pos_embed.pos_embed"].detach().view(side, side, -1)
        half = table.shape[-1] // 2
        of_columns, of_rows = table[0, :, :half], table[:, 0, half:]
        separable = bool((table[..., :half] == of_columns).all() and (table[..., half:] == of_rows[:, None]).all())
        # Copies, because slices would keep, and save, what they are cut from.
        if separable:
            made["column_positions"], made["row_positions"] = (x.clone().to(dtype) for x in (of_columns, of_rows))
        else:
            made["positions"] = table.clone().to(dtype)

        with torch.device("meta"):
            model = cls(
                patch_size=config["patch_size"],
                in_channels=config["in_channels"],
                out_channels=config["out_channels"] or config["in_channels"],
                num_layers=count,
                attention_head_dim=config["attention_head_dim"],
                num_attention_heads=heads,
                dual_attention_layers=dual,
                qk_norm=config.get("qk_norm"),
                pos_embed_max_size=side,
                text_stream="none" if tokens is None else "full",
                prompt_tokens=0 if tokens is None else tokens.shape[1],
                timestep=float(timestep),
                separable_positions=separable,
            )
        model.load_state_dict(made, assign=True)
        return model.eval()


# As with `PromptEmbeddings`: the library that a saved pipeline names.
OneStepSD3Transformer2DModel.__module__ = "tsdsr"
