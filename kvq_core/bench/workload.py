"""Workloads: which requests a run replays, reproducible from a file's checksum, a seed and a few settings."""

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from kvq_core.bench.record import parse_json, read_bytes
from kvq_core.bench.target import BenchRequest
from kvq_core.errors import KvqError, UsageError

if TYPE_CHECKING:
    from kvq_core.bench.jsonl import Entry

NAMES = ("sharegpt", "lengths", "fixed", "random", "prefix", "jsonl", "trace")
FILES = {
    "lengths": "a JSON file with a list of [input tokens, output tokens] pairs",
    "jsonl": "a file with a request a line: prompt, output_length",
    "trace": "a file with a request a line: timestamp in ms, input_length or prompt, output_length",
}
"""Datasets that are files of the user's, and what is in them."""
WARMUP_TOKENS = 8
"""Warm-up requests stop after this many tokens."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class WorkloadSpec:
    """What a user asks for; `make_workload` turns it into requests."""

    name: str = "sharegpt"
    path: str | None = None
    """A file; for sharegpt also `hub`, or None for the shipped sample."""
    num_prompts: int = 64
    num_warmup: int = 64
    seed: int = 0
    input_len: int = 512
    """Tokens of a prompt (fixed), their mean (random), or those after the prefix (prefix)."""
    output_len: int = 128
    range_ratio: float = 0.5
    """random: lengths are uniform in mean · (1 ± range_ratio)."""
    prefix_len: int = 512
    """prefix: tokens with which prompts begin, and which they share."""
    num_prefixes: int = 1
    """prefix: how many different beginnings there are."""
    max_output_len: int | None = None
    """Answers are cut to this many tokens."""
    warmup_input_len: int | None = None
    """Prompts of the warm-up are cut to this many tokens."""

    @property
    def file(self) -> Path | None:
        """The file that requests are read from."""
        return None if self.path in (None, "hub") else Path(self.path)

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UsageError(f"unknown --dataset-name `{self.name}`", f"use one of {', '.join(NAMES)}")
        for name in (
            "num_prompts",
            "input_len",
            "output_len",
            "max_output_len",
            "prefix_len",
            "num_prefixes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.num_warmup < 0:
            raise UsageError(f"--warmup must not be negative, got {self.num_warmup}")
        if not 0 <= self.range_ratio < 1:
            raise UsageError(f"--range-ratio must lie in [0, 1), got {self.range_ratio}")
        if self.path is None and self.name in FILES:
            raise UsageError(f"--dataset-name {self.name} needs --dataset-path", FILES[self.name])
        if self.path is not None and self.name in ("fixed", "random", "prefix"):
            raise UsageError(
                f"--dataset-name {self.name} takes no --dataset-path",
                "its lengths are --input-len, --output-len",
            )

    @property
    def needs_tokenizer(self) -> bool:
        """Whether it replays text, or may."""
        return self.name in ("sharegpt", "jsonl")


@dataclass(frozen=True)
class Dataset:
    """A file that was read and checked."""

    name: str
    """Without its folder."""
    sha256: str
    pairs: list[tuple[str, str]] | list[tuple[int, int]]
    """Prompts and answers, or their lengths."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Why how many entries were left out."""
    entries: "list[Entry]" = field(default_factory=list)
    """The lines of a JSONL file."""


@dataclass(frozen=True)
class Workload:
    """Requests to replay, requests to warm up with, and what a run record says of them."""

    name: str
    requests: list[BenchRequest]
    warmup: list[BenchRequest]
    dataset: str | None = None
    """Name of the file, without its folder."""
    sha256: str | None = None
    """Checksum of the file."""
    settings: dict[str, Any] = field(default_factory=dict)

    def with_settings(self, **settings: Any) -> "Workload":
        return replace(self, settings=self.settings | settings)

    def describe(self) -> dict[str, Any]:
        """The `workload` of a run record."""
        inputs = [request.input_len for request in self.requests]
        outputs = [request.output_len for request in self.requests]
        return {
            "name": self.name,
            "dataset": self.dataset,
            "sha256": self.sha256,
            "requests_sha256": requests_sha256(self.requests),
            "num_prompts": len(self.requests),
            "num_warmup": len(self.warmup),
            "mean_input_len": sum(inputs) / len(inputs),
            "mean_output_len": sum(outputs) / len(outputs),
            "max_input_len": max(inputs),
            "max_output_len": max(outputs),
            **self.settings,
        }


def read_dataset(spec: WorkloadSpec) -> Dataset | None:
    """The file of a workload, checked, before a model is loaded; None for a workload without one.

    Raises `KvqError` for a missing or bad file.
    """
    if spec.name == "sharegpt":
        from kvq_core.bench.sharegpt import read_sharegpt

        return read_sharegpt(spec.path)
    if spec.path is None:
        return None
    if spec.name in ("jsonl", "trace"):
        from kvq_core.bench.jsonl import read_entries

        return read_entries(Path(spec.path), spec.name)
    return read_lengths(Path(spec.path))


