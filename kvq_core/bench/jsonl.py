"""Prompts and traces from a JSONL file: one request a line, replayed in the file's order."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

from kvq_core.bench.record import load_json, read_bytes
from kvq_core.bench.sharegpt import is_unicode
from kvq_core.bench.workload import Dataset, Tokenizer, Workload, WorkloadSpec, finish
from kvq_core.errors import KvqError

BLOCK = 512
"""Tokens that one of `hash_ids` stands for, as in Mooncake's traces."""
FORMATS = {
    "jsonl": '{"prompt": "…", "output_length": 64} a line; the prompt is text or token ids, and without a '
    "length answers have --output-len tokens",
    "trace": '{"timestamp": MILLISECONDS, "input_length": 900, "output_length": 64} a line, as in '
    "Mooncake's traces; a `prompt` may take the place of the input length",
}


@dataclass(frozen=True)
class Entry:
    """One line: a prompt (text or token ids) or its length, and when it arrives."""

    prompt: str | list[int] | None
    input_len: int | None
    output_len: int | None
    timestamp: float | None = None
    """Milliseconds."""
    blocks: tuple[int, ...] = ()
    """Names of blocks of the prompt; equal ones have equal tokens, so that prefixes are shared."""


def read_entries(path: Path, name: str) -> Dataset:
    """The lines of a file for `--dataset-name jsonl` or `trace`; `KvqError` naming the first wrong one."""
    data = read_bytes(path)
    entries = []
    # Not `splitlines`: JSON may hold other line breaks, as U+2028, inside its strings.
    for number, line in enumerate(data.decode("utf-8-sig", "replace").split("\n"), 1):
        if line.strip():
            entries.append(_entry(line, name, f"{path}, line {number}"))
    if not entries:
        raise KvqError(f"{path} holds no request", FORMATS[name])
    times = [entry.timestamp or 0.0 for entry in entries]
    if times != sorted(times):
        raise KvqError(f"{path}: its timestamps are not in order", "sort its lines by timestamp")
    return Dataset(path.name, hashlib.sha256(data).hexdigest(), [], entries=entries)


def replay_entries(
    spec: WorkloadSpec,
    dataset: Dataset,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_len: int | None,
) -> Workload:
    """The entries as requests, repeated if too few; those that the model can't hold are left out.

    Raises `KvqError` where nothing is left, and for text without a tokenizer.
    """
    entries = cast(Sequence[Entry], dataset.entries)
    prompts, kept = [], []
    for number, entry in enumerate(entries):
        output = entry.output_len or spec.output_len
        room = math.inf if max_len is None else max_len - min(output, spec.max_output_len or output)
        if (entry.input_len or 0) > room and entry.prompt is None:
            continue  # before so many tokens are made
        ids = _token_ids(entry, tokenizer, vocab_size, f"tokens {spec.seed} {number}")
        if len(ids) <= room:
            prompts.append((ids, output))
            kept.append(entry)
        if len(kept) >= spec.num_prompts + spec.num_warmup:
            break
    if not kept:
        raise KvqError(
            f"every request of {dataset.name} is longer than the {max_len} tokens that the model holds",
            "shorter requests, or a model with a longer context",
        )
    count = min(spec.num_prompts, len(kept)) if spec.name == "trace" else spec.num_prompts
    warmup = islice(cycle(prompts), count, count + spec.num_warmup)
    spec = replace(spec, num_prompts=count)
    settings = {"distinct_prompts": min(count, len(kept)), "left_out": number + 1 - len(kept)}
    workload = finish(spec, [*islice(cycle(prompts), count), *warmup], settings)
    requests = workload.requests
    if spec.name == "trace":
        first = kept[0].timestamp or 0.0
        arrivals = [((entry.timestamp or 0.0) - first) / 1e3 for entry in kept]
        requests = [
            replace(request, arrival=at) for request, at in zip(requests, arrivals[:count], strict=True)
        ]
    return replace(workload, requests=requests, dataset=dataset.name, sha256=dataset.sha256)


