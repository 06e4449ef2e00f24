#!/usr/bin/env python3
"""Write the ShareGPT-shaped sample that ships with kvq: kvq_core/bench/data/sharegpt_sample.json.

Every text is made here, from the phrases in scripts/sample/; nothing is copied from any conversation.
Lengths are heavy-tailed like ShareGPT's (lognormal quantiles, means near 220 tokens in and 204 out) in
tokens of the demo model, which `estimate_tokens` estimates. Nothing else enters: the same files give the
same sample.

    python scripts/make_sample.py           # rewrite the sample
    python scripts/make_sample.py --check   # exit 1 if the committed sample differs
"""

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "kvq_core" / "bench" / "data" / "sharegpt_sample.json"
COUNT = 320
SEED = 20

CODE = (
    '''def group_{noun}(rows, key="{field}"):
    """Collect rows that share a {field}."""
    groups = {{}}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups
''',
    '''def mean_{field}(rows, default=0.0):
    values = [row["{field}"] for row in rows if row["{field}"] is not None]
    if not values:
        return default
    return sum(values) / len(values)
''',
    '''def read_{noun}(path):
    """Yield one {noun} a line, skipping comments."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, value = line.split(",")
            yield {{"name": name, "{field}": float(value), "line": number}}
''',
    '''class {Noun}Cache:
    def __init__(self, size={number}):
        self.size = size
        self.items = {{}}

    def get(self, name, load):
        if name not in self.items:
            if len(self.items) >= self.size:
                self.items.pop(next(iter(self.items)))
            self.items[name] = load(name)
        return self.items[name]
''',
    '''def retry_{noun}(action, times={number}, wait=0.5):
    for attempt in range(times):
        try:
            return action()
        except OSError as error:
            print(f"attempt {{attempt + 1}} of {{times}}: {{error}}")
            time.sleep(wait * 2**attempt)
    raise RuntimeError("the {noun} did not answer")
''',
)  # fmt: skip


