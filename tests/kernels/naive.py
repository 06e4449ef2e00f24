"""The rule of attention over a quantized cache, spelled out one query and one head at a time in float64.

Also builds random requests whose pages are scattered, poisoned with NaN where nothing was written, and
freed behind a sliding window: what kernels and twins are tested on.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvq_core.codecs import get_codec, hadamard
from kvq_core.codecs.base import BaseCodec
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
    values = [normal(n, case.kv_heads, case.value_dim) for n in totals]
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


def read_back(codec: BaseCodec, x: Tensor, like: torch.dtype) -> Tensor:
    """x [T, H, D] as the codec stores it from dtype `like`, decoded in float64, in the model's basis."""
    if codec.name == "none":
        return x.double()
    work = x.double() if like == torch.float64 else x.float()
    codes, meta = codec.encode(hadamard(work) if codec.rotated else work)
    decoded = codec.decode(codes, meta, x.shape[-1], torch.float64)
    return hadamard(decoded) if codec.rotated else decoded


def truth(problem: Problem) -> Tensor:
    """What decode or prefill must give, in float64: [B, Hq, Dv] or [T, Hq, Dv]."""
    case = problem.case
    rows = []
    for request, total in enumerate(len(k) for k in problem.keys):
        key, value = problem.keys[request], problem.values[request]
        coded_key = read_back(problem.layout.key, key, case.dtype)
        coded_value = read_back(problem.layout.value, value, case.dtype)
        start = case.contexts[request] if case.chunks else max(total - 1, 0)
        for t in range(start, total):
            row = len(rows)
            position = torch.arange(t + 1, device=key.device)
            plain = (position < case.sink) | (position > t - case.recent)
            if case.chunks:
                plain |= position >= start
            seen = position > t - case.window if case.window else torch.ones_like(plain)
            k = torch.where(plain[:, None, None], key[: t + 1].double(), coded_key[: t + 1])
            v = torch.where(plain[:, None, None], value[: t + 1].double(), coded_value[: t + 1])
            heads = []
            for head in range(case.kv_heads * case.group):
                kv_head = head // case.group
                scores = k[:, kv_head] @ problem.query[row, head].double() * problem.scale
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                scores = scores.masked_fill(~seen, -math.inf)
                if problem.sinks is not None:
                    scores = torch.cat((scores, problem.sinks[head].double()[None]))
                weights = scores.softmax(0)[: t + 1]
                heads.append(weights @ v[:, kv_head])
            rows.append(torch.stack(heads))
        if total == 0 and not case.chunks:
            rows.append(torch.zeros(case.kv_heads * case.group, case.value_dim, device=key.device).double())
    return torch.stack(rows)


def decode(problem: Problem, paged_decode, **changes) -> Tensor:
    """Run a decode op on the problem."""
    lens = torch.tensor(problem.case.contexts, dtype=torch.int32, device=problem.case.device)
    return paged_decode(
        problem.query, problem.pages, problem.tables, lens, problem.layout, **(problem.options | changes)
    )


def prefill(problem: Problem, paged_prefill) -> Tensor:
    """Run a prefill op on the problem's chunks."""
    case = problem.case
    histories = torch.tensor(case.contexts, dtype=torch.int32, device=case.device)
    bounds = torch.tensor([0, *case.chunks], dtype=torch.int32, device=case.device).cumsum(0).int()
    fresh = [(k[n:], v[n:]) for k, v, n in zip(problem.keys, problem.values, case.contexts, strict=True)]
    return paged_prefill(
        problem.query, torch.cat([k for k, _ in fresh]), torch.cat([v for _, v in fresh]), problem.pages,
        problem.tables, bounds, histories, problem.layout, max_chunk=max(case.chunks),
        max_history=max(case.contexts), **problem.options,
    )  # fmt: skip


__all__ = ["Case", "Problem", "build", "decode", "prefill", "read_back", "replace", "truth"]
