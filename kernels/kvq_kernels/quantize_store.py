"""Writing to the cache: rotate, quantize and scatter K and V in one launch; and the raw window."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.bits import encode_table, load_rotated, signs_of_hadamard, store_rows
from kvq_kernels.codebook import qjl_projection
from kvq_kernels.layout import Codec, PageLayout, RawWindow

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_SMALL = 256
"""Tokens up to which a store is bound by latency: few rows a program, many programs."""


@triton.jit(do_not_specialize=["tokens"])
def _store_kernel(
    key, value, pages, slots, tokens,
    key_table, value_table, key_projection, value_projection, key_rotation, value_rotation,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, page_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEY_NORM: tl.constexpr, VALUE_NORM: tl.constexpr,
    KEY_RESIDUAL: tl.constexpr, VALUE_RESIDUAL: tl.constexpr,
    KEY_CANDIDATES: tl.constexpr, VALUE_CANDIDATES: tl.constexpr,
    KEY_ANCHOR: tl.constexpr, VALUE_ANCHOR: tl.constexpr,
    KEY_ROTATED: tl.constexpr, VALUE_ROTATED: tl.constexpr,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, KEY_META: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, P: tl.constexpr,
    DTYPE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R tokens of one kv head a program; K and V are programs of their own."""
    head = tl.program_id(1)
    token = tl.program_id(0) * R + tl.arange(0, R)
    mask = token < tokens
    slot = tl.load(slots + token, mask=mask, other=0)
    row = slot % P
    block = pages + (slot // P) * page_stride + head * BLOCK_BYTES
    meta = (block + META_OFFSET).to(tl.pointer_type(tl.float16), bitcast=True) + row
    token = token.to(tl.int64)
    if tl.program_id(2) == 0:
        d = tl.arange(0, DKP)
        source = key + token * key_token_stride + head * key_head_stride
        if KEY_ROTATED and DKP > DK:
            x = load_rotated(source, mask, key_rotation, DK, DKP, R)
        else:
            x = tl.load(source[:, None] + d[None, :], mask=mask[:, None] & (d < DK)[None, :], other=0.0)
        store_rows(
            x, block + row * KEY_BYTES, meta, mask, key_table, key_projection,
            KEY, KEY_NORM, KEY_RESIDUAL, KEY_CANDIDATES, KEY_ANCHOR, KEY_ROTATED, DTYPE, DK, DKP, P,
        )  # fmt: skip
    else:  # other names than above, for other shapes
        e = tl.arange(0, DVP)
        source = value + token * value_token_stride + head * value_head_stride
        if VALUE_ROTATED and DVP > DV:
            y = load_rotated(source, mask, value_rotation, DV, DVP, R)
        else:
            y = tl.load(source[:, None] + e[None, :], mask=mask[:, None] & (e < DV)[None, :], other=0.0)
        store_rows(
            y, block + VALUE_OFFSET + row * VALUE_BYTES, meta + KEY_META * P, mask,
            value_table, value_projection,
            VALUE, VALUE_NORM, VALUE_RESIDUAL, VALUE_CANDIDATES, VALUE_ANCHOR, VALUE_ROTATED,
            DTYPE, DV, DVP, P,
        )  # fmt: skip


@triton.jit
def _store_raw_kernel(
    key, value, positions, rings, keep, raw_keys, raw_values,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    HEADS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, HAS_KEEP: tl.constexpr,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """One token and kv head a program."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token).to(tl.int64)
    wanted = (position < SINK) | (RECENT > 0)
    if HAS_KEEP:
        wanted = wanted & (tl.load(keep + token) != 0)
    if wanted:
        slot = position
        if RECENT > 0:
            slot = tl.where(position < SINK, position, SINK + (position - SINK) % RECENT)
        row = (tl.load(rings + token).to(tl.int64) * (SINK + RECENT) + slot) * HEADS + head
        d = tl.arange(0, DKP)
        k = tl.load(key + token * key_token_stride + head * key_head_stride + d, mask=d < DK)
        tl.store(raw_keys + row * DK + d, k, mask=d < DK)
        d = tl.arange(0, DVP)
        v = tl.load(value + token * value_token_stride + head * value_head_stride + d, mask=d < DV)
        tl.store(raw_values + row * DV + d, v, mask=d < DV)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only if its last dim is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_pages(pages: Tensor, layout: PageLayout) -> None:
    """Pages as `PageLayout` describes them; layers may be views of one tensor."""
    assert pages.dtype == torch.uint8 and pages.dim() == 3, (pages.dtype, pages.shape)
    assert pages.shape[1:] == (layout.num_kv_heads, layout.block_bytes), (pages.shape, layout.block_bytes)
    assert pages.stride(2) == 1 and pages.stride(1) == layout.block_bytes, pages.stride()
    assert pages.stride(0) % 16 == 0 and pages.data_ptr() % 16 == 0, "pages must be aligned to 16 bytes"


def _by_matrix(codec: Codec, head_dim: int) -> bool:
    """Whether vectors are rotated by the matrix: sums and differences of halves need a power of two."""
    return codec.rotated and head_dim & (head_dim - 1) != 0


def _rotation(codec: Codec, head_dim: int, x: Tensor) -> Tensor:
    """√D · H in the dtype of `x`, where it is needed."""
    if _by_matrix(codec, head_dim):
        return signs_of_hadamard(head_dim, x.dtype, x.device)
    return _table(codec, x.device)  # unused


def _projection(codec: Codec, head_dim: int, device: torch.device) -> Tensor:
    if codec.scheme == "qjl":
        return qjl_projection(head_dim, torch.float32, device)
    return _table(codec, device)  # unused


def _table(codec: Codec, device: torch.device) -> Tensor:
    return encode_table(codec.scheme, codec.encoder.candidates, device)


def store(key: Tensor, value: Tensor, pages: Tensor, slots: Tensor, layout: PageLayout) -> None:
    """See `reference.store`; one launch."""
    tokens, heads = key.shape[:2]
    assert key.shape == (tokens, layout.num_kv_heads, layout.key_dim), key.shape
    assert value.shape == (tokens, layout.num_kv_heads, layout.value_dim), value.shape
    assert slots.shape == (tokens,) and slots.dtype == torch.int64 and slots.is_contiguous()
    check_pages(pages, layout)
    if not tokens:
        return
    key, value = unit_stride(key), unit_stride(value)
    k, v = layout.key, layout.value
    qjl_dim = max(layout.key_dim * (k.scheme == "qjl"), layout.value_dim * (v.scheme == "qjl"))
    rows, warps = (2, 2) if tokens <= _SMALL else (4, 4)
    if qjl_dim:  # a [D, D] projection a row
        rows, warps = 1, max(1, triton.next_power_of_2(qjl_dim) ** 2 // 4096)
    elif any(_by_matrix(c, dim) for c, dim in ((k, layout.key_dim), (v, layout.value_dim))):
        rows, warps = 16, 4  # rotated by products of matrices
    _store_kernel[(triton.cdiv(tokens, rows), heads, 2)](
        key, value, pages, slots, tokens,
        _table(k, key.device), _table(v, key.device),
        _projection(k, layout.key_dim, key.device), _projection(v, layout.value_dim, key.device),
        _rotation(k, layout.key_dim, key), _rotation(v, layout.value_dim, value),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), pages.stride(0),
        KEY=k.scheme, VALUE=v.scheme, KEY_NORM=k.encoder.norm_mode, VALUE_NORM=v.encoder.norm_mode,
        KEY_RESIDUAL=k.encoder.residual, VALUE_RESIDUAL=v.encoder.residual,
        KEY_CANDIDATES=len(k.encoder.candidates), VALUE_CANDIDATES=len(v.encoder.candidates),
        KEY_ANCHOR=k.encoder.anchor, VALUE_ANCHOR=v.encoder.anchor,
        KEY_ROTATED=k.rotated, VALUE_ROTATED=v.rotated,
        KEY_BYTES=layout.key_code_bytes, VALUE_BYTES=layout.value_code_bytes, KEY_META=k.num_meta,
        VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset, BLOCK_BYTES=layout.block_bytes,
        DK=layout.key_dim, DKP=triton.next_power_of_2(layout.key_dim),
        DV=layout.value_dim, DVP=triton.next_power_of_2(layout.value_dim), P=layout.page_size,
        DTYPE=DTYPES[layout.dtype], R=rows, num_warps=warps,
    )  # fmt: skip


def store_raw(
    key: Tensor, value: Tensor, positions: Tensor, rings: Tensor, raw: RawWindow, keep: Tensor | None = None
) -> None:
    """See `reference.store_raw`."""
    tokens, heads, key_dim = key.shape
    value_dim = value.shape[-1]
    assert raw.keys.is_contiguous() and raw.values.is_contiguous()
    if not tokens:
        return
    key, value = unit_stride(key), unit_stride(value)
    positions, rings = positions.contiguous(), rings.contiguous()
    kept = positions if keep is None else keep.contiguous()
    _store_raw_kernel[(tokens, heads)](
        key, value, positions, rings, kept, raw.keys, raw.values,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        HEADS=heads, SINK=raw.sink, RECENT=raw.recent, HAS_KEEP=keep is not None,
        DK=key_dim, DKP=triton.next_power_of_2(key_dim),
        DV=value_dim, DVP=triton.next_power_of_2(value_dim), num_warps=1,
    )  # fmt: skip
