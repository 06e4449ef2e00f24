"""Retrieval tasks of our own, generated and seeded: a needle in a haystack, one of many keys."""

import random
from collections.abc import Callable
from functools import partial

CITIES = (
    "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Rome", "Hanoi", "Dakar", "Turin", "Kyoto", "Perth", "Sofia",
    "Tunis", "Malmo", "Basel", "Accra", "Porto", "Seoul", "Riga", "Leeds",
)  # fmt: skip
PEOPLE = (
    "The baker",
    "A sailor",
    "My uncle",
    "The teacher",
    "An old farmer",
    "The doctor",
    "A young painter",
)
DEEDS = ("walked to", "talked about", "looked at", "forgot", "dreamt of", "painted", "wrote about", "left")
THINGS = ("the river", "the old bridge", "a small garden", "the market", "the last train", "a quiet room")
TIMES = ("in the morning", "before the rain", "after dinner", "on a cold day", "again", "without a word")
ADJECTIVES = (
    "red", "old", "big", "small", "green", "cold", "dark", "warm", "quiet", "young", "blue", "heavy",
    "narrow", "gentle", "golden", "hidden", "empty", "broken", "silver", "distant",
)  # fmt: skip
NOUNS = (
    "apple", "river", "table", "window", "garden", "horse", "letter", "candle", "bridge", "stone", "flower",
    "basket", "hammer", "mirror", "ladder", "pillow", "rocket", "lantern", "violin", "anchor",
)  # fmt: skip

Count = Callable[[str], int]
"""Tokens of a text."""


def needles(count: Count, context_len: int, samples: int, seed: int) -> list[dict[str, str]]:
    """Texts of about `context_len` tokens that mention a city's number once, from start to end by turns.

    After G. Kamradt, https://github.com/gkamradt/LLMTest_NeedleInAHaystack, with sentences made here.
    """
    docs = []
    for index in range(samples):
        rng = random.Random(f"needle {seed} {index}")
        city, value = rng.choice(CITIES), str(rng.randrange(1000, 10000))
        needle, question = f"The secret number of {city} is {value}.", f"\n\nThe secret number of {city} is"
        hay = _until(partial(_sentence, rng), count, context_len - count(needle + question + value))
        depth = (index % 11) / 10
        hay.insert(round(depth * len(hay)), needle)
        docs.append({"context": " ".join(hay) + question, "continuation": value})
    return docs


def lookups(count: Count, context_len: int, samples: int, seed: int) -> list[dict[str, str]]:
    """Lists of about `context_len` tokens of keys with their values; one key at the end asks for its value.

    After N. F. Liu et al., Lost in the Middle, https://arxiv.org/abs/2307.03172, with short keys and values.
    """
    docs = []
    for index in range(samples):
        rng = random.Random(f"kv {seed} {index}")
        seen: set[str] = set()
        lines = _until(partial(_line, rng, seen), count, context_len - 16)
        depth = (index % 11) / 10
        key, value = lines[round(depth * (len(lines) - 1))].split(": ")
        docs.append({"context": "\n".join([*lines, "", f"{key}:"]), "continuation": value})
    return docs


def _sentence(rng: random.Random) -> str:
    return f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)} {rng.choice(THINGS)} {rng.choice(TIMES)}."


def _line(rng: random.Random, seen: set[str]) -> str:
    """A key that is not among `seen` yet, and its value."""
    key = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    while key in seen:
        key = f"{rng.choice(ADJECTIVES)} {key}"
    seen.add(key)
    return f"{key}: {rng.randrange(1000, 10000)}"


def _until(piece: Callable[[], str], count: Count, tokens: int) -> list[str]:
    """Pieces of about so many tokens together, at least one."""
    pieces = [piece()]
    total = count(pieces[0]) + 1
    while total < tokens:
        pieces.append(piece())
        total += count(pieces[-1]) + 1
    return pieces
