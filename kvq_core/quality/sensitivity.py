"""Which layers' keys and values cost most, and which codecs to give them for a budget of bytes per token.

Keys and values of one layer at a time are quantized, all else is not: errors of different layers are
independent and small, so that the KL divergences which they cause one by one nearly add up to what they
cause together; and one at a time they are not lost in the noise of the others. KL grows with the square of
an error: other codecs are predicted from their squared error on the same vectors, relative to the codec that
was measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvq_core.cache.plan import check_head_dims
from kvq_core.codecs import get_codec
from kvq_core.errors import KvqError
from kvq_core.layers import LayerRule, as_spans
from kvq_core.models import LoadedModel, ModelGeometry
from kvq_core.policies import Policy, get_policy
from kvq_core.quality.drift import Drift
from kvq_core.quality.read_back import logits
from kvq_core.quality.text import Windows

CANDIDATES = ("none", "int8", "turbo", "int4", "lm4-fit", "lm3", "lm2")
"""Codecs that a layer may get beside the policy's own."""


@dataclass(frozen=True)
class Side:
    """The keys or the values of one layer."""

    layer: int
    values: bool
    kl: float
    """Nats per predicted token that the policy's codec costs here, everything else unquantized."""
    predicted: dict[str, float]
    """Codec -> KL, by the codec's squared error relative to the policy's own."""
    sizes: dict[str, int]
    """Codec -> bytes of a token, all kv heads."""


@dataclass(frozen=True)
class Proposal:
    """Codecs for every layer, within a budget."""

    policy: Policy
    bytes_per_token: int
    budget: int
    predicted_kl: float
    """The sum of what every layer is predicted to cost."""

    @property
    def flags(self) -> str:
        """What to type."""
        base = self.policy.number if self.policy.number is not None else self.policy.name
        window = (("--sink", self.policy.sink), ("--recent", self.policy.recent))
        flags = [f"--policy {base}", *(f"--layers {rule.text}" for rule in self.policy.layers)]
        return " ".join(flags + [f"{name} {count}" for name, count in window if count])


