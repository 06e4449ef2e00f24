"""The rule of attention over a quantized cache, spelled out one query and one head at a time in float64.

Also builds random requests whose pages are scattered, poisoned with NaN where nothing was written, and
freed behind a sliding window: what kernels and twins are tested on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvq_core.codecs import get_codec, hadamard
from kvq_core.codecs.base import BaseCodec
from kvq_kernels.key_bias import KeyBias
from kvq_kernels.layout import PageLayout, RawWindow


@dataclass(frozen=True)
class Case:
    """One attention problem; `contexts` are cached tokens per request, `chunks` fresh ones (prefill)."""

    key: str = "none"
    value: str = "none"
    key_dim: int = 64
    value_dim: int = 64
    kv_heads: int = 2
    group: int = 2
    contexts: tuple[int, ...] = (5,)
    chunks: tuple[int, ...] = ()
    page_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    sink: int = 0
    recent: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0
    magnitude: float = 1.0
    """Of the values."""

    def __str__(self) -> str:
        lens = "_".join(map(str, self.contexts)) + (
            "+" + "_".join(map(str, self.chunks)) if self.chunks else ""
        )
        dims = str(self.key_dim) if self.key_dim == self.value_dim else f"{self.key_dim}x{self.value_dim}"
        extras = [
            f"w{self.window}" if self.window else "",
            "cap" if self.softcap else "",
            "sinks" if self.sinks else "",
            f"s{self.sink}r{self.recent}" if self.sink or self.recent else "",
            "" if self.dtype == torch.float64 else str(self.dtype).removeprefix("torch."),
        ]
        parts = [f"{self.key}.{self.value}", f"D{dims}", f"H{self.kv_heads}x{self.group}", f"L{lens}"]
        return "-".join(parts + [extra for extra in extras if extra])

    def with_chunks(self, chunks: tuple[int, ...]) -> "Case":
        """The same case as a prefill of `chunks` after the contexts."""
        return replace(self, chunks=chunks)


@dataclass
class Problem:
    """Tensors of a case. `keys` and `values` hold each request's whole sequence, chunk included."""

    case: Case
    layout: PageLayout
    scale: float
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    pages: Tensor
    tables: Tensor
    sinks: Tensor | None
    raw: RawWindow | None
    rings: Tensor | None
    slots: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def options(self) -> dict:
        """Keyword arguments that decode and prefill share."""
        case = self.case
        return {
            "scale": self.scale, "window": case.window, "softcap": case.softcap, "sinks": self.sinks,
            "raw": self.raw, "rings": self.rings,
        }  # fmt: skip


def key_bias(problem: Problem, length: int = 2048) -> KeyBias:
    """A bias with spikes; half of the elements turn, in a precision that suits the case."""
    case = problem.case
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(case.kv_heads, case.key_dim, generator=generator, dtype=torch.float64)
    bias[:, 3] = 20
    pairs = case.key_dim // 4
    angle = torch.arange(length, dtype=torch.float64)[:, None] * 0.7 ** torch.arange(pairs)
    table = torch.cat((angle.cos(), angle.sin(), torch.ones(length, case.key_dim - 2 * pairs)), -1)
    return KeyBias(bias.to(case.device, dtype), table.to(case.device, dtype), pairs)