def _entry(line: str, name: str, where: str) -> Entry:
    try:
        document = load_json(line)
    except ValueError as error:
        raise KvqError(f"{where} is not JSON: {error}", FORMATS[name]) from error
    if not isinstance(document, dict):
        raise KvqError(f"{where} is no JSON object", FORMATS[name])
    prompt = document.get("prompt")
    lengths = [document.get(key) for key in ("input_length", "output_length")]
    time, blocks = document.get("timestamp"), document.get("hash_ids", [])
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if (prompt is not None and not (isinstance(prompt, str) or is_ids)) or prompt in ("", []):
        raise KvqError(f"{where}: its `prompt` is neither text nor token ids", FORMATS[name])
    if isinstance(prompt, str) and not is_unicode(prompt):
        raise KvqError(f"{where}: its `prompt` has broken Unicode", "half a surrogate pair is no character")
    if any(length is not None and (type(length) is not int or length < 1) for length in lengths):
        raise KvqError(f"{where}: its lengths must be whole numbers above 0", FORMATS[name])
    if prompt is None and (name == "jsonl" or lengths[0] is None):
        raise KvqError(f"{where} has no prompt" + " and no `input_length`" * (name == "trace"), FORMATS[name])
    if name == "trace" and not (isinstance(time, int | float) and 0 <= time < math.inf):
        raise KvqError(f"{where} has no `timestamp` in milliseconds", FORMATS[name])
    if not (isinstance(blocks, list) and all(type(block) is int for block in blocks)):
        raise KvqError(f"{where}: its `hash_ids` are no list of whole numbers", FORMATS[name])
    return Entry(prompt, lengths[0], lengths[1], time if name == "trace" else None, tuple(blocks))


def _token_ids(entry: Entry, tokenizer: Tokenizer | None, vocab_size: int, seed: str) -> list[int]:
    if isinstance(entry.prompt, list):
        return entry.prompt
    if isinstance(entry.prompt, str):
        if tokenizer is None:
            raise KvqError("this model has no tokenizer, which text needs", "give prompts as token ids")
        return list(tokenizer([entry.prompt], add_special_tokens=True)["input_ids"][0])
    vocabulary, length = range(vocab_size), entry.input_len or 1
    ids: list[int] = []
    for block in entry.blocks:
        ids += random.Random(f"block {block}").choices(vocabulary, k=min(BLOCK, max(0, length - len(ids))))
    return ids + random.Random(seed).choices(vocabulary, k=length - len(ids))


def make_prefixed(spec: WorkloadSpec, vocab_size: int, *, max_len: int | None) -> Workload:
    """Random token ids: each prompt is one of `num_prefixes` shared beginnings and a part of its own."""
    answer = min(spec.output_len, spec.max_output_len or spec.output_len)
    if max_len is not None and spec.prefix_len + spec.input_len + answer > max_len:
        raise KvqError(
            f"a request of {spec.prefix_len} + {spec.input_len} + {answer} tokens exceeds the "
            f"{max_len} that the model holds",
            "a shorter --prefix-len, --input-len or --output-len",
        )
    generator, vocabulary = random.Random(f"prefixes {spec.seed}"), range(vocab_size)
    prefixes = [generator.choices(vocabulary, k=spec.prefix_len) for _ in range(spec.num_prefixes)]
    prompts: list[tuple[list[int], int]] = [
        (generator.choice(prefixes) + generator.choices(vocabulary, k=spec.input_len), spec.output_len)
        for _ in range(spec.num_prompts + spec.num_warmup)
    ]
    settings: dict[str, Any] = {
        "prefix_len": spec.prefix_len,
        "num_prefixes": spec.num_prefixes,
        "input_len": spec.input_len,
        "output_len": spec.output_len,
    }
    return finish(spec, prompts, settings)
