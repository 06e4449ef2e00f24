"""Kernels on a GPU, bf16 included: every pair of what cases are made of, graphs, and sizes that only a GPU is
fast enough for. Cases that differ in more than their group are compiled anew: all products would take hours.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kvq_core.codecs import get_codec
from kvq_core.policies import CODEC_NAMES
from kvq_kernels import dispatch, hadamard, paged_decode, reference, warp_decode
from kvq_kernels.layout import PageLayout, RawWindow
from tests.kernels.naive import Case, build, check, decode, prefill
from tests.kernels.pairwise import pairwise

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu

CODECS = (
    "none:none", "int8:int8", "int4:int4", "fp8:fp8", "turbo:lm2", "lm4:lm2", "lm4:lm4", "lm3:lm3",
    "int8:int4", "turbo-rms:lm2-plain", "qjl:qjl",
)  # fmt: skip
CONTEXTS = (1, 63, 64, 65, 1000, 0, 500)
FEATURES = {
    "plain": {},
    "window": {"window": 50},
    "recent": {"sink": 4, "recent": 20},
    "all": {"window": 200, "softcap": 3.0, "sinks": True, "sink": 4, "recent": 20},
}
WIDE = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def name(axes: dict) -> str:
    return "-".join(map(str, axes.values()))


def poison(device: str = "cuda") -> None:
    """Fill the allocator's free blocks with NaN, so that `torch.empty` hands out NaN."""
    for elements in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
        blocks = [torch.full((elements,), float("nan"), device=device) for _ in range(8)]
        del blocks


def case_of(codecs: str, head_dim: int, group: int, feature: str, dtype: torch.dtype, **more: object) -> Case:
    key, value = codecs.split(":")
    options = FEATURES[feature] | more
    return Case(
        key, value, key_dim=head_dim, value_dim=head_dim, group=group, dtype=dtype, page_size=64,
        device="cuda", **options,  # type: ignore[arg-type]
    )  # fmt: skip


def run(case: Case, splits: int | None = None) -> None:
    poison()
    problem = build(case, dispatch.store, dispatch.store_raw)
    if case.chunks:
        check(prefill(problem, dispatch.paged_prefill), problem)
    else:
        check(decode(problem, paged_decode.paged_decode, splits=splits), problem)


AXES = {"codecs": CODECS, "head_dim": (64, 128, 256), "feature": tuple(FEATURES)}


@pytest.mark.parametrize("axes", pairwise(AXES | {"group": range(1, 9)}), ids=name)
def test_decode(axes: dict) -> None:
    run(case_of(**axes, dtype=WIDE, contexts=CONTEXTS))


@pytest.mark.parametrize("axes", pairwise(AXES | {"group": (1, 3, 8)}, seed=1), ids=name)
def test_prefill(axes: dict) -> None:
    run(case_of(**axes, dtype=WIDE, contexts=CONTEXTS, chunks=(1, 30, 64, 100, 17, 40, 3)))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("codecs", ["turbo:lm2", "int8:int8"])
def test_prefill_in_parts(codecs: str, feature: str) -> None:
    """A long history, read by several programs for the same queries."""
    run(case_of(codecs, 128, 8, feature, WIDE, contexts=(5000, 700, 0), chunks=(33, 2, 20)))


