"""What Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvq_core.engine.engine import Load
from kvq_core.engine.fidelity import Fidelity

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """Counters and histograms, which grow as things happen, and gauges, set when they are read."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._running = Gauge("kvq_requests_running", "Sequences that run", registry=registry)
        self._waiting = Gauge("kvq_requests_waiting", "Sequences that wait", registry=registry)
        self._pages_used = Gauge("kvq_kv_pages_used", "Pages of the KV cache in use", registry=registry)
        self._pages_cached = Gauge(
            "kvq_kv_pages_cached",
            "Pages kept for prompts to come, free for whoever needs them",
            registry=registry,
        )
        self._pages = Gauge("kvq_kv_pages", "Pages of the KV cache", registry=registry)
        self._preemptions = Counter(
            "kvq_preemptions", "Sequences that had to give their pages back", registry=registry
        )
        self.prompt_tokens = Counter("kvq_prompt_tokens", "Tokens of prompts taken", registry=registry)
        self._generated = Counter("kvq_generated_tokens", "Tokens generated", registry=registry)
        self._ended = Counter("kvq_requests", "Sequences that ended", ["reason"], registry=registry)
        self._ttft = Histogram(
            "kvq_time_to_first_token_seconds",
            "From a prompt's arrival to its first token, queueing included",
            buckets=SECONDS,
            registry=registry,
        )
        self._itl = Histogram(
            "kvq_inter_token_latency_seconds",
            "Between two tokens of a sequence",
            buckets=SECONDS,
            registry=registry,
        )
        self._looked_up = Counter(
            "kvq_prefix_cache_prompt_tokens", "Tokens of prompts that began to run", registry=registry
        )
        self._hit = Counter(
            "kvq_prefix_cache_hit_tokens", "Those among them that the prefix cache held", registry=registry
        )
        self._seen: dict[Counter, int] = {}
        self._errors = Gauge(
            "kvq_fidelity_error",
            "Relative error of a layer's attention against unquantized keys and values, running median",
            ["layer"],
            registry=registry,
        )
        self._checked = Gauge("kvq_fidelity_steps", "Decode steps that were checked", registry=registry)
        self._jumps = Gauge("kvq_fidelity_jumps", "Errors far above a layer's median", registry=registry)

    def tokens(self, count: int, seconds: float, first: bool) -> None:
        """New tokens of a sequence, this long after its tokens before, or after its arrival."""
        self._generated.inc(count)
        (self._ttft if first else self._itl).observe(seconds)

    def ended(self, reason: str) -> None:
        """A sequence ended, for this reason."""
        self._ended.labels(reason).inc()

    def render(self, load: Load, fidelity: Fidelity | None = None) -> bytes:
        """Everything in Prometheus' text format."""
        if fidelity is not None:
            self._checked.set(fidelity.steps)
            self._jumps.set(fidelity.jumps)
            for index, layer in enumerate(fidelity.layers):
                self._errors.labels(str(index)).set(layer.median)
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._pages_used.set(load.pages_used)
        self._pages.set(load.pages)
        self._pages_cached.set(load.pages_cached)
        self._raise(self._preemptions, load.preemptions)
        self._raise(self._looked_up, load.prompt_tokens)
        self._raise(self._hit, load.cached_tokens)
        return generate_latest(self.registry)

    def _raise(self, counter: Counter, value: int) -> None:
        """Bring a counter to what the engine has counted."""
        counter.inc(value - self._seen.get(counter, 0))
        self._seen[counter] = value
