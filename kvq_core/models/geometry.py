"""What the cache must know of a model: heads, head dims and windows of every layer, and its limits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvq_core.errors import KvqError

UNLIMITED = 1 << 20
"""Longest request where a config states no limit."""


@dataclass(frozen=True)
class LayerGeometry:
    """The keys and values of one layer."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    """A query at t sees keys j > t - window; 0: all of them."""

    @property
    def elements(self) -> int:
        """Numbers in the key and value of one token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class ModelGeometry:
    """The model as the cache and the scheduler see it."""

    num_layers: int
    layers: tuple[LayerGeometry, ...]
    num_q_heads: int
    vocab_size: int
    max_model_len: int
    """Longest prompt + answer for which the model's positions hold, whatever else is in the batch."""
    eos_token_ids: tuple[int, ...]

    @property
    def is_windowed(self) -> bool:
        """Whether a layer sees a sliding window alone."""
        return any(layer.window for layer in self.layers)


def text_config(config: Any) -> Any:
    """The language model's part of a config (multimodal configs nest it)."""
    return config.get_text_config(decoder=True)


def model_geometry(config: Any) -> ModelGeometry:
    """The geometry that a transformers config states; raises `KvqError` where it states none."""
    config = text_config(config)
    heads = getattr(config, "num_attention_heads", None)
    hidden, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if not (isinstance(heads, int) and isinstance(hidden, int) and isinstance(layers, int)):
        raise KvqError(
            f"the config of model type {config.model_type!r} states no heads, hidden size or layers",
            "use the folder or hub id of a causal language model",
        )
    # Some configs hold one of their own for every layer, and refuse to speak for all.
    own = getattr(config, "per_layer_config", None) or [config] * layers
    return ModelGeometry(
        num_layers=layers,
        layers=tuple(_layer(own[i], heads, hidden, window) for i, window in enumerate(layer_windows(config))),
        num_q_heads=heads,
        vocab_size=config.vocab_size,
        max_model_len=max_positions(config),
        eos_token_ids=as_ids(getattr(config, "eos_token_id", None)),
    )


def _layer(config: Any, heads: int, hidden: int, window: int) -> LayerGeometry:
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads is None:
        kv_heads = 1 if getattr(config, "multi_query", False) else heads
    key_dim = getattr(config, "head_dim", None) or hidden // heads
    return LayerGeometry(kv_heads, key_dim, getattr(config, "v_head_dim", None) or key_dim, window)


def layer_windows(config: Any) -> tuple[int, ...]:
    """The window of each layer: by `layer_types` where the config has them, else `sliding_window` for all."""
    window = getattr(config, "sliding_window", None) or 0
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """The RoPE settings of a config: one set, or one for each type of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in settings:
        yield settings
    else:
        yield from (value for value in settings.values() if isinstance(value, dict))


def max_positions(config: Any) -> int:
    """Longest request: the config's number of positions.

    RoPE types that change all frequencies once the longest position in the batch passes the original
    length (`dynamic`, `longrope`) are held to that length: a request's result must not depend on load.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limit = next((getattr(config, n) for n in names if getattr(config, n, None)), UNLIMITED)
    for rope in rope_parameters(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, original or limit)
    return int(limit)


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids from a config's field: None, one, or a list."""
    if value is None:
        return ()
    return tuple(int(i) for i in value) if isinstance(value, list | tuple) else (int(value),)
