"""Which layers of a model a policy treats differently: `0,1,-2,-1=8`, `4-9=int8:lm3`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from kvq_core.errors import KvqError, UsageError

HINT = "for example `0,1,-2,-1=8`, for the first two and the last two layers; `0-3=int8:lm4` is a range"
_SPAN = re.compile(r"(-?\d{1,4})(?:-(-?\d{1,4}))?")


@dataclass(frozen=True)
class LayerRule:
    """Layers, and the codecs that they get in place of the policy's own."""

    spans: tuple[tuple[int, int], ...]
    """First and last layer of each range, counted from the end where negative."""
    name: str
    """The policy, as tables show it."""
    key: str
    value: str

    @property
    def text(self) -> str:
        """As a user types it."""
        spans = (str(a) if a == b else f"{a}-{b}" for a, b in self.spans)
        return f"{','.join(spans)}={self.name}"

    def layers(self, num_layers: int) -> set[int]:
        """Indices of the layers of a model; `KvqError` where it has not that many."""
        chosen: set[int] = set()
        for span in self.spans:
            for index in span:
                if not -num_layers <= index < num_layers:
                    raise KvqError(
                        f"`{self.text}` names layer {index}, and the model has {num_layers}",
                        f"layers count from 0 to {num_layers - 1}, or from -{num_layers} to -1",
                    )
            first, last = (index % num_layers for index in span)
            if first > last:
                raise KvqError(
                    f"`{self.text}`: the range {span[0]}-{span[1]} runs backwards", f"try {span[1]}-{span[0]}"
                )
            chosen.update(range(first, last + 1))
        return chosen


def parse_spans(text: str) -> tuple[tuple[int, int], ...]:
    """`0,1,4-9,-1` as ranges; `UsageError` for anything else."""
    spans = []
    for part in text.split(","):
        found = _SPAN.fullmatch(part.strip())
        if found is None:
            raise UsageError(f"layers: {part.strip()!r} is no layer and no range", HINT)
        first = int(found[1])
        spans.append((first, first if found[2] is None else int(found[2])))
    return tuple(spans)


def as_spans(layers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Layers, ascending, as the fewest ranges."""
    numbers = sorted(layers)
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    starts, ends = [0, *breaks], [*breaks, len(numbers)]
    return tuple((numbers[a], numbers[b - 1]) for a, b in zip(starts, ends, strict=True))
