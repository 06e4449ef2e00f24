"""Writing to the cache: rotate, quantize and scatter K and V in one launch; and the raw window."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_kernels.bits import multiply_rows, signs_of_hadamard, walsh, walsh_by_products, walsh_operand
from kvq_kernels.codebook import qjl_projection
from kvq_kernels.encode import (
    PARTS,
    load_operand,
    load_rows,
    projection_operand,
    projection_square,
    store_rows,
)
from kvq_kernels.layout import Codec, PageLayout, RawWindow

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_LANES = 4
"""Lanes that share a vector, where it is long enough: fewer have less to exchange, and more to do in turn."""
_FEW_LANES = {512: 16, 1024: 8}
"""Up to so many keys a store is bound by latency: they lie in more lanes and become the same bytes. With the
values, 512 in 16 lanes are a warp for every quarter of 128 multiprocessors, as are 1,024 in 8 lanes."""
_QJL_REGISTERS = 128
"""Of a thread where four warps project 64 vectors with a matrix in shared memory."""
_QJL_WIDEST = 128
"""Head dim up to which they do: a matrix of 256 takes 128 KB, which not all GPUs have."""
_QJL_LANES = 8
"""Lanes that share a vector at most where programs share its projection."""
_ZERO = tl.constexpr(-1e-30)
_PARTS = tl.constexpr(PARTS)


@triton.jit
def _load(
    slots, base, stride, first, tokens, matrix, SCHEME: tl.constexpr, ROTATED: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """R rows of `base` -> [R, DP] zero beyond D and from row `tokens` on; slots [R].

    Times √D · H already, if ROTATED and D is no power of two. Slots are asked for first, without a mask that
    they would be waited for at, and arrive while vectors are encoded.
    """
    token = first + tl.arange(0, R)
    rows = base + token.to(tl.int64) * stride
    slot = tl.load(slots + tl.minimum(token, tokens - 1))
    mask = token < tokens
    if ROTATED and DP > D:  # sums and differences of halves need a power of two
        x = multiply_rows(rows, mask, matrix, D, DP, R, 32 if D % 32 == 0 else 16)
        # NaN where an infinity met a zero
        x = tl.where((tl.arange(0, DP) < D)[None, :], x + _ZERO, 0.0)
    elif SCHEME == "none":
        d = tl.arange(0, DP)
        x = tl.load(rows[:, None] + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)
    else:
        x = load_rows(base, stride, first, tokens, D, DP, R, LANES)
    return x, slot


@triton.jit
def _store_tile(
    vectors, token_stride, slots, tokens, part, projection, rotation, base, page_stride,
    SCHEME: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, CANDIDATES: tl.constexpr,
    ANCHOR: tl.constexpr, ROTATED: tl.constexpr, HAS_E4M3: tl.constexpr, OFFSET: tl.constexpr,
    BYTES: tl.constexpr, META: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr, PRODUCTS: tl.constexpr,
    PROJECTION: tl.constexpr,
):  # fmt: skip
    """The program's R tokens of one kv head; `part` and `projection`: see `store_rows`.

    Rotated zeros are the least bit negative, as their codes have it.
    """
    first = tl.program_id(0) * R
    operand = projection
    if PROJECTION == "square":
        d = tl.arange(0, DP)
        operand = tl.load(projection + d[:, None] * DP + d[None, :])
    x, slot = _load(slots, vectors, token_stride, first, tokens, rotation, SCHEME, ROTATED, D, DP, R, LANES)
    if PROJECTION == "part":
        operand = load_operand(projection, part, D)
        tl.debug_barrier()  # or the compiler would ask for it when it is needed
    if ROTATED and DP == D and PRODUCTS and LANES >= 4:
        x = walsh_by_products(x, rotation, _ZERO, R, D, LANES)
    elif ROTATED and DP == D:
        x = walsh(x.to(tl.float32), R, D) + _ZERO
    store_rows(
        x, base, page_stride, slot, first + tl.arange(0, R) < tokens, operand, part, SCHEME, NORM,
        RESIDUAL, CANDIDATES, ANCHOR, ROTATED, HAS_E4M3, OFFSET, BYTES, META, DTYPE, D, P, PROJECTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _store_kernel(
    key, value, pages, slots, tokens, key_projection, value_projection, key_rotation, value_rotation,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, page_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEY_NORM: tl.constexpr, VALUE_NORM: tl.constexpr,
    KEY_RESIDUAL: tl.constexpr, VALUE_RESIDUAL: tl.constexpr,
    KEY_CANDIDATES: tl.constexpr, VALUE_CANDIDATES: tl.constexpr,
    KEY_ANCHOR: tl.constexpr, VALUE_ANCHOR: tl.constexpr,
    KEY_ROTATED: tl.constexpr, VALUE_ROTATED: tl.constexpr,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, KEY_META: tl.constexpr,
    VALUE_OFFSET: tl.constexpr, META_OFFSET: tl.constexpr, BLOCK_BYTES: tl.constexpr,
    DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, P: tl.constexpr,
    DTYPE: tl.constexpr, HAS_E4M3: tl.constexpr, R: tl.constexpr, KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr, PRODUCTS: tl.constexpr, KEY_PROJECTION: tl.constexpr,
    VALUE_PROJECTION: tl.constexpr,
):  # fmt: skip
    """R tokens of one kv head a program; K and V are programs of their own."""
    head = tl.program_id(1)
    base = pages + head * BLOCK_BYTES
    KEY_PARTS: tl.constexpr = _PARTS if KEY_PROJECTION == "part" else 1
    part = tl.program_id(2)
    if part < KEY_PARTS:
        _store_tile(
            key + head * key_head_stride, key_token_stride, slots, tokens, part, key_projection,
            key_rotation, base, page_stride, KEY, KEY_NORM, KEY_RESIDUAL, KEY_CANDIDATES, KEY_ANCHOR,
            KEY_ROTATED, HAS_E4M3, 0, KEY_BYTES, META_OFFSET, DTYPE, DK, DKP, P, R, KEY_LANES, PRODUCTS,
            KEY_PROJECTION,
        )  # fmt: skip
    else:
        _store_tile(
            value + head * value_head_stride, value_token_stride, slots, tokens, part - KEY_PARTS,
            value_projection, value_rotation, base, page_stride, VALUE, VALUE_NORM, VALUE_RESIDUAL,
            VALUE_CANDIDATES, VALUE_ANCHOR, VALUE_ROTATED, HAS_E4M3, VALUE_OFFSET, VALUE_BYTES,
            META_OFFSET + 2 * KEY_META * P, DTYPE, DV, DVP, P, R, VALUE_LANES, PRODUCTS, VALUE_PROJECTION,
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
    """√D · H in the dtype of `x`, or the part of it that is a product."""
    if _by_matrix(codec, head_dim):
        return signs_of_hadamard(head_dim, x.dtype, x.device)
    return walsh_operand(x.dtype, x.device) if codec.rotated else _unused(x.device)


@lru_cache(maxsize=32)
def _projection(form: str, head_dim: int, device: torch.device) -> Tensor:
    """Sᵀ of qjl. In fp16 one sign in some thousands differs, where the projection is next to zero."""
    if not form:
        return _unused(device)
    matrix = qjl_projection(head_dim, torch.float16, device).T.contiguous()
    return projection_square(matrix) if form == "square" else projection_operand(matrix)


def _projection_form(codec: Codec, head_dim: int, keys: int) -> str:
    """How a program makes qjl's projection, see `store_rows`."""
    if codec.scheme != "qjl":
        return ""
    if head_dim < 64 or _by_matrix(codec, head_dim):
        return "square"
    return "part" if _are_few(keys) or head_dim > _QJL_WIDEST else "square"


