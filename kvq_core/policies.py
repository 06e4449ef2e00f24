"""Policies: a codec for keys, a codec for values, and how many tokens stay unquantized."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from kvq_core.errors import KvqError, UsageError
from kvq_core.layers import HINT, LayerRule, parse_spans

CODEC_NAMES = (
    "none", "fp8", "int8", "int4", "lm4", "lm4-fit", "lm3", "lm2", "lm2-plain", "lm2-corrected", "turbo",
    "turbo-rms", "turbo-corrected", "qjl",
)  # fmt: skip
"""Names of the codecs in `kvq_core.codecs`; listed here so that policies are checked without torch."""


@dataclass(frozen=True)
class Policy:
    """What happens to K and V.

    `key` and `value` name codecs; the first `sink` and the last `recent` tokens of a request stay in
    the model's dtype.
    """

    name: str
    key: str
    value: str
    sink: int = 0
    recent: int = 0
    number: int | None = None
    """LMDeploy's number, where it has one."""
    summary: str = ""
    layers: tuple[LayerRule, ...] = ()
    """Layers with codecs of their own; where several rules name a layer, the last one holds."""

    @property
    def is_quantized(self) -> bool:
        """Whether any layer is."""
        pairs = {(self.key, self.value), *((rule.key, rule.value) for rule in self.layers)}
        return pairs != {("none", "none")}

    @property
    def label(self) -> str:
        """Name for tables, and a spec: `turbo`, `turbo+s4r128` with unquantized tokens, `turbo@0,-1=int8`."""
        name = self.name + "".join(f"@{rule.text}" for rule in self.layers)
        return f"{name}+s{self.sink}r{self.recent}" if self.sink or self.recent else name

    def describe(self) -> dict[str, Any]:
        """The `policy` of a run record."""
        return {
            "name": self.label,
            "number": None if self.layers else self.number,
            "key": self.key,
            "value": self.value,
            "sink": self.sink,
            "recent": self.recent,
            "layers": [rule.text for rule in self.layers],
        }

    def by_layer(self, num_layers: int) -> tuple["Policy", ...]:
        """The policy of each layer of a model; `KvqError` where a rule names a layer that is not there."""
        plain = replace(self, layers=())
        chosen = [plain] * num_layers
        for rule in self.layers:
            own = replace(plain, name=rule.name, key=rule.key, value=rule.value, number=None)
            for index in rule.layers(num_layers):
                chosen[index] = own
        return tuple(chosen)

    def with_layers(self, rules: Iterable[str]) -> "Policy":
        """With more rules `LAYERS=POLICY`, as in `0,1,-2,-1=8`; an error where one is none."""
        more = []
        for text in rules:
            spans, equals, name = text.partition("=")
            if not equals:
                raise UsageError(f"layers: {text!r} has no `=POLICY`", HINT)
            other = get_policy(name)
            if other.sink or other.recent or other.layers:
                raise UsageError(
                    f"layers: `{name}` in {text!r} is more than codecs",
                    "unquantized tokens are the same for all layers: use `--sink` and `--recent`",
                )
            more.append(LayerRule(parse_spans(spans), other.name, other.key, other.value))
        return replace(self, layers=(*(rule for rule in self.layers if rule not in more), *more))

    def with_window(self, sink: int | None, recent: int | None) -> "Policy":
        """The same codecs with another number of unquantized tokens; None keeps the policy's own."""
        if not self.is_quantized:
            return replace(self, sink=0, recent=0)
        return replace(
            self,
            sink=self.sink if sink is None else sink,
            recent=self.recent if recent is None else recent,
        )


REGISTRY: tuple[Policy, ...] = (
    Policy("none", "none", "none", number=0, summary="no quantization: the model's dtype"),
    Policy("int4", "int4", "int4", number=4, summary="4-bit asymmetric, per head and token"),
    Policy("int8", "int8", "int8", number=8, summary="8-bit asymmetric, per head and token"),
    Policy("fp8", "fp8", "fp8", number=16, summary="e4m3 with a scale per head and token"),
    Policy(
        "turbo", "turbo", "lm2", number=42,
        summary="TurboQuant: Hadamard rotation; K 3-bit Lloyd-Max + residual sign, V 2-bit Lloyd-Max",
    ),
    Policy("42-window", "turbo", "lm2", sink=4, recent=128, summary="42, 4 + 128 tokens unquantized"),
    Policy("42-lm4", "lm4-fit", "lm2", summary="42 with a 4-bit Lloyd-Max codebook for K, no residual sign"),
    Policy(
        "42-corrected", "turbo-corrected", "lm2-corrected",
        summary="42 with mean residual and corrected norms, no scale search",
    ),
    Policy("42-rms", "turbo-rms", "lm2-plain", summary="42 as LMDeploy stores it: rms residual, plain norms"),
    Policy("qjl", "qjl", "lm2-plain", summary="42 with a true QJL residual (Gaussian projection)"),
    Policy("k8v4", "int8", "int4", summary="8-bit keys, which need them more, and 4-bit values"),
    Policy("k4v4", "int4", "int4", summary="int4 by another name"),
)  # fmt: skip


WINDOW = re.compile(r"(.+)\+s(\d{1,6})r(\d{1,6})")


def get_policy(spec: "int | str | Policy") -> Policy:
    """The policy for a number (0, 8, 4, 16, 42), a registered name, or a pair `K:V` of codecs.

    Any of them may go on with `@LAYERS=POLICY`, once or more, as in `42@0,1,-2,-1=8`, for layers with codecs
    of their own, and end in `+sNrM`, as labels do: the first N and the last M tokens stay unquantized.
    Raises `KvqError` with the list of known names for anything else.
    """
    if isinstance(spec, Policy):
        return spec
    text = str(spec).strip().lower()
    if window := WINDOW.fullmatch(text):
        return get_policy(window[1]).with_window(int(window[2]), int(window[3]))
    text, *rules = text.split("@")
    if rules:
        return get_policy(text).with_layers(rules)
    for policy in REGISTRY:
        if text in (policy.name, str(policy.number)):
            return policy
    key, colon, value = text.partition(":")
    if colon and key in CODEC_NAMES and value in CODEC_NAMES:
        for policy in REGISTRY:
            if policy.number is not None and (policy.key, policy.value) == (key, value):
                return policy
        return Policy(f"{key}:{value}", key, value, summary=f"K {key}, V {value}")
    if not colon and text in CODEC_NAMES:
        return Policy(text, text, text, summary=f"K and V {text}")
    if re.search(r"\+[sr]\d+$", text):
        raise KvqError(f"unknown policy {text!r}", "a window has both parts, as in `+s4r128` or `+s4r0`")
    known = ", ".join(f"{p.number} ({p.name})" if p.number is not None else p.name for p in REGISTRY)
    raise KvqError(
        f"unknown policy {text!r}",
        f"use one of {known}, or a pair K:V of the codecs {', '.join(CODEC_NAMES)}; "
        "`+s4r128` after any of them keeps the first 4 and the last 128 tokens unquantized",
    )


def parse_policies(text: str) -> list[Policy]:
    """A comma-separated list of policies, without repeats. Commas between `@` and `=` are of layers."""
    policies = [get_policy(part) for part in re.split(r",(?![^@]*=)", text) if part.strip()]
    if not policies:
        raise UsageError("no policy given", "for example `--policies 0,8,4,42`")
    return list(dict.fromkeys(policies))
