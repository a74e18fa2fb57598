"""Text encoders at the smallest size."""

import json

import pytest
from transformers import CLIPTextConfig, CLIPTokenizer


@pytest.fixture
def clip(tmp_path):
    """A function for a text encoder of a class and width, and its tokenizer of 77 tokens: `clip(cls, hidden_size)`."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefgh"), *"abcdefgh"]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")

    def make(cls, hidden_size):
        config = CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=hidden_size,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=5,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
        return cls(config).eval(), tokenizer

    return make