def make_workload(
    spec: WorkloadSpec,
    dataset: Dataset | None,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_len: int | None = None,
) -> Workload:
    """The workload of `spec` for a model; `max_len` is the most tokens it holds, prompt and answer together.

    Raises `KvqError` for lengths that the model can't hold, and where text is to be replayed without a
    tokenizer.
    """
    if spec.name == "sharegpt":
        from kvq_core.bench.sharegpt import replay_sharegpt

        assert dataset is not None
        if tokenizer is None:
            raise KvqError(
                "this model has no tokenizer, which replaying text needs",
                "`--dataset-name lengths`, `fixed` or `random` make token ids instead",
            )
        return replay_sharegpt(spec, dataset, tokenizer, max_len=max_len)
    if spec.name in ("jsonl", "trace", "prefix"):
        from kvq_core.bench.jsonl import make_prefixed, replay_entries

        if dataset is None:
            return make_prefixed(spec, vocab_size, max_len=max_len)
        return replay_entries(spec, dataset, tokenizer=tokenizer, vocab_size=vocab_size, max_len=max_len)
    if dataset is not None:
        return replay_lengths(spec, dataset, vocab_size, max_len=max_len)
    return make_lengths(spec, vocab_size, max_len=max_len)


def read_lengths(path: Path) -> Dataset:
    """The [input, output] pairs of a JSON file; `KvqError` that names the first wrong one."""
    data = read_bytes(path)
    pairs = _check_pairs(parse_json(data, path), path)
    return Dataset(path.name, hashlib.sha256(data).hexdigest(), pairs)


def replay_lengths(
    spec: WorkloadSpec, dataset: Dataset, vocab_size: int, *, max_len: int | None = None
) -> Workload:
    """Random token ids with the [input, output] lengths of a JSON list, in the file's order, repeated."""
    pairs = cast(list[tuple[int, int]], dataset.pairs)
    chosen = [pairs[i % len(pairs)] for i in range(spec.num_prompts + spec.num_warmup)]
    workload = _from_lengths(spec, chosen, vocab_size, max_len)
    return replace(
        workload,
        dataset=dataset.name,
        sha256=dataset.sha256,
        settings=workload.settings | {"distinct_prompts": spec.num_prompts},
    )


def make_lengths(spec: WorkloadSpec, vocab_size: int, *, max_len: int | None = None) -> Workload:
    """Random token ids: every prompt and answer of the same length, or uniform around it."""
    generator = random.Random(f"lengths {spec.seed}")
    spread = spec.range_ratio if spec.name == "random" else 0.0
    pairs = [
        (_draw(generator, spec.input_len, spread), _draw(generator, spec.output_len, spread))
        for _ in range(spec.num_prompts + spec.num_warmup)
    ]
    workload = _from_lengths(spec, pairs, vocab_size, max_len)
    asked: dict[str, Any] = {"input_len": spec.input_len, "output_len": spec.output_len}
    if spec.name == "random":
        asked |= {"range_ratio": spec.range_ratio}
    return replace(workload, settings=workload.settings | asked)


def finish(
    spec: WorkloadSpec, prompts: Sequence[tuple[list[int], int]], settings: dict[str, Any]
) -> Workload:
    """A workload from (token ids, output length) pairs: the measured first, then those of the warm-up."""
    requests = [
        BenchRequest(i, ids, len(ids), min(output, spec.max_output_len or output))
        for i, (ids, output) in enumerate(prompts[: spec.num_prompts])
    ]
    warmup = []
    for i, (ids, output) in enumerate(prompts[spec.num_prompts :]):
        cut = ids[: spec.warmup_input_len]
        warmup.append(BenchRequest(-1 - i, cut, len(cut), min(output, WARMUP_TOKENS)))
    return Workload(
        spec.name,
        requests,
        warmup,
        settings={
            "seed": spec.seed,
            "output_len_cap": spec.max_output_len,
            "warmup_input_len": spec.warmup_input_len,
            "warmup_output_len": WARMUP_TOKENS,
            **settings,
        },
    )


def requests_sha256(requests: Sequence[BenchRequest]) -> str:
    """Checksum of prompts and output lengths: equal for runs that did the same work."""
    digest = hashlib.sha256()
    for request in requests:
        work: tuple[Any, ...] = (request.prompt, request.output_len)
        work += (request.arrival,) * (request.arrival is not None)
        digest.update(repr(work).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _from_lengths(
    spec: WorkloadSpec, pairs: Sequence[tuple[int, int]], vocab_size: int, max_len: int | None
) -> Workload:
    cap = spec.max_output_len
    longest = max(((n, min(output, cap or output)) for n, output in pairs), key=sum)
    if max_len is not None and sum(longest) > max_len:
        raise KvqError(
            f"a request of {longest[0]} + {longest[1]} tokens exceeds the {max_len} that the model holds",
            "shorter lengths, or a model with a longer context",
        )
    generator = random.Random(f"tokens {spec.seed}")
    vocabulary = range(vocab_size)
    return finish(spec, [(generator.choices(vocabulary, k=n), output) for n, output in pairs], {})


def _draw(generator: random.Random, mean: int, spread: float) -> int:
    low, high = max(1, round(mean * (1 - spread))), max(1, round(mean * (1 + spread)))
    return generator.randint(low, high)


def _check_pairs(document: Any, path: Path) -> list[tuple[int, int]]:
    if not isinstance(document, list):
        raise KvqError(f"{path} holds no list of lengths", "it must be a JSON list of [input, output] pairs")
    if not document:
        raise KvqError(f"{path} holds an empty list", "it must hold at least one [input, output] pair")
    for number, pair in enumerate(document):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(length) is int for length in pair)):
            raise KvqError(
                f"{path}: entry {number} is not a pair of whole numbers: {str(pair)[:60]}",
                "each entry must be [input tokens, output tokens]",
            )
        if min(pair) < 1:
            raise KvqError(f"{path}: entry {number} is {pair}", "lengths must be at least 1 token")
    return [(pair[0], pair[1]) for pair in document]
