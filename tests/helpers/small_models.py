"""Settings of a decoder so small that it can be compared with a naive twin in no time."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # the default is so small that every token looks alike
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
