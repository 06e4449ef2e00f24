"""ShareGPT conversations as a workload: the first prompt, and an answer as long as the recorded one."""

import hashlib
import random
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

from kvq_core.bench.record import parse_json, read_bytes
from kvq_core.bench.workload import Dataset, Tokenizer, Workload, WorkloadSpec, finish
from kvq_core.errors import KvqError

MIN_TOKENS = 4
MAX_PROMPT = 1024
MAX_TOTAL = 2048
HUMAN = ("human", "user")
ASSISTANT = ("gpt", "assistant", "chatgpt", "bing", "bard")
HUB_REPO = "anon8231489123/ShareGPT_Vicuna_unfiltered"
HUB_FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
BLOCK = 256
"""Conversations tokenized at a time: a run needs a few hundred of the hub file's 90,000."""


def read_sharegpt(path: str | None) -> Dataset:
    """The conversations of a file, of the shipped sample (None), or of the hub's file (`hub`).

    Raises `KvqError` for a file that is missing, no JSON, or not in ShareGPT's schema.
    """
    place = find_dataset(path)
    data = read_bytes(place)
    pairs, dropped = read_conversations(parse_json(data, place), place)
    return Dataset(place.name, hashlib.sha256(data).hexdigest(), pairs, dropped)


def replay_sharegpt(
    spec: WorkloadSpec, dataset: Dataset, tokenizer: Tokenizer, *, max_len: int | None = None
) -> Workload:
    """Conversations in an order drawn with the seed, filtered as by LMDeploy's profiler, repeated if too few.

    The filter: first human turn and the assistant's answer both at least 4 tokens, the prompt at most
    1,024, their sum at most 2,048 (or `max_len`). Raises `KvqError` where nothing is left.
    """
    pairs, dropped = cast(list[tuple[str, str]], list(dataset.pairs)), Counter(dataset.dropped)
    random.Random(f"order {spec.seed}").shuffle(pairs)
    limit = min(MAX_TOTAL, max_len or MAX_TOTAL)
    needed = spec.num_prompts + spec.num_warmup
    chosen: list[tuple[list[int], int]] = []
    for start in range(0, len(pairs), BLOCK):
        for ids, output in _tokenize(tokenizer, pairs[start : start + BLOCK]):
            reason = _reject(len(ids), output, limit)
            if reason:
                dropped[reason] += 1
            else:
                chosen.append((ids, output))
        if len(chosen) >= needed:
            break
    if not chosen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "it is empty"
        raise KvqError(
            f"no conversation of {dataset.name} passes the filter: {reasons}",
            f"prompt and answer need at least {MIN_TOKENS} tokens each, the prompt at most {MAX_PROMPT}, "
            f"both together at most {limit}",
        )
    settings = {
        "distinct_prompts": min(len(chosen), spec.num_prompts),
        "filter": {"min_len": MIN_TOKENS, "max_input_len": MAX_PROMPT, "max_total_len": limit},
    }
    workload = finish(spec, list(islice(cycle(chosen), needed)), settings)
    return replace(workload, dataset=dataset.name, sha256=dataset.sha256)


def find_dataset(path: str | None) -> Path:
    """The file to read: the shipped sample for None, the hub's file (downloaded once) for `hub`."""
    if path is None:
        return Path(str(files("kvq_core.bench") / "data" / "sharegpt_sample.json"))
    if path != "hub":
        return Path(path)
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(HUB_REPO, HUB_FILE, repo_type="dataset"))
    except Exception as error:
        detail = (str(error).splitlines() or [""])[0]
        raise KvqError(
            f"cannot get {HUB_FILE} from the hub: {type(error).__name__}: {detail}",
            "without a network, leave --dataset-path out (the shipped sample) or name a file",
        ) from error


def read_conversations(document: Any, path: Path) -> tuple[list[tuple[str, str]], Counter[str]]:
    """(prompt, answer) of every conversation that has both, and why others were dropped.

    Raises `KvqError` naming the first entry that does not follow ShareGPT's schema.
    """
    if not isinstance(document, list):
        raise KvqError(f"{path} is not in ShareGPT's schema: it holds no list", _SCHEMA)
    if not document:
        raise KvqError(f"{path} holds no conversation", _SCHEMA)
    pairs = []
    dropped: Counter[str] = Counter()
    for number, entry in enumerate(document):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise KvqError(
                f"{path} is not in ShareGPT's schema: entry {number} has no list `conversations`", _SCHEMA
            )
        for turn in turns:
            if not (
                isinstance(turn, dict)
                and isinstance(turn.get("from"), str)
                and isinstance(turn.get("value"), str)
            ):
                raise KvqError(
                    f"{path} is not in ShareGPT's schema: a turn of entry {number} lacks `from` or `value`",
                    _SCHEMA,
                )
        pair = _first_exchange(turns)
        if pair is None:
            dropped["without question and answer"] += 1
        elif not all(map(is_unicode, pair)):
            dropped["with broken Unicode"] += 1
        else:
            pairs.append(pair)
    return pairs, dropped


_SCHEMA = 'a JSON list of {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}'


def _first_exchange(turns: list[dict[str, str]]) -> tuple[str, str] | None:
    prompt = None
    for turn in turns:
        if prompt is None and turn["from"] in HUMAN:
            prompt = turn["value"]
        elif prompt is not None and turn["from"] in ASSISTANT:
            return prompt, turn["value"]
    return None


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can carry but no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tokenize(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """(prompt ids, tokens of the answer): the prompt as a model would get it, the answer without BOS."""
    if not pairs:
        return []
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=True)["input_ids"]
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    return [(list(ids), len(answer)) for ids, answer in zip(prompts, answers, strict=True)]


def _reject(prompt_len: int, output_len: int, limit: int) -> str | None:
    if prompt_len < MIN_TOKENS or output_len < MIN_TOKENS:
        return "too short"
    if prompt_len > MAX_PROMPT or prompt_len + output_len > limit:
        return "too long"
    return None
