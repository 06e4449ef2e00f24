"""A quantized cache for Hugging Face's `generate`, with the model's own attention.

from kvq_core import KVQCache

cache = KVQCache(model.config, policy=42)
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=64)

It follows the engine's rule: a prompt sees itself unquantized; a decode step reads everything, itself
included, through the codec, but for the policy's sink and recent tokens. It saves memory, not time: every
step decodes a layer's cache before the layer attends to it, where the engine's kernels read the bytes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvq_core.codecs import BaseCodec, get_codec
from kvq_core.errors import KvqError
from kvq_core.policies import Policy, get_policy


class KVQCache(Cache):
    """Keys and values of every layer under a policy, for `model.generate(past_key_values=…)`.

    `policy`, `sink` and `recent` are those of `EngineConfig`. With left padding and a policy that has sink
    tokens, pass the batch's `attention_mask` [B, T], so that sinks are counted from a row's first token.
    Layers without keys and values (linear attention) keep their states as they are.
    Raises `KvqError` for unknown policies and for layers that cache something else than keys and values.
    """

    def __init__(
        self,
        config: Any,
        policy: int | str | Policy,
        sink: int | None = None,
        recent: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise KvqError(f"{type(config).__name__} is no model's config", "give `model.config`")
        self.policy = get_policy(policy).with_window(sink, recent)
        padding = None if attention_mask is None else (attention_mask.cumsum(-1) == 0).sum(-1)
        plain = DynamicCache(config=config).layers
        policies = self.policy.by_layer(len(plain))
        layers = [
            _under_policy(layer, index, own, padding)
            for index, (layer, own) in enumerate(zip(plain, policies, strict=True))
        ]
        super().__init__(layers=layers)

    def __repr__(self) -> str:
        return (
            f"KVQCache(policy={self.policy.label!r}, tokens={self.get_seq_length()}, bytes={self.nbytes:,})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take: codes, metadata and the unquantized tokens."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, CodecLayer))


def _under_policy(layer: Any, index: int, policy: Policy, padding: Tensor | None) -> Any:
    """What takes the place of transformers' own cache layer."""
    if not isinstance(layer, CacheLayerMixin):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise KvqError(
            f"layer {index} caches more than keys and values ({type(layer).__name__})",
            "use transformers' DynamicCache for this model",
        )
    return CodecLayer(policy, getattr(layer, "sliding_window", 0), padding)


