"""A small set of combinations in which every pair of values of two axes occurs."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0, tries: int = 40) -> list[dict[str, Any]]:
    """Greedy: each new combination is the one of `tries` random ones that covers most pairs not yet seen."""
    names = list(axes)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    rng = random.Random(seed)

    def pairs(choice: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, choice[a], b, choice[b]) for a, b in itertools.combinations(names, 2)}

    result = []
    while missing:
        a, i, b, j = min(missing)  # every round covers at least this pair
        candidates = []
        for _ in range(tries):
            choice = {name: rng.randrange(len(axes[name])) for name in names}
            choice[a], choice[b] = i, j
            candidates.append(choice)
        best = max(candidates, key=lambda choice: len(pairs(choice) & missing))
        missing -= pairs(best)
        result.append({name: axes[name][index] for name, index in best.items()})
    return result