@dataclass
class _Errors:
    """Squared errors of codecs on the keys and values of a forward."""

    codecs: tuple[str, ...]
    sums: dict[tuple[int, bool, str], float] = field(default_factory=dict)

    def note(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value [Hkv, T, D]"""
        for values, x in ((False, key), (True, value)):
            for name in self.codecs:
                error = (get_codec(name).roundtrip(x) - x).double().square().sum().item()
                self.sums[layer, values, name] = self.sums.get((layer, values, name), 0.0) + error


def sensitivity(
    model: LoadedModel,
    windows: Windows,
    policy: Policy,
    key_bias: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Side]:
    """What the keys and the values of each layer cost under `policy` (its own rules for layers left out).

    Two forwards a layer and window. Raises `KvqError` where a codec can't take the model's head dims, and
    for a policy that quantizes nothing.
    """
    geometry = model.geometry
    check_head_dims(geometry, policy)
    if not policy.is_quantized:
        raise KvqError(f"policy {policy.label} quantizes nothing", "name another one: `--policies 42`")
    codecs = tuple(dict.fromkeys((policy.key, policy.value, *_possible(geometry))))
    errors = _Errors(codecs)
    drifts = {(layer, values): Drift() for layer in range(geometry.num_layers) for values in (False, True)}
    done = 0
    for ids in windows.ids:
        ids = ids.to(model.device)
        with torch.inference_mode():
            reference = logits(model, ids, get_policy("none"), observe=errors.note)[:-1]
            for (layer, values), drift in drifts.items():
                done += 1
                if progress:
                    progress(done, len(windows.ids) * len(drifts))
                drift.add(
                    reference,
                    logits(model, ids, _only(policy, layer, values), key_bias=key_bias)[:-1],
                    ids[1:],
                )
    return [
        _side(geometry, layer, values, policy.value if values else policy.key, drift.figures().kl, errors)
        for (layer, values), drift in drifts.items()
    ]


def _possible(geometry: ModelGeometry) -> list[str]:
    """Candidates that take every head dim of the model."""
    names = []
    for name in CANDIDATES:
        try:
            check_head_dims(geometry, Policy(name, name, name))
        except KvqError:
            continue
        names.append(name)
    return names


def _only(policy: Policy, layer: int, values: bool) -> Policy:
    """`policy` for the keys or the values of one layer, nothing for all else."""
    key, value = ("none", policy.value) if values else (policy.key, "none")
    rule = LayerRule(((layer, layer),), f"{key}:{value}", key, value)
    return Policy("one layer", "none", "none", policy.sink, policy.recent, layers=(rule,))


def _side(geometry: ModelGeometry, layer: int, values: bool, own: str, kl: float, errors: _Errors) -> Side:
    shape = geometry.layers[layer]
    dim = shape.value_dim if values else shape.key_dim
    measured = errors.sums[layer, values, own] or 1.0
    return Side(
        layer,
        values,
        kl,
        {name: kl * errors.sums[layer, values, name] / measured for name in errors.codecs},
        {name: shape.num_kv_heads * get_codec(name).bytes_per_vector(dim) for name in errors.codecs},
    )


def policy_bytes(sides: Sequence[Side], policy: Policy) -> int:
    """Bytes of a token under a policy, all layers; its own rules for layers left out."""
    return sum(side.sizes[policy.value if side.values else policy.key] for side in sides)


def propose(sides: Sequence[Side], policy: Policy, budget: int) -> Proposal:
    """Codecs for each layer, of at most `budget` bytes a token together.

    Greedy: from the smallest codecs on, always the change that lowers the predicted KL most for its bytes.
    Raises `KvqError` where not even the smallest codecs fit.
    """
    names = [min(side.sizes, key=lambda name, s=side: (s.sizes[name], s.predicted[name])) for side in sides]  # type: ignore[misc]
    used = sum(side.sizes[name] for side, name in zip(sides, names, strict=True))
    if used > budget:
        raise KvqError(
            f"a budget of {budget:,} bytes per token is below the {used:,} of the smallest codecs",
            f"give at least `--budget {used}`",
        )
    while True:
        best: tuple[float, int, str] | None = None
        for index, (side, now) in enumerate(zip(sides, names, strict=True)):
            for name, size in side.sizes.items():
                more, gain = size - side.sizes[now], side.predicted[now] - side.predicted[name]
                if gain > 0 and more <= budget - used:
                    rate = gain / more if more > 0 else float("inf")
                    if best is None or rate > best[0]:
                        best = rate, index, name
        if best is None:
            break
        _, index, name = best
        used += sides[index].sizes[name] - sides[index].sizes[names[index]]
        names[index] = name
    predicted = sum(side.predicted[name] for side, name in zip(sides, names, strict=True))
    return Proposal(_as_policy(sides, policy, names), used, budget, predicted)


def _as_policy(sides: Sequence[Side], policy: Policy, names: Sequence[str]) -> Policy:
    """`policy` with a rule for each pair of codecs that is not its own."""
    pairs: dict[int, dict[bool, str]] = {}
    for side, name in zip(sides, names, strict=True):
        pairs.setdefault(side.layer, {})[side.values] = name
    members: dict[tuple[str, str], list[int]] = {}
    for layer, pair in pairs.items():
        members.setdefault((pair[False], pair[True]), []).append(layer)
    rules = []
    for (key, value), layers in sorted(members.items(), key=lambda item: item[1]):
        if (key, value) != (policy.key, policy.value):
            rules.append(LayerRule(as_spans(layers), get_policy(f"{key}:{value}").name, key, value))
    return Policy(
        policy.name, policy.key, policy.value, policy.sink, policy.recent, policy.number, policy.summary,
        tuple(rules),
    )  # fmt: skip


def describe(sides: Sequence[Side], proposal: Proposal) -> dict[str, Any]:
    """The `sensitivity` of a record: KL of each layer, and what was proposed."""
    layers = sorted({side.layer for side in sides})
    found = {(side.layer, side.values): side.kl for side in sides}
    return {
        "layers": [{"layer": i, "key_kl": found[i, False], "value_kl": found[i, True]} for i in layers],
        "flags": proposal.flags,
        "bytes_per_token": proposal.bytes_per_token,
        "budget": proposal.budget,
        "predicted_kl": proposal.predicted_kl,
    }
