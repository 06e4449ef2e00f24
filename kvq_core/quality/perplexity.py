"""Perplexity and drift of policies on a text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvq_core.cache.plan import check_head_dims
from kvq_core.codecs import get_codec
from kvq_core.models import LoadedModel, ModelGeometry, load_model
from kvq_core.models.load import resolve_device
from kvq_core.policies import Policy, get_policy
from kvq_core.quality.decoded import decoded_drift
from kvq_core.quality.drift import Drift, Figures
from kvq_core.quality.read_back import logits
from kvq_core.quality.text import Windows

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """Quality of one policy."""

    policy: Policy
    figures: Figures
    bits_per_element: float

    def to_dict(self) -> dict[str, Any]:
        """The figures of a run record."""
        figures = self.figures
        return {
            "ppl": figures.ppl,
            "kl": figures.kl,
            "kl_median": figures.kl_median,
            "kl_p99": figures.kl_p99,
            "top1": figures.top1,
            "bits_per_element": self.bits_per_element,
            "predicted_tokens": figures.tokens,
        }


@dataclass(frozen=True)
class Result:
    """Quality of all policies on the same windows."""

    rows: list[Row]
    """In the order of the policies; empty where not one window was finished."""
    reference_ppl: float
    """Perplexity with an unquantized cache."""
    windows: int
    """Windows that were measured."""
    seconds: float
    complete: bool
    """False: interrupted; the rows cover the windows that were finished, for all policies alike."""


def load_for_evaluation(name: str, *, dtype: str = "auto", device: str = "auto", tp: int = 1) -> LoadedModel:
    """`load_model`, but a float32 model on a CPU computes in float64, its weights the same numbers.

    Rounding decides on which side of an edge a code falls, and later layers make more of it: float32 runs
    that sum in another order (threads, BLAS, a fused attention) differ by 2 to 3% in the KL of a 3-bit
    policy. In float64 little is left of that on one machine; another one may still differ as much, because
    models take their norms in float32.
    """
    place = resolve_device(device)
    if place.type == "cpu" and dtype in ("auto", "float32"):
        dtype = "float64"
    return load_model(name, dtype=dtype, device=device, tp=tp)


def evaluate(
    model: LoadedModel,
    windows: Windows,
    policies: Sequence[Policy],
    *,
    through_engine: bool = False,
    key_bias: str = "auto",
    progress: Progress | None = None,
) -> Result:
    """Measure each policy against the unquantized cache on every window: tokens 2 … L are predicted.

    Every key and value is read back through its codec, in one forward a window, or, `through_engine`, by
    decoding token by token from the paged cache. Ctrl-C ends it early, with what was finished.
    Raises `KvqError` where a codec can't take the model's head dim.
    """
    for policy in policies:
        check_head_dims(model.geometry, policy)
    none = get_policy("none")
    totals, baseline = [Drift() for _ in policies], Drift()
    start, done, complete = time.perf_counter(), 0, True
    steps = windows.ids.shape[0] * (1 + len(policies))
    try:
        for ids in windows.ids:
            ids = ids.to(model.device)
            with torch.inference_mode():
                reference = logits(model, ids, none)[:-1]
                itself = Drift()
                itself.add(reference, reference, ids[1:])
                found = []
                for index, policy in enumerate(policies):
                    if progress:
                        progress(done * (1 + len(policies)) + 1 + index, steps)
                    if through_engine:
                        found.append(decoded_drift(model, ids, policy, reference, key_bias))
                        continue
                    if not policy.is_quantized:
                        found.append(itself)
                        continue
                    drift = Drift()
                    drift.add(reference, logits(model, ids, policy, key_bias=key_bias)[:-1], ids[1:])
                    found.append(drift)
            for total, drift in zip(totals, found, strict=True):
                total.merge(drift)
            baseline.merge(itself)
            done += 1
    except KeyboardInterrupt:
        complete = False
    rows = [
        Row(policy, total.figures(), effective_bits(model.geometry, policy, windows.context_len))
        for policy, total in zip(policies, totals, strict=True)
        if done
    ]
    reference_ppl = baseline.figures().ppl if done else 0.0
    return Result(rows, reference_ppl, done, time.perf_counter() - start, complete)


def effective_bits(geometry: ModelGeometry, policy: Policy, context_len: int) -> float:
    """Bits an element of one request of `context_len` tokens: codes, metadata, and the unquantized tokens.

    Quoted against 16 bits: unquantized elements count 2 bytes, whatever the model's dtype.
    """
    raw = (policy.sink + policy.recent) / context_len
    size = elements = 0.0
    for layer, own in zip(geometry.layers, policy.by_layer(geometry.num_layers), strict=True):
        count = layer.elements
        record = get_codec(own.key).bytes_per_vector(layer.key_dim)
        record += get_codec(own.value).bytes_per_vector(layer.value_dim)
        size += layer.num_kv_heads * record + raw * 2 * count
        elements += count
    return 8 * size / elements
