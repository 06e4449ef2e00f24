"""Every setting of the engine and of sampling, frozen; the only place where defaults live."""

from dataclasses import dataclass, field, replace
from operator import index
from typing import Any

from kvq_core.errors import UsageError
from kvq_core.policies import Policy, get_policy


def _check_whole(settings: Any, *names: str) -> None:
    """See that these fields, where they are not None, are integers of Python, not of numpy."""
    for name in names:
        value = getattr(settings, name)
        if value is None:
            continue
        try:
            object.__setattr__(settings, name, index(value))
        except TypeError:
            raise UsageError(f"{name} must be a whole number, got {value!r}") from None


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs.

    `policy` is a number or name of the registry, a pair `K:V`, or a `Policy`; `sink` and `recent`
    override the policy's own number of tokens kept in the model's dtype.
    `"auto"` and `None` are resolved against model and device when the engine starts, into a new object.
    """

    policy: int | str | Policy = 0
    sink: int | None = None
    recent: int | None = None
    layers: tuple[str, ...] = ()
    """Layers with codecs of their own, each `LAYERS=POLICY`: `0,1,-2,-1=8`."""
    key_bias: str = "auto"
    """auto (leave a large constant part of the keys, such as Qwen2's bias, out of the cache) | off"""
    dtype: str = "auto"
    """auto | bfloat16 | float16 | float32 | float64"""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N"""
    load_format: str = "auto"
    """auto (the checkpoint's weights) | dummy (random ones, for measuring speed without a checkpoint)"""
    tp: int = 1
    """Processes that hold a shard of the model and of the cache each; on GPUs, one each."""
    page_size: int = 64
    """Tokens a page."""
    kv_memory: int | None = None
    """Bytes for the KV cache, of each GPU where there are several; None sizes it from free memory."""
    gpu_memory_utilization: float = 0.9
    """Share of the device's memory that weights, activations and cache may use together."""
    swap_memory: int = 4 << 30
    """Bytes of host memory for the pages of preempted requests, and for the unquantized tokens that a window
    (`sink`, `recent`) adds to cached chunks."""
    max_num_seqs: int = 256
    """Requests that run at the same time."""
    max_num_batched_tokens: int | None = None
    """Tokens one step may carry; None: one for each of `max_num_seqs`, and a chunk; on a GPU four chunks, but
    no fewer than 2,048 tokens, and no more than 8,192 or one chunk."""
    prefill_chunk: int | None = None
    """Prompts are processed in chunks of this many tokens, counted from the prompt's start; far into a long
    prompt, chunks are half as long, then a quarter, and so on. None: see `chunk`."""
    prefix_caching: bool = False
    """Keep the whole chunks of prompts for prompts that begin alike; tokens are the same."""
    max_model_len: int | None = None
    """Longest prompt + answer; None: the model's own limit."""
    enforce_eager: bool = False
    """No CUDA graphs: every kernel is launched by the host. Tokens are the same."""
    compile: bool = True
    """Compile the decoder layers, on a GPU in bfloat16 and float16."""
    fidelity: float = 0.0
    """Share of decode steps that also attend to unquantized keys and values, and report the difference."""
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (self.layers,) if isinstance(self.layers, str) else self.layers or ()
        object.__setattr__(self, "layers", tuple(rules))
        counts = ("kv_memory", "max_model_len", "max_num_batched_tokens", "prefill_chunk")
        least_one = ("page_size", "max_num_seqs", "tp")
        _check_whole(self, *least_one, "sink", "recent", "swap_memory", "seed", *counts)
        for name in least_one:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("key_bias", ("auto", "off")), ("load_format", ("auto", "dummy"))):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)}")
        if self.page_size % 16:
            raise UsageError(f"page_size must be a multiple of 16, got {self.page_size}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization}")
        if not 0 <= self.fidelity <= 1:
            raise UsageError(f"fidelity must lie in [0, 1], got {self.fidelity}")
        for name in ("sink", "recent", *counts):
            value = getattr(self, name)
            if value is not None and value < (1 if name in counts else 0):
                raise UsageError(f"{name} must be positive, got {value}")
        if self.swap_memory < 0:
            raise UsageError(f"swap_memory must not be negative, got {self.swap_memory}")
        self.resolved_policy()

    def chunk(self, windowed: bool) -> int:
        """`prefill_chunk`, or what it is by itself.

        8,192 tokens; 2,048 for a model with sliding windows, whose layers hold a chunk beside the window; 256
        with prefix caching, which shares whole chunks alone.
        """
        return self.prefill_chunk or (256 if self.prefix_caching else 2048 if windowed else 8192)

    def resolved_policy(self) -> Policy:
        """The policy object, with `layers`, `sink` and `recent` of this config applied."""
        return get_policy(self.policy).with_layers(self.layers).with_window(self.sink, self.recent)

    def with_policy(self, policy: int | str | Policy) -> "EngineConfig":
        """One of several policies to compare: settings of this config hold where it quantizes anything."""
        own = get_policy(policy)
        return replace(self, policy=own, layers=self.layers if own.is_quantized else ())

    def replace(self, **changes: Any) -> "EngineConfig":
        return replace(self, **changes)


SERVING = EngineConfig(prefix_caching=True)
"""Defaults where prompts begin like earlier ones, as the turns of a conversation do."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; greedy unless `temperature` is above 0."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Tokens come with their log-probabilities, and with those of this many of the likeliest."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # its letters are no stop strings
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _check_whole(self, "max_new_tokens", "top_k", "seed", "logprobs")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise UsageError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise UsageError(f"top_k must not be negative, got {self.top_k}")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs must not be negative, got {self.logprobs}")


@dataclass(frozen=True)
class ServerConfig:
    """How the server takes requests."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    api_key: str | None = field(default=None, repr=False)
    """What clients must send as `Authorization: Bearer …`, if anything."""
    max_queue: int = 256
    """Requests that may wait while `max_num_seqs` run."""
    max_body: int = 16 << 20
    """Bytes of a request's body."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get to finish when the server is stopped."""
