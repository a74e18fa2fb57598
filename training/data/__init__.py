"""What a model is trained on: photographs from folders, pairs, prepared shards or streams, cut and degraded."""

from .loader import BatchSettings, degrade_batch, training_batches
from .photographs import load_uint8, photograph_of, split_photographs
from .sources import Example, Folder, Pairs, PreparedShards, Streamed, UnreadableImage

__all__ = [
    "BatchSettings",
    "Example",
    "Folder",
    "Pairs",
    "PreparedShards",
    "Streamed",
    "UnreadableImage",
    "degrade_batch",
    "load_uint8",
    "photograph_of",
    "split_photographs",
    "training_batches",
]