def build(case: Case, store, store_raw) -> Problem:
    """Random tensors of `case`, written into pages by the given ops."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.device, case.dtype)

    layout = PageLayout(
        get_codec(case.key), get_codec(case.value), case.page_size, case.kv_heads, case.key_dim,
        case.value_dim, case.dtype,
    )  # fmt: skip
    size = case.page_size
    chunks = case.chunks or (0,) * len(case.contexts)
    totals = [a + b for a, b in zip(case.contexts, chunks, strict=True)]
    offset = torch.linspace(-1, 1, case.key_dim, dtype=torch.float64).to(case.device, case.dtype)
    keys = [normal(n, case.kv_heads, case.key_dim) + offset for n in totals]
    values = [normal(n, case.kv_heads, case.value_dim) * case.magnitude for n in totals]
    queries = sum(chunks) if case.chunks else len(totals)
    query = normal(queries, case.kv_heads * case.group, case.key_dim)

    needed = [-(-n // size) for n in totals]
    order = torch.randperm(sum(needed) + 3, generator=generator) + 1  # a few pages nobody owns
    pages = layout.empty_pages(len(order) + 1, case.device).fill_(0xFF)
    tables = torch.zeros(len(totals), max(needed, default=0) + 2, dtype=torch.int32)
    slots = []
    start = 0
    for row, (count, total) in enumerate(zip(needed, totals, strict=True)):
        tables[row, :count] = order[start : start + count]
        position = torch.arange(total)
        slots.append(tables[row].long()[position // size] * size + position % size)
        start += count
    history = [s[:n].to(case.device) for s, n in zip(slots, case.contexts, strict=True)]
    past = [(k[:n], v[:n]) for k, v, n in zip(keys, values, case.contexts, strict=True)]
    store(torch.cat([k for k, _ in past]), torch.cat([v for _, v in past]), pages, torch.cat(history), layout)
    if case.window:  # pages wholly behind the window of the first query that comes next are freed
        for row, context in enumerate(case.contexts):
            first = context - case.window + (1 if case.chunks else 0)
            tables[row, : max(first, 0) // size] = 0

    raw = rings = None
    if case.sink or case.recent:
        shape = (len(totals) + 2, case.sink + case.recent, case.kv_heads)
        raw = RawWindow(
            case.sink, case.recent,
            torch.full((*shape, case.key_dim), math.nan, dtype=case.dtype, device=case.device),
            torch.full((*shape, case.value_dim), math.nan, dtype=case.dtype, device=case.device),
        )  # fmt: skip
        rings = (torch.randperm(len(totals), generator=generator) + 1).int().to(case.device)
        for ring, (k, v) in zip(rings, past, strict=True):
            position = torch.arange(len(k), device=case.device)
            keep = (position < case.sink) | (position >= len(k) - case.recent)
            store_raw(k, v, position, ring.expand(len(k)), raw, keep)
    sinks = normal(case.kv_heads * case.group) if case.sinks else None
    return Problem(
        case, layout, case.key_dim**-0.5, query, keys, values, pages, tables.to(case.device), sinks, raw,
        rings, torch.cat(slots).to(case.device),
    )  # fmt: skip


def read_back(problem: Problem, request: int) -> tuple[Tensor, Tensor]:
    """The bytes of a request's tokens, decoded in float64, in the stored basis: K and V [T, Hkv, D]."""
    layout = problem.layout
    before = sum(len(k) for k in problem.keys[:request])
    slots = problem.slots[before : before + len(problem.keys[request])]
    page, row = slots // layout.page_size, slots % layout.page_size
    blocks = problem.pages[page]
    meta = blocks[..., layout.meta_offset :].contiguous().view(torch.float16)
    meta = meta.view(len(slots), layout.num_kv_heads, layout.num_meta, layout.page_size)
    meta = meta[torch.arange(len(slots), device=row.device), ..., row]

    def part(codec: BaseCodec, start: int, width: int, meta: Tensor, head_dim: int) -> Tensor:
        offset = start + row[:, None] * width + torch.arange(width, device=row.device)
        codes = blocks.gather(2, offset[:, None].expand(-1, layout.num_kv_heads, -1))
        if codec.name == "none":
            return codec.decode(codes, meta, head_dim, layout.dtype).double()
        return codec.decode(codes, meta, head_dim, torch.float64)

    count = layout.key.num_meta
    return (
        part(layout.key, 0, layout.key_code_bytes, meta[..., :count], layout.key_dim),
        part(layout.value, layout.value_offset, layout.value_code_bytes, meta[..., count:], layout.value_dim),
    )


def truth(problem: Problem) -> Tensor:
    """What decode or prefill must give from the bytes in the pages, float64 [B, Hq, Dv] or [T, Hq, Dv]."""

    def in_model_basis(codec: BaseCodec, x: Tensor) -> Tensor:
        return hadamard(x) if codec.rotated else x

    def attend(q: Tensor, key: Tensor, value: Tensor, coded_key: Tensor, coded_value: Tensor, plain: Tensor):
        k = torch.where(plain[:, None, None], key, in_model_basis(problem.layout.key, coded_key))
        v = torch.where(plain[:, None, None], value, in_model_basis(problem.layout.value, coded_value))
        weights = _weights(problem, (q @ k.permute(1, 2, 0)), torch.float64)
        return weights @ v.transpose(0, 1)

    return _each_query(problem, torch.float64, attend)


