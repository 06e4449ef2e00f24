"""What the next step does; pure Python, no torch.

Decodes and prompt chunks share a step under a token budget. When pages run out, the youngest request is
preempted: its pages go to host memory and come back unchanged, or, where host memory is short, it is
computed again. Chunk boundaries depend on the prompt alone, so that load never changes a result.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from kvq_core.cache.blocks import BlockManager
from kvq_core.cache.prefix import CachedChunk, chain_key
from kvq_core.engine.request import Request, Status

SMALLEST_CHUNK = 256
MOST_PAIRS = 1 << 22
"""Queries times earlier tokens of a chunk: what bounds how long it holds up the decodes beside it."""
MOST_TOGETHER = 2048
"""Tokens of a request in one step, where that takes several chunks."""


@dataclass(frozen=True)
class SchedulerConfig:
    """What the scheduler must know of engine and cache."""

    prefill_chunk: int
    """Tokens of a chunk, see `chunk_end`."""
    token_budget: int
    """Tokens a step may carry; a whole chunk has to fit."""
    swap_memory: int
    """Bytes of host memory for preempted requests."""
    row_bytes: int
    """Bytes a request keeps beside its pages (its raw window), swapped along with them."""
    exact_recompute: bool
    """Whether outputs may be computed again as if they were a prompt: only where nothing is quantized."""
    prefix_root: bytes | None = None
    """What cached chunks depend on beside tokens; None: none is cached."""
    consecutive: bool = False
    """Whether a step may carry several chunks of a request. Each reads those before it from pages, so nothing
    may be kept beside them (a raw window), nor given up in between (by a sliding window)."""


def chunk_end(start: int, prefill_chunk: int) -> int:
    """Where a chunk that starts at `start` ends, the prompt's end apart.

    Chunks end at multiples of `prefill_chunk`; far into a prompt at those of half of it, a quarter and so on,
    so that no chunk holds up the decodes beside it by more than `MOST_PAIRS`.
    """
    size = prefill_chunk
    while size * start > MOST_PAIRS and size >= 2 * SMALLEST_CHUNK:
        size //= 2
    return (start // size + 1) * size


@dataclass(frozen=True)
class Chunk:
    """Tokens start … end - 1 of a request, processed together."""

    request: Request
    start: int
    end: int


@dataclass(frozen=True)
class Swap:
    """The pages of one request to copy, for each group, and its row."""

    request: Request
    row: int
    pages: list[list[int]]


@dataclass
class Step:
    """One step: copy `swap_out`, then `swap_in` and `raw_in`, set the `forced` input tokens, run the forward,
    and copy `raw_out`."""

    decodes: list[Request] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    context_lens: list[int] = field(default_factory=list)
    """Of each decode, this step's token included."""
    swap_out: list[Swap] = field(default_factory=list)
    swap_in: list[Swap] = field(default_factory=list)
    raw_in: list[tuple[CachedChunk, int]] = field(default_factory=list)
    """Raw windows of cached chunks to copy to rows before the forward."""
    raw_out: list[tuple[int, CachedChunk]] = field(default_factory=list)
    """Raw windows of rows to keep with cached chunks after it."""
    forced: dict[int, int] = field(default_factory=dict)
    """Row -> input token of a decode, where the host knows it; elsewhere the device holds it."""
    sampled_decodes: list[int] = field(default_factory=list)
    """Indices of the decodes whose next token is new."""
    sampled_chunks: list[int] = field(default_factory=list)
    """Indices of the chunks that end in a new token."""
    running: int = 0
    """Requests that have a part in it."""
    waiting: int = 0
    """Requests that could have one, and have none: those that were preempted, too."""

    @property
    def is_empty(self) -> bool:
        return not (self.decodes or self.chunks or self.swap_out or self.swap_in)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(c.end - c.start for c in self.chunks)

    @property
    def sampled(self) -> list[Request]:
        """The requests that get a token, decodes first."""
        return [self.decodes[i] for i in self.sampled_decodes] + [
            self.chunks[i].request for i in self.sampled_chunks
        ]

    def sort_decodes(self) -> None:
        """Longest context first: kernels begin in this order, and wait for a long one that begins last."""
        order = sorted(range(len(self.decodes)), key=self.context_lens.__getitem__, reverse=True)
        sampled = set(self.sampled_decodes)
        self.decodes = [self.decodes[i] for i in order]
        self.context_lens = [self.context_lens[i] for i in order]
        self.sampled_decodes = [place for place, i in enumerate(order) if i in sampled]

    def holds(self, request: Request) -> bool:
        """Whether the step carries anything of a request."""
        return request in self.decodes or any(c.request is request for c in self.chunks)