def read_phrases(name: str) -> dict[str, list[str]]:
    """{section: phrases} of a file with `[section]` headings; a line holds phrases separated by ` | `."""
    sections: dict[str, list[str]] = {}
    for line in (HERE / "sample" / name).read_text("utf-8").splitlines():
        if line.startswith("["):
            phrases = sections[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            phrases += line.split(" | ")
    return sections


def read_topics() -> dict[str, dict[str, list[str]]]:
    """{topic: {slot: phrases}}; a slot's line is `slot: phrase | phrase`."""
    topics: dict[str, dict[str, list[str]]] = {}
    for topic, phrases in read_phrases("topics.txt").items():
        slots = topics[topic] = {}
        for phrase in phrases:
            name, colon, first = phrase.partition(": ")
            if colon:
                slot = slots[name] = [first]
            else:
                slot.append(phrase)
    return topics


PATTERNS = read_phrases("patterns.txt")
TASKS = [section for section in PATTERNS if section.startswith("task ")]


def estimate_tokens(text: str) -> int:
    """About the number of tokens of the demo model: words, single digits, punctuation marks, line breaks."""
    pieces = re.findall(r"[^\W\d_]+|\d|\n+| {2,}|[^\w\s]|_", text)
    return round(sum(1.3 if piece[0].isalpha() and len(piece) > 7 else 1 for piece in pieces))


def draw_lengths(generator: random.Random, mean: float, sigma: float, low: int, high: int) -> list[int]:
    """`COUNT` quantiles of a lognormal distribution cut to [low, high] with the given mean, shuffled."""
    scores = [NormalDist().inv_cdf((i + 0.5) / COUNT) for i in range(COUNT)]

    def lengths(median: float) -> list[int]:
        return [round(min(max(median * math.exp(sigma * score), low), high)) for score in scores]

    below, above = float(low), mean
    for _ in range(40):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(lengths(middle)) < COUNT * mean else (below, middle)
    result = lengths(above)
    generator.shuffle(result)
    return result


class Writer:
    """Fills patterns with one topic's phrases; a phrase returns only after all others had their turn."""

    def __init__(self, slots: dict[str, list[str]], generator: random.Random) -> None:
        self.generator = generator
        self.choices = PATTERNS | slots | {"code": list(CODE)}
        self.decks: dict[str, list[str]] = {}

    def draw(self, slot: str) -> str:
        if not self.decks.get(slot):
            self.decks[slot] = list(self.choices[slot])
            self.generator.shuffle(self.decks[slot])
        return self.decks[slot].pop()

    def fill(self, pattern: str) -> str:
        def value(match: re.Match[str]) -> str:
            slot = match[1]
            if slot == "number":
                return str(self.generator.randint(2, 9))
            if slot == "date":
                return f"{self.generator.randint(1, 28)} {self.draw('month')}"
            return self.draw(slot.lower()).capitalize() if slot[0].isupper() else self.draw(slot)

        text = re.sub(r"(?<!\{)\{(\w+)\}(?!\})", value, pattern).replace("{{", "{").replace("}}", "}")
        return text[0].upper() + text[1:]

    def sentences(self, key: str) -> Iterator[str]:
        while True:
            yield self.fill(self.draw(key))

    def prose(self, key: str) -> Iterator[str]:
        """Sentences, in paragraphs of a few."""
        left = 0
        for i, sentence in enumerate(self.sentences(key)):
            gap = "" if i == 0 else " " if left else "\n\n"
            left = (left or self.generator.randint(3, 5)) - 1
            yield gap + sentence

    def items(self, key: str, mark: Callable[[int], str]) -> Iterator[str]:
        for i, sentence in enumerate(self.sentences(key)):
            yield ("\n" if i else "") + mark(i) + sentence

    def nearest(self, patterns: Sequence[str], target: int) -> str:
        """The pattern that, filled, comes nearest to `target` tokens."""
        return min(map(self.fill, patterns), key=lambda text: abs(estimate_tokens(text) - target))


def grow(pieces: Iterator[str], target: float, start: str = "") -> str:
    """`start` and as many pieces as bring it nearest to `target` tokens; at least one piece."""
    text = start + next(pieces)
    while (length := estimate_tokens(text)) < target:
        longer = text + next(pieces)
        if estimate_tokens(longer) - target > target - length:
            break
        text = longer
    return text


def document(writer: Writer, kind: str) -> Iterator[str]:
    """A text without end, of the kind that people paste."""
    if kind == "minutes":
        present = ", ".join(writer.draw("name") for _ in range(3))
        yield f"Notes, {writer.fill('{date}')}, present: {present}\n"
        yield from writer.items("minutes", bullet)
    elif kind == "story":
        yield from writer.prose("story")
    elif kind == "letter":
        yield f"Dear {writer.draw('name')},\n\n"
        yield from writer.prose("requests")
    elif kind == "table":
        columns = [writer.draw("field") for _ in range(3)]
        yield "week," + ",".join(columns) + "\n"
        for week in range(1, 10_000):
            yield ",".join(map(str, [week, *(writer.generator.randint(10, 400) for _ in columns)])) + "\n"
    elif kind == "log":
        second = writer.generator.randint(0, 1200)
        for line in writer.sentences("log"):
            second += writer.generator.randint(0, 60)
            yield f"03:{second // 60 % 60:02d}:{second % 60:02d} {line}\n"
    else:
        for function in writer.sentences("code"):
            yield function[0].lower() + function[1:] + "\n\n"


def bullet(_: int) -> str:
    return "- "


def make_prompt(writer: Writer, target: int) -> tuple[str, str]:
    """(kind, text) of a prompt of about `target` tokens: a question, a question with its story, a paste."""
    if target < 28:
        return "question", writer.nearest(PATTERNS["short"], target)
    if target < 130:
        question = writer.fill("{question}")
        return "question", f"{grow(writer.prose('requests'), target - estimate_tokens(question))} {question}"
    task = writer.generator.choice(TASKS)
    kind = task.removeprefix("task ")
    return kind, grow(document(writer, kind), target, writer.draw(task) + "\n\n").rstrip()


def make_answer(writer: Writer, kind: str, target: int) -> str:
    """An answer of about `target` tokens, in a form that suits the kind of prompt."""
    if target < 30:
        return writer.nearest(PATTERNS["advice"] + PATTERNS["openings"], target)
    opening = writer.draw("openings")
    forms = {"minutes": "bullets", "story": "story", "code": "code", "log": "steps", "table": "bullets"}
    form = forms.get(kind) or writer.generator.choice(("prose", "prose", "steps", "bullets"))
    if form == "story":
        return grow(writer.prose("story"), target)
    opening = writer.fill(opening)
    if form == "code" and target > 110:
        code = grow(document(writer, "code"), target * 0.55).rstrip()
        return grow(writer.prose("advice"), target, f"{opening}\n\n```python\n{code}\n```\n\n")
    if form == "steps":
        return grow(writer.items("advice", lambda i: f"{i + 1}. "), target, opening + "\n\n")
    if form == "bullets":
        source = "minutes" if kind == "minutes" else "advice"
        return grow(writer.items(source, bullet), target, opening + "\n\n")
    return grow(writer.prose("advice"), target, opening + " ")


def make_sample() -> list[dict[str, object]]:
    """The conversations, in ShareGPT's schema; about a quarter have a second question and answer."""
    topics = read_topics()
    generator = random.Random(SEED)
    inputs = draw_lengths(generator, mean=217, sigma=1.25, low=6, high=880)
    outputs = draw_lengths(generator, mean=202, sigma=0.85, low=8, high=960)
    sample: list[dict[str, object]] = []
    for i, (input_len, output_len) in enumerate(zip(inputs, outputs, strict=True)):
        topic = list(topics)[i % len(topics)]
        writer = Writer(topics[topic], generator)
        kind, prompt = make_prompt(writer, input_len)
        texts = [prompt, make_answer(writer, kind, output_len)]
        if generator.random() < 0.25:
            texts += [writer.fill(writer.draw("follow-ups")), make_answer(writer, "question", 40)]
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        sample.append({"id": f"{topic}-{i}", "conversations": turns})
    return sample


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the ShareGPT-shaped sample that ships with kvq.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the sample differs")
    arguments = parser.parse_args()
    text = json.dumps(make_sample(), ensure_ascii=False, indent=1) + "\n"
    if arguments.check:
        same = SAMPLE.exists() and SAMPLE.read_text("utf-8") == text
        print(f"{SAMPLE.name} is {'' if same else 'NOT '}what this script writes")
        return 0 if same else 1
    SAMPLE.parent.mkdir(parents=True, exist_ok=True)
    SAMPLE.write_text(text, "utf-8")
    print(f"wrote {SAMPLE.name}: {COUNT} conversations, {len(text.encode()) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
