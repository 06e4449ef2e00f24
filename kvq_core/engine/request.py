"""A request as the engine sees it, and what it reports of it."""

from dataclasses import dataclass, field
from enum import Enum, auto

from kvq_core.config import SamplingParams
from kvq_core.engine.logprobs import TokenLogprob


class Status(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    SWAPPED = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Request:
    """One prompt and its answer so far.

    `computed` tokens have their keys and values in the cache, counting those of steps in flight.
    Tokens below `prefill_len` are processed in prompt chunks, later ones one a step.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    """Tokens to generate at most, within the model's and the cache's limits."""
    output: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    row: int = -1
    """Row of the block tables while running."""
    computed: int = 0
    prefill_len: int = 0
    scheduled_outputs: int = 0
    """Output tokens that finished and running steps produce."""
    chunk_keys: dict[int, bytes] = field(default_factory=dict)
    """End -> key of every chunk that can be cached, in order."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache."""
    begin: int | None = None
    """The first token that is computed, after those found in the cache; None before it first ran."""

    def __post_init__(self) -> None:
        self.prefill_len = len(self.prompt)

    @property
    def known(self) -> int:
        """Tokens the host knows."""
        return len(self.prompt) + len(self.output)

    @property
    def is_prefilling(self) -> bool:
        return self.computed < self.prefill_len

    def token(self, position: int) -> int:
        """The token at a position of prompt and answer together."""
        n = len(self.prompt)
        return self.prompt[position] if position < n else self.output[position - n]

    def tokens(self, start: int, end: int) -> list[int]:
        """The tokens from `start` up to `end`, of prompt and answer together."""
        n = len(self.prompt)
        if end <= n:
            return self.prompt[start:end]
        return self.prompt[start:] + self.output[max(0, start - n) : end - n]


@dataclass(frozen=True)
class RequestOutput:
    """New tokens of one request.

    `finish_reason` is None while it runs, then "stop" (end of sequence, a stop token) or "length".
    `time` is `time.perf_counter` when the host received the tokens.
    """

    request_id: int
    token_ids: list[int]
    finished: bool
    finish_reason: str | None
    time: float
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache."""
    logprobs: list[TokenLogprob] | None = None
    """Of each new token, where the request asked for them."""