class Scheduler:
    """Decides what each step carries: decodes, chunks of prompts, and pages to swap."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.swapped: deque[Request] = deque()
        self.running: list[Request] = []
        """Oldest first."""
        self.preemptions = 0
        self.prompt_tokens = 0
        """Of the prompts that were admitted."""
        self.cached_tokens = 0
        """Those among them that were found in the cache."""
        self._step = 0
        self._swapped_bytes = 0
        self._swap_held: dict[int, tuple[list[tuple[int, int]], int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.swapped or self.running)

    @property
    def _host_free(self) -> int:
        """Bytes of host memory left; cached chunks keep raw windows there, and give way to requests."""
        kept = len(self.blocks.prefix) * self.config.row_bytes
        return self.config.swap_memory - self._swapped_bytes - kept

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._set_prefill(request, len(request.prompt))
        self.waiting.append(request)

    def _set_prefill(self, request: Request, tokens: int) -> None:
        """Have the first `tokens` tokens processed in chunks."""
        request.prefill_len = tokens
        request.chunk_keys = {}
        key, start, end = self.config.prefix_root, 0, 0
        while key is not None and (end := chunk_end(end, self.config.prefill_chunk)) <= tokens:
            if end % self.blocks.page_size == 0:  # else its last page is written again
                key = chain_key(key, request.tokens(start, end))
                request.chunk_keys[end] = key
                start = end

    def schedule(self) -> Step:
        """Plan the next step and advance every request in it; empty if nothing can run."""
        step = Step()
        self._step += 1
        budget = self.config.token_budget
        for request in list(self.running):
            if request.status is Status.RUNNING and not request.is_prefilling:
                budget -= self._schedule_decode(request, step)
        for request in list(self.running):
            if request.status is Status.RUNNING and request.is_prefilling:
                budget -= self._schedule_chunks(request, step, budget)
        # Whoever was preempted comes back before anybody new; in a step that preempts, nobody comes.
        if not step.swap_out:
            budget = self._swap_in(step, budget)
            if not self.swapped:
                self._admit(step, budget)
        step.sort_decodes()
        chunked = {chunk.request.id for chunk in step.chunks}
        left_out = sum(r.is_prefilling and r.id not in chunked for r in self.running)
        step.running = len(step.decodes) + len(chunked)
        step.waiting = len(self.waiting) + len(self.swapped) + left_out
        return step

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is, and free what it holds."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self.blocks.release(request.row)
        elif request.status is Status.SWAPPED:
            self.swapped.remove(request)
            self._swapped_bytes -= self._swap_held.pop(request.id)[1]
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        request.row = -1

    def _schedule_decode(self, request: Request, step: Step) -> int:
        total = len(request.prompt) + request.scheduled_outputs
        if request.scheduled_outputs >= request.max_tokens and request.computed >= total - 1:
            return 0  # its last token is in flight
        position = request.computed
        self.blocks.trim(request.row, position)
        if not self._extend(request, position + 1, step):
            return 0
        if position < request.known:
            step.forced[request.row] = request.token(position)
        request.computed += 1
        if request.computed == total:
            request.scheduled_outputs += 1
            step.sampled_decodes.append(len(step.decodes))
        step.decodes.append(request)
        step.context_lens.append(request.computed)
        return 1

    def _schedule_chunks(self, request: Request, step: Step, budget: int) -> int:
        """The next chunk of a request, and further ones that make no larger step than one chunk may.

        Returns their tokens.
        """
        begin, pairs = request.computed, 0
        while request.is_prefilling:
            start, end = request.computed, self._chunk_end(request)
            pairs += (end - start) * start
            if start > begin and (end - begin > MOST_TOGETHER or pairs > MOST_PAIRS):
                break
            size = self._schedule_chunk(request, step, budget - (start - begin))
            if not (size and self.config.consecutive):
                break
        return request.computed - begin

    def _chunk_end(self, request: Request) -> int:
        return min(chunk_end(request.computed, self.config.prefill_chunk), request.prefill_len)

    def _schedule_chunk(self, request: Request, step: Step, budget: int) -> int:
        start, end = request.computed, self._chunk_end(request)
        if end - start > budget:
            return 0
        self.blocks.trim(request.row, start)
        if not self._extend(request, end, step):
            return 0
        self._run_chunk(request, start, end, step)
        return end - start

    def _run_chunk(self, request: Request, start: int, end: int, step: Step) -> None:
        request.computed = end
        if end == len(request.prompt) + request.scheduled_outputs:
            request.scheduled_outputs += 1
            step.sampled_chunks.append(len(step.chunks))
        step.chunks.append(Chunk(request, start, end))
        self._cache_chunk(request, end, step)

    def _cache_chunk(self, request: Request, end: int, step: Step) -> None:
        """Keep the chunk that ends at `end` for other requests, if it can be and is not kept already."""
        if end not in request.chunk_keys or self.blocks.prefix.get(request.chunk_keys[end]) is not None:
            return
        self._free_host(self.config.row_bytes)
        keys = list(request.chunk_keys.values())
        before = keys[: keys.index(request.chunk_keys[end])]
        parent = self.blocks.prefix.get(before[-1]) if before else None
        if self._host_free < self.config.row_bytes or (before and parent is None):
            return
        chunk = self.blocks.keep(request.row, request.chunk_keys[end], parent, end, self._step)
        if self.config.row_bytes:
            step.raw_out.append((request.row, chunk))

    def _free_host(self, size: int) -> None:
        """Give up cached chunks for `size` bytes of host memory, if that helps."""
        kept = len(self.blocks.prefix) * self.config.row_bytes
        if size <= self._host_free + kept:
            while self._host_free < size:
                self.blocks.evict()

    def _extend(self, request: Request, tokens: int, step: Step) -> bool:
        """Pages for `tokens` tokens, at the cost of the youngest requests; False if none are to be had."""
        while not self.blocks.extend(request.row, [tokens] * len(self.blocks.groups)):
            victim = self.running[-1]
            if step.holds(victim):
                return False
            self._preempt(victim, step)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request, step: Step) -> None:
        self.preemptions += 1
        self.running.remove(request)
        held = self.blocks.held(request.row)
        size = self.config.row_bytes + sum(
            len(pages) * group.shape.page_bytes
            for (_, pages), group in zip(held, self.blocks.groups, strict=True)
        )
        if request.computed:
            self._free_host(size)
        if request.computed and size <= self._host_free:
            self._swapped_bytes += size
            self._swap_held[request.id] = ([(first, len(pages)) for first, pages in held], size)
            step.swap_out.append(Swap(request, request.row, [pages for _, pages in held]))
            request.status = Status.SWAPPED
            self.swapped.appendleft(request)
        else:
            request.computed = 0
            request.status = Status.WAITING
            self.waiting.appendleft(request)
        self.blocks.release(request.row)
        request.row = -1

    def _resume(self, request: Request) -> None:
        request.row = self.blocks.take_row()
        request.status = Status.RUNNING
        insort(self.running, request, key=lambda r: r.id)

    def _awaits_token(self, request: Request) -> bool:
        """Whether a step in flight still has to deliver a token of a preempted request."""
        return request.known < len(request.prompt) + request.scheduled_outputs

    def _swap_in(self, step: Step, budget: int) -> int:
        while self.swapped and self.blocks.has_free_row and budget > 0:
            request = self.swapped[0]
            held, size = self._swap_held[request.id]
            if self._awaits_token(request) or not self.blocks.can_restore(held, request.computed + 1):
                return budget
            self.swapped.popleft()
            del self._swap_held[request.id]
            self._swapped_bytes -= size
            self._resume(request)
            self.blocks.restore(request.row, held, request.computed)
            step.swap_in.append(
                Swap(request, request.row, [pages for _, pages in self.blocks.held(request.row)])
            )
            if not request.is_prefilling:
                budget -= self._schedule_decode(request, step)
        return budget

    def _admit(self, step: Step, budget: int) -> None:
        for request in list(self.waiting):
            if not self.blocks.has_free_row or self._awaits_token(request):
                return
            if self.config.exact_recompute and request.prefill_len < request.known:
                self._set_prefill(request, request.known)
            chunk, is_coming = self._find_prefix(request)
            if is_coming:
                continue  # it need not compute what this step computes for another request
            start = chunk.end if chunk else 0
            end = min(chunk_end(start, self.config.prefill_chunk), request.prefill_len)
            # A group without a window gives the whole prompt its pages now, so that prompts never wait for
            # each other half-way, and keeps back half as many as requests run: they want more, and some end.
            tokens = [end if group.shape.window else request.prefill_len for group in self.blocks.groups]
            reserve = (len(self.running) + 1) // 2
            if end - start > budget or not self.blocks.can_admit(tokens, reserve, chunk):
                return
            self.waiting.remove(request)
            self._resume(request)
            if chunk is not None:
                self.blocks.adopt(request.row, chunk)
                if self.config.row_bytes:
                    step.raw_in.append((chunk, request.row))
            if request.begin is None:  # what is computed again was no prompt, and found its own work
                self.prompt_tokens += request.prefill_len
                self.cached_tokens += start
                request.cached_tokens = start
            request.begin = start
            self.blocks.extend(request.row, tokens)
            request.computed = start
            budget -= self._schedule_chunks(request, step, budget)

    def _find_prefix(self, request: Request) -> tuple[CachedChunk | None, bool]:
        """The last cached chunk that a prompt can begin with, and whether this step computes the next one.

        The prompt's last token is never part of it: it has to run, for the logits.
        """
        keys = [key for end, key in request.chunk_keys.items() if end < request.prefill_len]
        found = self.blocks.prefix.find(keys)
        ready = [chunk for chunk in found if chunk.step < self._step]
        return (ready[-1] if ready else None), len(ready) < len(found)