def _are_few(keys: int) -> bool:
    return keys <= max(_FEW_LANES, default=0)


@lru_cache(maxsize=8)
def _unused(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.float16, device=device)


def _lanes(head_dim: int, dtype: torch.dtype, keys: int, in_parts: bool) -> int:
    """Lanes that share a vector: 1 to 4 chunks of 16 bytes in each."""
    chunks = triton.next_power_of_2(head_dim) * dtype.itemsize // 16
    lanes = next((lanes for most, lanes in _FEW_LANES.items() if keys <= most), _LANES)
    if in_parts:
        lanes = min(lanes, _QJL_LANES)
    return max(min(lanes, chunks), chunks // 4, 1)


def _tile(layout: PageLayout, forms: tuple[str, str], keys: int, lanes: int) -> tuple[int, int]:
    """Rows and warps of a program."""
    k, v = layout.key, layout.value
    few = _are_few(keys)
    if k.scheme == v.scheme == "none":
        return (2, 1) if few else (16, 4)
    if "square" in forms:
        return (16, 4) if few else (64, 4)  # of a product with a large matrix
    if _by_matrix(k, layout.key_dim) or _by_matrix(v, layout.value_dim):
        return 16, 4
    return 32 // lanes, 1


@lru_cache(maxsize=16)
def has_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `tl.dot` uses the matrix units: not for float32 (IEEE), nor below sm_80: plain FMA there."""
    if device.type != "cuda":
        return dtype != torch.float32
    return dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)


def has_e4m3(device: torch.device) -> bool:
    """Whether the GPU converts to e4m3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


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
    keys = tokens * heads
    forms = _projection_form(k, layout.key_dim, keys), _projection_form(v, layout.value_dim, keys)
    sizes = (layout.key_dim, key.dtype), (layout.value_dim, value.dtype)
    lanes = [_lanes(*size, keys, "part" in forms) for size in sizes]
    rows, warps = _tile(layout, forms, keys, max(lanes))
    programs = sum(PARTS if form == "part" else 1 for form in forms)
    bound = "square" in forms and not _are_few(keys) and max(layout.key_dim, layout.value_dim) <= _QJL_WIDEST
    _store_kernel[(triton.cdiv(tokens, rows), heads, programs)](
        key, value, pages, slots, tokens,
        _projection(forms[0], layout.key_dim, key.device),
        _projection(forms[1], layout.value_dim, key.device),
        _rotation(k, layout.key_dim, key), _rotation(v, layout.value_dim, value),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), pages.stride(0),
        KEY=k.scheme, VALUE=v.scheme, KEY_NORM=k.encoder.norm_mode, VALUE_NORM=v.encoder.norm_mode,
        KEY_RESIDUAL=k.encoder.residual, VALUE_RESIDUAL=v.encoder.residual,
        KEY_CANDIDATES=k.encoder.candidates, VALUE_CANDIDATES=v.encoder.candidates,
        KEY_ANCHOR=k.encoder.anchor, VALUE_ANCHOR=v.encoder.anchor,
        KEY_ROTATED=k.rotated, VALUE_ROTATED=v.rotated,
        KEY_BYTES=layout.key_code_bytes, VALUE_BYTES=layout.value_code_bytes, KEY_META=k.num_meta,
        VALUE_OFFSET=layout.value_offset, META_OFFSET=layout.meta_offset, BLOCK_BYTES=layout.block_bytes,
        DK=layout.key_dim, DKP=triton.next_power_of_2(layout.key_dim),
        DV=layout.value_dim, DVP=triton.next_power_of_2(layout.value_dim), P=layout.page_size,
        DTYPE=DTYPES[layout.dtype], HAS_E4M3=has_e4m3(key.device), R=rows, KEY_LANES=lanes[0],
        VALUE_LANES=lanes[1], PRODUCTS=has_products(key.dtype, key.device), KEY_PROJECTION=forms[0],
        VALUE_PROJECTION=forms[1], num_warps=warps,
        maxnreg=_QJL_REGISTERS if bound else None,
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