@pytest.mark.parametrize("feature", FEATURES)
def test_prefill_in_a_graph_follows_the_chunks(feature: str) -> None:
    """Captured with room for more chunks and longer ones than there are; tokens of no chunk stay alone."""
    case = case_of("turbo:lm2", 128, 8, feature, WIDE, contexts=(200, 900), chunks=(40, 25))
    problem = build(case, dispatch.store, dispatch.store_raw)
    tokens, room = 100, 6
    query = torch.full((tokens, *problem.query.shape[1:]), torch.nan, dtype=WIDE, device="cuda")
    fresh = [(k[n:], v[n:]) for k, v, n in zip(problem.keys, problem.values, case.contexts, strict=True)]
    key, value = (torch.cat([pair[i] for pair in fresh]) for i in range(2))
    key, value = (F.pad(x, (0, 0, 0, 0, 3, tokens - 3 - len(x))) for x in (key, value))
    query[3:68] = problem.query
    bounds = torch.tensor([3, 43] + [68] * (room - 1), dtype=torch.int32, device="cuda")
    histories = torch.zeros(room, dtype=torch.int32, device="cuda")
    tables = F.pad(problem.tables, (0, 0, 0, room - 2))
    options = problem.options
    if options["rings"] is not None:
        options["rings"] = F.pad(options["rings"], (0, room - 2))
    out = torch.full_like(query, 7.0)

    def step() -> None:
        dispatch.paged_prefill(
            query, key, value, problem.pages, tables, bounds, histories, problem.layout,
            max_chunk=tokens, max_history=5000, out=out, **options,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    histories[:2] = torch.tensor(case.contexts)
    poison()
    graph.replay()
    torch.cuda.synchronize()
    check(out[3:68], problem)
    assert (out[:3] == 7).all() and (out[68:] == 7).all()


OTHER = {"codecs": CODECS, "head_dim": (64, 128, 256), "dtype": (torch.float16, torch.float32)}


@pytest.mark.parametrize("axes", pairwise(OTHER), ids=name)
def test_other_dtypes(axes: dict) -> None:
    run(case_of(**axes, group=4, feature="all", contexts=CONTEXTS))
    run(case_of(**axes, group=4, feature="plain", contexts=(130, 0, 5), chunks=(20, 70, 1)))


@pytest.mark.parametrize("head_dim", [80, 96, 192])
@pytest.mark.parametrize("codecs", ["none:none", "int8:int4", "fp8:int8", "turbo:lm2", "lm4:lm3", "qjl:qjl"])
def test_padded_head_dims(codecs: str, head_dim: int) -> None:
    run(case_of(codecs, head_dim, 4, "all", WIDE, contexts=CONTEXTS))
    run(case_of(codecs, head_dim, 4, "all", WIDE, contexts=(130, 0, 5), chunks=(20, 70, 1)))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("codecs", ["fp8:fp8", "int8:fp8", "fp8:lm2"])
def test_fp8_without_the_conversion(codecs: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs before sm_89 unpack it."""
    monkeypatch.setattr(warp_decode, "has_e4m3", lambda device: False)
    run(case_of(codecs, head_dim, 8, "all", WIDE, contexts=CONTEXTS))


@pytest.mark.parametrize("codecs", ["none:none", "turbo:lm2"])
@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_split_counts(codecs: str, splits: int) -> None:
    run(case_of(codecs, 128, 8, "all", WIDE, contexts=CONTEXTS), splits)


@pytest.mark.parametrize(
    ("codecs", "head_dim", "group", "feature"),
    [
        ("turbo:lm2", 128, 8, {}),
        ("turbo:lm2", 64, 7, {"sinks": True, "softcap": 3.0}),
        ("lm4:lm2", 128, 5, {"sinks": True}),
        ("int4:int4", 128, 3, {"window": 200}),
        ("int4:int4", 64, 1, {"sinks": True}),
        ("fp8:int8", 128, 8, {"window": 1000, "softcap": 3.0}),
        ("none:none", 128, 8, {"sinks": True}),
        ("none:none", 64, 2, {}),
    ],
    ids=str,
)
def test_warps_merge(codecs: str, head_dim: int, group: int, feature: dict) -> None:
    """As often as it runs, alone and in graphs, with as many parts as each context makes: the same bytes."""
    contexts = (1, 0, 129, 2500, 64, 700, 1000)
    case = case_of(codecs, head_dim, group, "plain", WIDE, contexts=contexts, **feature)
    problem = build(case, dispatch.store, dispatch.store_raw)
    for splits in (1, 2, 4, 5, 16, 17):

        def step(out: torch.Tensor | None = None, splits: int = splits) -> torch.Tensor:
            return decode(problem, paged_decode.paged_decode, splits=splits, out=out)

        poison()
        first = step()
        check(first, problem)
        for _ in range(3):
            poison()
            assert torch.equal(step(), first)
        kept = step(torch.full_like(first, 7.0))
        assert (kept[1] == 7).all() and torch.equal(kept[2:], first[2:])
        lens = torch.tensor(case.contexts, dtype=torch.int32, device="cuda")
        arguments = problem.query, problem.pages, problem.tables, lens, problem.layout
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                graphed = paged_decode.paged_decode(*arguments, splits=splits, **problem.options)
        for _ in range(3):
            graphed.fill_(torch.nan)
            graph.replay()
            assert torch.equal(graphed, first)
        lens.copy_(lens.flip(0))
        graph.replay()
        lens.copy_(lens.flip(0))
        graph.replay()
        assert torch.equal(graphed, first)


@pytest.mark.parametrize("requests", [3, 300])
def test_many_programs_merge(requests: int) -> None:
    """More programs than run at a time, many times."""
    layout = PageLayout(get_codec("turbo"), get_codec("lm2"), 64, 4, 128, 128, WIDE)
    key, query = (torch.randn(n, heads, 128, device="cuda", dtype=WIDE) for n, heads in ((6400, 4), (1, 32)))
    pages = layout.empty_pages(101, "cuda")
    dispatch.store(key, key, pages, torch.arange(64, 6464, device="cuda"), layout)
    tables = torch.arange(1, 101, dtype=torch.int32, device="cuda").expand(requests, -1).contiguous()
    lens = torch.full((requests,), 6400, dtype=torch.int32, device="cuda")
    for splits in (2, 4, 7, 16):
        for _ in range(20):
            poison()
            out = paged_decode.paged_decode(
                query.expand(requests, -1, -1).contiguous(), pages, tables, lens, layout, scale=0.1,
                splits=splits,
            )  # fmt: skip
            assert (out == out[:1]).all() and out.isfinite().all()


def test_float64_knows_no_more_of_contexts_than_a_graph() -> None:
    """The torch twin: it reads as many pages as tables have."""
    case = case_of("turbo:lm2", 64, 4, "plain", torch.float64, contexts=CONTEXTS)
    problem = build(case, dispatch.store, dispatch.store_raw)
    bounded, known = (decode(problem, dispatch.paged_decode, max_context=n) for n in (1 << 30, 1000))
    torch.testing.assert_close(bounded, known)


STORES = {
    "codec": CODEC_NAMES, "head_dim": (64, 96, 128, 256), "tokens": (7, 600),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
}  # fmt: skip


@pytest.mark.parametrize("axes", pairwise(STORES), ids=name)
def test_store(axes: dict) -> None:
    """The twin's bytes on the CPU; codes at a threshold may fall to the neighbour, and of two scales that are
    as good as each other either may be taken."""
    codec, head_dim, tokens, dtype = (get_codec(axes["codec"]), *list(axes.values())[1:])
    layout = PageLayout(codec, codec, 64, 2, head_dim, head_dim, dtype)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(tokens, 4 * head_dim, generator=generator).to(dtype)
    packed[3] = 0
    slots = torch.randperm(64 * 20, generator=generator)[:tokens] + 64
    results, errors = [], []
    for device in ("cpu", "cuda"):
        key, value = (x.unflatten(1, (2, -1)) for x in packed.to(device).split(2 * head_dim, 1))
        pages = layout.empty_pages(21, device).fill_(0xAB)
        dispatch.store(key, value, pages, slots.to(device), layout)
        results.append(pages.cpu())
        errors.append(squared_errors(packed.double(), results[-1], slots, layout))
    different = (results[0] != results[1]).sum().item()
    of_a_vector = layout.bytes_per_token_head // 2
    limit = max(tokens * layout.bytes_per_token_head // 100, of_a_vector) if codec.rotated else 0
    assert different <= limit, different
    # one sign of qjl, where the projection is next to zero, moves the squared error by some 10% at 96 dims
    torch.testing.assert_close(errors[0], errors[1], rtol=0.5 if codec.name == "qjl" else 0.02, atol=1e-6)


def squared_errors(
    packed: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout
) -> torch.Tensor:
    """Of each vector [tokens, K and V, heads], in the basis that its codes are in."""
    ids = torch.arange(1, len(pages))[None]
    valid = torch.zeros(1, (len(pages) - 1) * 64, dtype=torch.bool)
    valid[0, slots - 64] = True
    decoded = reference._gather(pages, ids, valid, layout, torch.float64)
    stored = torch.stack([x.transpose(2, 3).flatten(1, 2)[0, slots - 64] for x in decoded], 1)
    given = packed.unflatten(1, (2, 2, -1))
    if layout.key.rotated:
        given = given @ hadamard.hadamard_matrix(layout.key_dim, torch.float64, given.device)
    return (stored - given).square().sum(-1)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_codes_do_not_depend_on_the_launch(codec: str, head_dim: int) -> None:
    """A token's bytes are the same whether it is written among few or among many."""
    layout = PageLayout(get_codec(codec), get_codec(codec), 64, 2, head_dim, head_dim, WIDE)
    torch.manual_seed(0)
    x = torch.randn(600, 2, head_dim, device="cuda", dtype=WIDE)
    slots = torch.randperm(64 * 20, device="cuda")[:600] + 64
    together = layout.empty_pages(21, "cuda")
    dispatch.store(x, -x, together, slots, layout)
    for count in (50, 300):
        apart = layout.empty_pages(21, "cuda")
        for start in range(0, 600, count):
            some = slice(start, start + count)
            dispatch.store(x[some], -x[some], apart, slots[some], layout)
        different = (together != apart).nonzero().tolist()  # page, head, byte
        assert not different, (count, len(different), different[:8])


def test_decode_in_a_graph_follows_the_context() -> None:
    """A captured launch reads lengths and tables on the device: replayed with others it follows them."""
    case = case_of("turbo:lm2", 128, 8, "all", WIDE, contexts=(1000, 700, 64))
    problem = build(case, dispatch.store, dispatch.store_raw)
    lens = torch.tensor(case.contexts, dtype=torch.int32, device="cuda")

    def step() -> torch.Tensor:
        return dispatch.paged_decode(
            problem.query, problem.pages, problem.tables, lens, problem.layout, max_context=1024,
            **problem.options,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    torch.cuda.synchronize()
    check(out, problem)
    lens.copy_(torch.tensor([1000, 0, 64], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[1], torch.zeros_like(out[1])), "a padding row gives zeros"
    assert out[[0, 2]].isfinite().all()
    kept = torch.full_like(out, 7.0)
    dispatch.paged_decode(
        problem.query, problem.pages, problem.tables, lens, problem.layout, max_context=1024, out=kept,
        **problem.options,
    )  # fmt: skip
    assert torch.equal(kept[[0, 2]], out[[0, 2]])
    assert (kept[1] == 7).all(), "a row of `out` without context stays as it was"


def test_results_repeat_to_the_bit() -> None:
    case = case_of("turbo:lm2", 128, 8, "plain", WIDE, contexts=(3000, 17))
    problem = build(case, dispatch.store, dispatch.store_raw)
    assert torch.equal(decode(problem, dispatch.paged_decode), decode(problem, dispatch.paged_decode))


@pytest.mark.parametrize(("sink", "recent"), list(itertools.product([0, 3], [0, 5]))[1:])
def test_store_raw(sink: int, recent: int) -> None:
    windows = []
    key, value = torch.randn(13, 2, 64), torch.randn(13, 2, 96)
    position = torch.arange(13)
    keep = (position < sink) | (position >= 13 - recent)
    for device in ("cpu", "cuda"):
        shape = (3, sink + recent, 2)
        raw = RawWindow(
            sink, recent, torch.zeros(*shape, 64, device=device), torch.zeros(*shape, 96, device=device)
        )
        ring = torch.ones(13, dtype=torch.int32, device=device)
        tensors = (x.to(device) for x in (key, value, position))
        dispatch.store_raw(*tensors, ring, raw, keep.to(device))
        windows.append(raw)
    assert torch.equal(windows[0].keys, windows[1].keys.cpu())
    assert torch.equal(windows[0].values, windows[1].values.cpu())


def test_pages_beyond_four_gigabytes() -> None:
    """Offsets are 64-bit: the last page of a large cache reads and writes like the first."""
    layout = PageLayout(get_codec("int8"), get_codec("int8"), 64, 8, 128, 128, WIDE)
    count = (5 << 30) // layout.page_bytes
    if torch.cuda.mem_get_info()[0] < (7 << 30):
        pytest.skip("needs 7 GB of free GPU memory")
    pages = layout.empty_pages(count, "cuda")
    key = torch.randn(64, 8, 128, device="cuda", dtype=WIDE)
    query = torch.randn(2, 32, 128, device="cuda", dtype=WIDE)
    for page in (1, count - 1):
        dispatch.store(key, key, pages, torch.arange(64, device="cuda") + page * 64, layout)
    tables = torch.tensor([[1], [count - 1]], dtype=torch.int32, device="cuda")
    lens = torch.tensor([64, 64], dtype=torch.int32, device="cuda")
    query[1] = query[0]
    out = dispatch.paged_decode(query, pages, tables, lens, layout, scale=0.1)
    assert torch.equal(out[0], out[1]) and out.abs().sum() > 0


def test_twin_on_the_gpu_agrees() -> None:
    """float64 goes to the twin on any device."""
    case = Case("turbo", "lm2", contexts=(70, 3), device="cuda", sinks=True, sink=1, recent=2)
    problem = build(case, dispatch.store, dispatch.store_raw)
    check(decode(problem, dispatch.paged_decode), problem)
    assert torch.equal(decode(problem, dispatch.paged_decode), decode(problem, reference.paged_decode))


@pytest.mark.parametrize("size", [64, 128, 256])
def test_hadamard(size: int) -> None:
    x = torch.randn(1000, size, device="cuda")
    expected = x.double() @ hadamard.hadamard_matrix(size, torch.float64, x.device)
    torch.testing.assert_close(hadamard.hadamard(x).double(), expected, rtol=0, atol=5e-6)
    assert hadamard.hadamard_backend("cuda") in ("built-in", "fast_hadamard_transform")