def same_dtype_torch(problem: Problem) -> Tensor:
    """What plain torch makes of it in the model's dtype, everything rounded to that, in the stored basis."""
    dtype = problem.case.dtype

    def rotate(codec: BaseCodec, x: Tensor) -> Tensor:
        return hadamard(x) if codec.rotated else x

    def attend(q: Tensor, key: Tensor, value: Tensor, coded_key: Tensor, coded_value: Tensor, plain: Tensor):
        coded_key, coded_value = coded_key.nan_to_num().to(dtype), coded_value.nan_to_num().to(dtype)
        scores = torch.where(
            plain,
            q @ key.to(dtype).permute(1, 2, 0),
            rotate(problem.layout.key, q) @ coded_key.permute(1, 2, 0),
        )
        weights = _weights(problem, scores, dtype)
        out = (weights * ~plain) @ coded_value.transpose(0, 1)
        return rotate(problem.layout.value, out) + (weights * plain) @ value.to(dtype).transpose(0, 1)

    return _each_query(problem, dtype, attend)


def _weights(problem: Problem, scores: Tensor, dtype: torch.dtype) -> Tensor:
    """scores [Hkv, G, S], unscaled -> weights [Hkv, G, S]."""
    scores = scores * problem.scale
    if problem.case.softcap:
        scores = problem.case.softcap * torch.tanh(scores / problem.case.softcap)
    if problem.sinks is not None:
        sinks = problem.sinks.to(dtype).view(problem.case.kv_heads, -1, 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.to(torch.float64 if dtype == torch.float64 else torch.float32).softmax(-1)
    return weights.to(dtype)[..., :-1] if problem.sinks is not None else weights.to(dtype)


def _each_query(problem: Problem, dtype: torch.dtype, attend: Callable[..., Tensor]) -> Tensor:
    """`attend` for every query over the tokens that it sees, by the rule; `plain` ones unquantized."""
    case = problem.case
    rows: list[Tensor] = []
    for request, total in enumerate(len(k) for k in problem.keys):
        sources = [
            problem.keys[request].double(),
            problem.values[request].double(),
            *read_back(problem, request),
        ]
        start = case.contexts[request] if case.chunks else max(total - 1, 0)
        for t in range(start, total):
            position = torch.arange(t + 1, device=problem.query.device)
            plain = (position < case.sink) | (position > t - case.recent)
            if case.chunks:
                plain |= position >= start
            seen = position > t - case.window if case.window else torch.ones_like(plain)
            q = problem.query[len(rows)].to(dtype).unflatten(0, (case.kv_heads, -1))
            out = attend(q, *(x[: t + 1][seen] for x in sources), plain[seen])
            rows.append(out.flatten(0, 1))
        if total == 0 and not case.chunks:
            rows.append(problem.query.new_zeros(problem.query.shape[1], case.value_dim, dtype=dtype))
    return torch.stack(rows)


def check(result: Tensor, problem: Problem) -> None:
    """The error is at most twice that of torch in the same dtype; no single element is far off.

    Errors are root mean squares over the result (a maximum over few numbers is a matter of luck), floored by
    what rounding the result costs.
    """
    expected = truth(problem)
    assert result.shape == expected.shape and result.dtype == problem.case.dtype
    assert result.isfinite().all(), "NaN or infinity"
    error = (result.double() - expected).abs()
    allowed = (same_dtype_torch(problem).double() - expected).abs()
    rounding = torch.finfo(result.dtype).eps / 4 * expected.square().mean().sqrt()
    ours, torchs = error.square().mean().sqrt(), torch.maximum(allowed.square().mean().sqrt(), rounding)
    assert ours <= 2 * torchs, f"error {ours:.3g}, torch has {torchs:.3g}"
    worst = torch.maximum(allowed.max(), torch.finfo(result.dtype).eps / 2 * expected.abs().max())
    assert error.max() <= 4 * worst, f"one element is off by {error.max():.3g}, torch's worst by {worst:.3g}"


def decode(problem: Problem, paged_decode, **changes) -> Tensor:
    """Run a decode op on the problem."""
    lens = torch.tensor(problem.case.contexts, dtype=torch.int32, device=problem.case.device)
    return paged_decode(
        problem.query, problem.pages, problem.tables, lens, problem.layout, **(problem.options | changes)
    )


def prefill(problem: Problem, paged_prefill, **changes) -> Tensor:
    """Run a prefill op on the problem's chunks."""
    case = problem.case
    histories = torch.tensor(case.contexts, dtype=torch.int32, device=case.device)
    bounds = torch.tensor([0, *case.chunks], dtype=torch.int32, device=case.device).cumsum(0).int()
    fresh = [(k[n:], v[n:]) for k, v, n in zip(problem.keys, problem.values, case.contexts, strict=True)]
    return paged_prefill(
        problem.query, torch.cat([k for k, _ in fresh]), torch.cat([v for _, v in fresh]), problem.pages,
        problem.tables, bounds, histories, problem.layout, max_chunk=max(case.chunks),
        max_history=max(case.contexts), **(problem.options | changes),
    )  # fmt: skip
