"""The Python API on a tiny random model and the real tokenizer format; and text while tokens arrive."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kvq_core import EngineConfig, KvqError, Pipeline, Response, SamplingParams, pipeline
from kvq_core.detokenizer import Detokenizer
from kvq_core.errors import UsageError
from kvq_core.models import LoadedModel, load_model
from kvq_core.prompts import as_prompts
from tests.tiny import TEMPLATE, byte_tokenizer, save_tiny

VOCAB = 260


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("model"), vocab_size=VOCAB, max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bare(folder: Path) -> LoadedModel:
    """A model without a tokenizer."""
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def model(folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    full = tmp_path_factory.mktemp("full")
    for file in folder.iterdir():
        (full / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(full)
    return load_model(str(full), device="cpu")


CONFIG = EngineConfig(page_size=16, max_num_seqs=4, prefill_chunk=32, kv_memory=4 << 20)


@pytest.fixture
def pipe(model: LoadedModel) -> Iterator[Pipeline]:
    with pipeline(model, CONFIG) as pipe:
        yield pipe
        engine = pipe.engine
        assert not engine.has_work and engine.kv_stats()["tokens"] == 0, "a request was left behind"


def join(deltas: list[Response], index: int = 0) -> tuple[str, list[int]]:
    mine = [d for d in deltas if d.index == index]
    assert all(d.finish_reason is None for d in mine[:-1]) and mine[-1].finish_reason
    return "".join(d.text for d in mine), [i for d in mine for i in d.token_ids]


def test_the_name_works_however_it_is_imported() -> None:
    code = "from kvq_core.pipeline import Pipeline; from kvq_core import pipeline; pipeline('./nowhere')"
    for order in (
        code,
        code.replace("from kvq_core.pipeline import Pipeline; ", "from kvq_core import pipeline;"),
    ):
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", order], capture_output=True, text=True, env={**os.environ, **path}
        )
        assert "KvqError: there is no model at './nowhere'" in done.stderr


# Prompts and responses


def test_one_prompt_gives_one_response_and_a_list_a_list(pipe: Pipeline) -> None:
    single = pipe("Hi", max_new_tokens=5, ignore_eos=True)
    several = pipe(["Hi", "Shanghai is"], max_new_tokens=5, ignore_eos=True)
    assert isinstance(single, Response) and isinstance(several, list)
    assert (single.input_len, single.index, single.finish_reason) == (2, 0, "length")
    assert [r.index for r in several] == [0, 1] and [r.input_len for r in several] == [2, 11]
    assert all(len(r.token_ids) == 5 for r in several)
    assert several[0].token_ids == single.token_ids


def test_strings_token_ids_and_arrays_are_the_same_prompt(pipe: Pipeline, tokenizer: Any) -> None:
    ids = tokenizer("Hello")["input_ids"]
    prompts = [ids, tuple(ids), torch.tensor(ids), torch.tensor(ids).numpy(), "Hello"]
    answers = [pipe(prompt, max_new_tokens=6, ignore_eos=True).token_ids for prompt in prompts]
    assert all(answer == answers[0] for answer in answers)
    mixed = pipe([ids, "Hello"], max_new_tokens=6, ignore_eos=True)
    assert [r.token_ids for r in mixed] == [answers[0], answers[0]]


def test_chat_messages_use_the_template(pipe: Pipeline) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    chat = pipe(messages, max_new_tokens=4, ignore_eos=True)
    text = pipe("<system>Be kind.<user>Hi<answer>", max_new_tokens=4, ignore_eos=True)
    assert (chat.token_ids, chat.input_len) == (text.token_ids, text.input_len)
    assert len(pipe([messages, messages], max_new_tokens=2)) == 2


def test_a_model_without_a_tokenizer_takes_token_ids(bare: LoadedModel) -> None:
    with pipeline(bare, CONFIG) as pipe:
        response = pipe([1, 2, 3], max_new_tokens=4, ignore_eos=True)
        assert response.text == "" and len(response.token_ids) == 4
        for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
            with pytest.raises(KvqError, match="no tokenizer") as caught:
                pipe(prompt)
            assert "token ids" in caught.value.hint
        with pytest.raises(KvqError, match="no tokenizer for stop strings"):
            pipe([1, 2, 3], stop=["x"])


@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_by_name(folder: Path, kind: Callable[[Path], str | Path]) -> None:
    with pipeline(kind(folder), CONFIG.replace(policy=8, dtype="float64", device="cpu")) as pipe:
        assert pipe.config.dtype == "float64"
        assert pipe.config.resolved_policy().name == "int8"
        assert len(pipe([5, 6], max_new_tokens=3, ignore_eos=True).token_ids) == 3


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "list is empty"),
        (None, "type NoneType"),
        (3, "type int"),
        ({"role": "user"}, "type dict"),
        ([[]], "prompt 0 is empty"),
        ([[1, 2], []], "prompt 1 is empty"),
        (["Hi", 3], "prompt 1 is not a prompt"),
        ([1, "Hi"], "prompt 0 is not a prompt"),
        ([[1.5, 2.0]], "prompt 0 is not a prompt"),
        ([True, False], "prompt 0 is not a prompt"),
        ([None], "prompt 0 is not a prompt"),
    ],
)
def test_bad_prompts(prompts: Any, message: str) -> None:
    with pytest.raises(KvqError, match=message) as caught:
        as_prompts(prompts)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt is empty"),
        ("half a pair \ud800", "not valid Unicode"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([0, VOCAB], "outside"),
        ([-1], "outside"),
        (["fine", "x" * 256], "too long"),
        ([[{"role": "user"}], [1, 2]], None),
        ([[{"content": "x"}]], None),
    ],
)
def test_prompts_that_do_not_fit_leave_nothing_behind(
    pipe: Pipeline, prompts: Any, message: str | None
) -> None:
    if message is None:
        pipe(prompts, max_new_tokens=1)  # templates render what is missing as nothing
        return
    with pytest.raises(KvqError, match=message):
        pipe(prompts)


def test_a_template_that_refuses(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pipe.model.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(KvqError, match="roles must alternate"):
        pipe([{"role": "user", "content": "Hi"}])
    monkeypatch.setattr(pipe.model.tokenizer, "chat_template", None)
    with pytest.raises(KvqError, match="no chat template"):
        pipe([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 3}, "unknown sampling option"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2.5}, "whole number, got 2.5"),
        ({"max_new_tokens": "3"}, "whole number, got '3'"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_bad_options(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe("Hi", **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_memory": "1GiB"}, "kv_memory must be a whole number, got '1GiB'"),
        ({"page_size": 64.0}, "page_size must be a whole number"),
        ({"load_format": "random"}, "load_format must be auto or dummy"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineConfig(**settings)


def test_options_override_params(pipe: Pipeline) -> None:
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    assert len(pipe("Hi", params).token_ids) == 9
    assert len(pipe("Hi", params=params, max_new_tokens=4, temperature=None).token_ids) == 4


def test_a_seed_of_numpy_is_a_seed(pipe: Pipeline) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.0, "ignore_eos": True}
    seed = np.int64(2**62 + 1)
    assert pipe("Hi", seed=seed, **options).token_ids == pipe("Hi", seed=int(seed), **options).token_ids


def test_a_stop_string_alone_is_not_its_letters(pipe: Pipeline) -> None:
    one: Any = "END"
    several: Any = ["a", "b"]
    assert SamplingParams(stop=one).stop == ("END",)
    assert SamplingParams(stop=several).stop == ("a", "b")
    text = pipe("Hi", max_new_tokens=30, ignore_eos=True).text
    missing: Any = text[:3] + "\0"
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, stop=missing)
    assert pipe("Hi", params).text == text


def test_sampling_with_a_seed_repeats(pipe: Pipeline) -> None:
    first, second = (
        pipe(["Hi", "Ho"], max_new_tokens=12, temperature=1.0, seed=7, ignore_eos=True) for _ in range(2)
    )
    other = pipe(["Hi", "Ho"], max_new_tokens=12, temperature=1.0, seed=8, ignore_eos=True)
    assert [r.token_ids for r in first] == [r.token_ids for r in second] != [r.token_ids for r in other]


# Streaming


def test_a_stream_adds_up_to_the_answer(pipe: Pipeline) -> None:
    prompts = ["Hi", "Shanghai is", "x" * 70]
    whole = pipe(prompts, max_new_tokens=20, ignore_eos=True)
    deltas = list(pipe.stream_infer(prompts, max_new_tokens=20, ignore_eos=True))
    for response in whole:
        assert join(deltas, response.index) == (response.text, response.token_ids)
    first_three = {d.index for d in deltas[:6]}
    assert len(first_three) > 1, "prompts of one call run together"


def test_closing_a_stream_cancels_it(pipe: Pipeline) -> None:
    stream = pipe.stream_infer(["Hi", "Ho"], max_new_tokens=100, ignore_eos=True)
    next(stream)
    assert pipe.engine.has_work
    stream.close()
    assert not pipe.engine.has_work
    assert pipe("Hi", max_new_tokens=2, ignore_eos=True).finish_reason == "length"


def test_an_interrupted_stream_cancels_it(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = pipe.stream_infer("Hi", max_new_tokens=100, ignore_eos=True)
    next(stream)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipe.engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert not pipe.engine.has_work


def test_two_streams_at_a_time(pipe: Pipeline) -> None:
    alone = [pipe(p, max_new_tokens=15, ignore_eos=True).token_ids for p in ("Hi", "Shanghai")]
    streams = [pipe.stream_infer(p, max_new_tokens=15, ignore_eos=True) for p in ("Hi", "Shanghai")]
    ids: list[list[int]] = [[], []]
    live = {0, 1}
    while live:
        for i in sorted(live):
            delta = next(streams[i], None)
            if delta is None:
                live.discard(i)
            else:
                ids[i] += delta.token_ids
    assert ids == alone


# Ends


def test_a_stop_string_ends_the_answer_before_it(pipe: Pipeline) -> None:
    whole = pipe("Hi", max_new_tokens=40, ignore_eos=True)
    stop = whole.text[10:13]
    cut = whole.text[: whole.text.index(stop)]
    response = pipe("Hi", max_new_tokens=40, ignore_eos=True, stop=[stop])
    assert (response.text, response.finish_reason) == (cut, "stop")
    assert response.token_ids == whole.token_ids[: len(response.token_ids)]
    assert len(response.token_ids) < 40
    deltas = list(pipe.stream_infer("Hi", max_new_tokens=40, ignore_eos=True, stop=stop))
    assert join(deltas) == (cut, response.token_ids)


def test_the_end_token_is_reported_but_has_no_text(pipe: Pipeline) -> None:
    whole = pipe("Hi", max_new_tokens=20, ignore_eos=True)
    end = whole.token_ids[7]
    first = whole.token_ids.index(end)
    response = pipe("Hi", max_new_tokens=20, ignore_eos=True, stop_token_ids=[end])
    assert response.finish_reason == "stop"
    assert response.token_ids == whole.token_ids[: first + 1]
    assert response.text == pipe("Hi", max_new_tokens=first or 1, ignore_eos=True).text[: len(response.text)]
    assert response.text == pipe.model.tokenizer.decode(whole.token_ids[:first])


# Policies


def test_another_policy_on_the_same_model(pipe: Pipeline) -> None:
    before = pipe("Hi", max_new_tokens=8, ignore_eos=True).token_ids
    size = pipe.kv_stats()["bytes_per_token"]
    pipe.set_policy(4)
    assert pipe.config.resolved_policy().name == "int4"
    assert pipe.kv_stats()["bytes_per_token"] < size / 3
    pipe.set_policy(CONFIG.replace(policy="8", sink=2, recent=16))
    assert pipe.config.resolved_policy().label == "int8+s2r16"
    pipe.set_policy(0)
    assert pipe("Hi", max_new_tokens=8, ignore_eos=True).token_ids == before


def test_a_policy_that_cannot_start_leaves_the_old_one(pipe: Pipeline) -> None:
    with pytest.raises(KvqError):
        pipe.set_policy("never-heard-of")
    with pytest.raises(KvqError):
        pipe.set_policy(CONFIG.replace(policy=8, kv_memory=1))
    assert pipe.config.resolved_policy().name == "none"
    assert pipe("Hi", max_new_tokens=2, ignore_eos=True).finish_reason == "length"


def test_a_new_policy_ends_running_streams(pipe: Pipeline) -> None:
    stream = pipe.stream_infer("Hi", max_new_tokens=100, ignore_eos=True)
    next(stream)
    pipe.set_policy(8)
    assert list(stream) == []


def test_a_closed_pipeline_says_so(model: LoadedModel) -> None:
    pipe = pipeline(model, CONFIG)
    pipe.close()
    pipe.close()
    for use in (lambda: pipe("Hi"), lambda: pipe.set_policy(8)):
        with pytest.raises(KvqError, match="closed"):
            use()


# Text while tokens arrive

SAMPLES = [
    "plain text",
    "naïve café — “quoted”",
    "上海是一座城市",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "a\ufffdb",
    "mixed 上 x 🎉!",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_pieces_add_up_and_hold_whole_characters(tokenizer: Any, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in tokenizer(text)["input_ids"]]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


def test_broken_bytes_come_out_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("ok 上")["input_ids"][:-1]
    detokenizer = Detokenizer(tokenizer)
    pushed = "".join(detokenizer.push([i]) for i in ids)
    assert pushed == "ok "
    assert pushed + detokenizer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_in_any_batching_give_what_decode_gives(tokenizer: Any, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
    detokenizer, text = Detokenizer(tokenizer), ""
    rest = list(ids)
    while rest:
        count = rng.randint(1, 5)
        text += detokenizer.push(rest[:count])
        rest = rest[count:]
    assert text + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("four",), "one two three"),
        ("one two three", ("three", "two"), "one "),
        ("ababac", ("abac",), "ab"),
        ("aaab", ("aab",), "a"),
        ("ends with th", ("the",), "ends with th"),
        ("上海是", ("海",), "上"),
        ("abcd", ("abcd", "bc"), "a"),
        ("x\n\nHuman: y", ("\n\nHuman:",), "x"),
        ("stop", ("stop",), ""),
        ("text", ("",), "text"),
    ],
)
def test_stop_strings(tokenizer: Any, text: str, stop: tuple[str, ...], expected: str) -> None:
    detokenizer, shown = Detokenizer(tokenizer, stop), ""
    for token in tokenizer(text)["input_ids"]:
        shown += detokenizer.push([token])
        assert expected.startswith(shown), "showed text that the stop string takes back"
    assert shown + detokenizer.finish() == expected
    assert detokenizer.stopped == (expected != text)
    at_once = Detokenizer(tokenizer, stop)
    assert at_once.push(tokenizer(text)["input_ids"]) + at_once.finish() == expected


def test_special_tokens_have_no_text(tokenizer: Any) -> None:
    ids = [*tokenizer("a")["input_ids"], tokenizer.eos_token_id, *tokenizer("b")["input_ids"]]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(ids) + detokenizer.finish() == "ab"