class CodecLayer(CacheLayerMixin):
    """Keys and values [B, Hkv, N, D] of one layer as bytes; every token is quantized once, when it comes.

    A windowed layer drops tokens that no later query can see. Several new tokens at a time are a prompt
    chunk: they see each other unquantized, and earlier tokens as the first of them does.
    """

    is_croppable = True

    def __init__(self, policy: Policy, window: int = 0, padding: Tensor | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.window = window
        self.is_sliding = bool(window)
        self.record_past = False
        self.codecs: tuple[BaseCodec, BaseCodec] = get_codec(policy.key), get_codec(policy.value)
        self._given_padding = padding
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._length = 0
        self._records: list[Tensor] = []
        """Codes and metadata of K, then of V, [B, Hkv, N, ·]; the last column is the latest token."""
        self._recent: list[Tensor] = []
        """K and V of the latest tokens, in the model's dtype."""
        self._sink: list[Tensor] = []
        """K and V of each row's first tokens, [B, Hkv, sink, D]."""
        self._padding: Tensor | None = None
        """[B]: columns before each row's first token."""

    @torch.no_grad()
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn batch, heads, dims, dtype and device; `KvqError` where a codec can't take the head dim."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._dims = key_states.shape[-1], value_states.shape[-1]
        for codec, dim in zip(self.codecs, self._dims, strict=True):
            codec.check_head_dim(dim)
        batch, heads = key_states.shape[:2]
        empty = [x[..., :0, :] for x in (key_states, value_states)]
        self._records = [part for codec, x in zip(self.codecs, empty, strict=True) for part in codec.write(x)]
        self._recent = empty if self.policy.recent else []
        if self.policy.sink:
            shape = (batch, heads, self.policy.sink)
            self._sink = [key_states.new_zeros(*shape, dim) for dim in self._dims]
            self._padding = self._padding_of(batch)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens, [B, Hkv, T, D] each; what the layer attends to: the visible past, and them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self._visible, [key_states, value_states]
        if self._length and key_states.shape[-2] == 1:
            self._write(new)
            keys, values = self._read(past + 1, self.policy.recent)
        else:
            seen = self._read(past, self.policy.recent - 1) if past else []
            self._write(new)
            keys, values = (
                torch.cat(parts, -2) for parts in zip(*([seen] if seen else []), new, strict=True)
            )
        self._trim()
        return keys, values

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self._records, *self._recent, *self._sink))

    @property
    def _visible(self) -> int:
        """Tokens that a query right after the latest token would still see."""
        return min(self._length, self.window - 1) if self.window else self._length

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self.window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return for so many queries."""
        return self._visible + query_length, self._length - self._visible

    def activate_past_recording(self) -> None:
        """Keep what a `crop` may bring back: assisted decoding takes candidates away again."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take -`tokens_to_remove` tokens away again (a number up to 0, as transformers has it).

        Tokens that had left the window, or the unquantized part, stay out of it unless past was recorded.
        """
        count = -int(tokens_to_remove)  # older versions of transformers pass a tensor
        if count < 0:
            raise KvqError(f"crop({tokens_to_remove}): a positive number", "give minus the tokens to remove")
        count = min(count, self._length)
        held = self._records[0].shape[-2] if self._records else 0
        if count and self._length > held and not self.record_past:
            raise KvqError(
                f"a layer with a window of {self.window} tokens can't be cropped: earlier ones are gone",
                "call `activate_past_recording()` before the tokens come",
            )
        if count:
            self._records = [x[..., : x.shape[-2] - count, :] for x in self._records]
            self._recent = [x[..., : max(0, x.shape[-2] - count), :] for x in self._recent]
            self._length -= count
        self._trim(after_crop=True)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)])

    def _select(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Change the batch of everything that is held."""
        self._records, self._recent, self._sink = (
            [rows(x) for x in group] for group in (self._records, self._recent, self._sink)
        )
        if self._padding is not None:
            self._padding = rows(self._padding)

    def _padding_of(self, batch: int) -> Tensor:
        """[B] columns before each row's first token; beam search has several rows for one of the mask."""
        if self._given_padding is None:
            return torch.zeros(batch, dtype=torch.long, device=self.device)
        given = self._given_padding.to(self.device)
        if batch % given.shape[0]:
            raise KvqError(
                f"the cache's attention_mask has {given.shape[0]} rows, the batch {batch}",
                "make a new KVQCache for every call of generate, with that call's attention_mask",
            )
        return given.repeat_interleave(batch // given.shape[0])

    @torch.no_grad()
    def _write(self, new: list[Tensor]) -> None:
        encoded = [part for codec, x in zip(self.codecs, new, strict=True) for part in codec.write(x)]
        self._records = [torch.cat(parts, -2) for parts in zip(self._records, encoded, strict=True)]
        if self._recent:
            self._recent = [torch.cat(parts, -2) for parts in zip(self._recent, new, strict=True)]
        if self._padding is not None:
            columns = torch.arange(self._length, self._length + new[0].shape[-2], device=self.device)
            place = columns - self._padding[:, None]
            row, column = ((place >= 0) & (place < self.policy.sink)).nonzero(as_tuple=True)
            for held, x in zip(self._sink, new, strict=True):
                held[row, :, place[row, column]] = x[row, :, column]
        self._length += new[0].shape[-2]

    @torch.no_grad()
    def _read(self, count: int, recent: int) -> list[Tensor]:
        """K and V of the last `count` columns; the last `recent` and the sinks are unquantized."""
        out = []
        for index, (codec, dim) in enumerate(zip(self.codecs, self._dims, strict=True)):
            codes, meta = (x[..., x.shape[-2] - count :, :] for x in self._records[2 * index : 2 * index + 2])
            out.append(codec.read(codes, meta, dim, self.dtype))
        raw = min(recent, count, self._recent[0].shape[-2]) if self._recent else 0
        if raw > 0:
            for x, held in zip(out, self._recent, strict=True):
                x[..., count - raw :, :] = held[..., held.shape[-2] - raw :, :]
        if self._padding is not None:
            sinks = torch.arange(self.policy.sink, device=self.device)
            column = self._padding[:, None] + sinks - (self._length - count)
            row, sink = ((column >= 0) & (column < count)).nonzero(as_tuple=True)
            for x, held in zip(out, self._sink, strict=True):
                x[row, :, column[row, sink]] = held[row, :, sink]
        return out

    def _trim(self, after_crop: bool = False) -> None:
        """Drop what no later query reads; while past is recorded, a `crop` does it."""
        if self.record_past and not after_crop:
            return
        if self.window:
            self._records = [_last(x, self._visible) for x in self._records]
        self._recent = [_last(x, self.policy.recent) for x in self._recent]


def _last(x: Tensor, count: int) -> Tensor:
    """The last columns of [..., N, D], in memory of their own: a view would keep all the others alive."""
    first = x.shape[-2] - count
    return x[..., first:, :].clone() if first > 0 else x
