"""OpenAI's own client against the server: every endpoint, whole and streamed; the same tokens as offline."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from kvq_core import EngineConfig, Pipeline, pipeline
from kvq_core.models import LoadedModel

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24}
IDS = {"ignore_eos": True, "return_token_ids": True}
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why is the sky blue?"}]
LONG = "A prompt that is longer than one chunk of thirty-two tokens, by far."


@pytest.fixture
def client(serve: Callable[..., Any]) -> Iterator[OpenAI]:
    running = serve()
    with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    assert running.is_clean()


@pytest.fixture
def pipe(model: LoadedModel) -> Iterator[Pipeline]:
    config = EngineConfig(page_size=16, max_num_seqs=4, prefill_chunk=32, kv_memory=4 << 20)
    with pipeline(model, config) as pipe:
        yield pipe


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "kvq"


def test_completion(client: OpenAI, pipe: Pipeline) -> None:
    expected = pipe("Hello", max_new_tokens=24)
    answer = client.completions.create(prompt="Hello", **GREEDY)
    assert answer.object == "text_completion" and answer.model == "tiny"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (
        expected.text,
        expected.finish_reason,
    )
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == 5 + len(expected.token_ids)


def test_streamed_completion(client: OpenAI, pipe: Pipeline) -> None:
    expected = pipe("Hello", max_new_tokens=24, ignore_eos=True)
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": IDS}
    *chunks, last = client.completions.create(prompt="Hello", **GREEDY, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert [i for chunk in chunks for i in chunk.choices[0].token_ids] == expected.token_ids
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 23 + ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks)


def test_chat(client: OpenAI, pipe: Pipeline) -> None:
    expected = pipe(MESSAGES, max_new_tokens=24)
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.input_len


def test_streamed_chat(client: OpenAI, pipe: Pipeline) -> None:
    expected = pipe(MESSAGES, max_new_tokens=24)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    chunks = list(client.chat.completions.create(messages=parts, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected.text
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def cached_tokens(answer: Any) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("policy", [0, 42])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["caching", "no-caching"])
def test_the_same_tokens_as_offline(
    serve: Any, model: LoadedModel, policy: int, prefix_caching: bool
) -> None:
    running = serve(policy=policy, prefix_caching=prefix_caching)
    config = EngineConfig(
        policy=policy, page_size=16, max_num_seqs=4, prefill_chunk=32, kv_memory=4 << 20, dtype="float32"
    )
    prompts = [LONG, "Hi", LONG[:33], "Shanghai is"]
    assert len(LONG) > 64
    with pipeline(model, config) as pipe:
        expected = [pipe(prompt, max_new_tokens=40, ignore_eos=True).token_ids for prompt in prompts]
    with OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        asked = GREEDY | {"max_tokens": 40, "extra_body": IDS}
        answer = client.completions.create(prompt=prompts, **asked)
        assert [choice.token_ids for choice in answer.choices] == expected
        assert cached_tokens(answer) == (32 if prefix_caching else 0), "LONG[:33] begins like LONG"
        streamed: list[list[int]] = [[] for _ in prompts]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = client.completions.create(prompt=prompts, **options, **asked)
        for chunk in chunks:
            streamed[chunk.choices[0].index] += chunk.choices[0].token_ids
        assert streamed == expected
        assert cached_tokens(last) == (64 + 32 if prefix_caching else 0), "whole chunks but the last token"
    assert running.is_clean()


def test_prompts_of_every_kind(client: OpenAI) -> None:
    ids = [40, 41, 42]
    options = GREEDY | {"extra_body": IDS}
    one = client.completions.create(prompt=ids, **options)
    two = client.completions.create(prompt=[ids, ids[:2]], **options)
    assert two.choices[0].token_ids == one.choices[0].token_ids
    assert one.usage.prompt_tokens == 3 and two.usage.prompt_tokens == 5
    texts = client.completions.create(prompt=["Hi", "Ho"], **GREEDY)
    assert texts.choices[1].text == client.completions.create(prompt="Ho", **GREEDY).choices[0].text


def test_several_choices_with_a_seed(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 12,
        "seed": 7,
        "temperature": 1,
        "extra_body": IDS,
    }
    first, again = (client.completions.create(prompt=["Hi", "Ho"], n=3, **asked) for _ in range(2))
    ids = [choice.token_ids for choice in first.choices]
    assert [choice.index for choice in first.choices] == list(range(6))
    assert ids == [choice.token_ids for choice in again.choices]
    assert len(set(map(tuple, ids))) == 6
    assert first.usage.prompt_tokens == 4 and first.usage.completion_tokens == 72
    narrow = client.completions.create(prompt="Hi", **asked | {"extra_body": IDS | {"top_k": 1}})
    greedy = client.completions.create(prompt="Hi", **asked | {"temperature": 0})
    sharp = client.completions.create(prompt="Hi", top_p=1e-6, **asked)
    assert narrow.choices[0].token_ids == greedy.choices[0].token_ids == sharp.choices[0].token_ids


def test_stop_strings(client: OpenAI, pipe: Pipeline) -> None:
    whole = pipe("Hi", max_new_tokens=24, ignore_eos=True).text
    stop = whole[10:12]
    cut = whole[: whole.index(stop)]
    answer = client.completions.create(prompt="Hi", stop=[stop, "never"], extra_body=IDS, **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    assert answer.usage.completion_tokens < 24
    chunks = list(client.completions.create(prompt="Hi", stop=stop, stream=True, extra_body=IDS, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_how_many_tokens(client: OpenAI) -> None:
    """Completions give 16 where nothing is said, chats what there is room for."""
    answer = client.completions.create(model="tiny", prompt="Hi", extra_body=IDS)
    assert answer.usage.completion_tokens == 16
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=IDS)
    assert chat.usage.total_tokens == 256
    some = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=3, extra_body=IDS
    )
    assert some.usage.completion_tokens == 3


def test_metrics(serve: Any) -> None:
    running = serve()
    body = {"model": "tiny", "prompt": ["Hello", "Ho"], "max_tokens": 8, "ignore_eos": True}
    httpx.post(f"{running.url}/v1/completions", json=body).raise_for_status()
    text = httpx.get(f"{running.url}/metrics").text
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line[0] != "#"
    }
    assert values["kvq_prompt_tokens_total"] == 7
    assert values["kvq_generated_tokens_total"] == 16
    assert values['kvq_requests_total{reason="length"}'] == 2
    assert values["kvq_time_to_first_token_seconds_count"] == 2
    assert values["kvq_inter_token_latency_seconds_count"] == 14
    assert values["kvq_kv_pages"] == running.engine.kv_stats()["pages"]
    for name in ("requests_running", "requests_waiting", "kv_pages_used", "preemptions_total"):
        assert values[f"kvq_{name}"] == 0
    assert values["kvq_fidelity_steps"] == 0 and 'kvq_fidelity_error{layer="0"}' not in values


def test_metrics_of_the_prefix_cache(serve: Any) -> None:
    running = serve()
    for _ in range(2):
        body = {"model": "tiny", "prompt": LONG, "max_tokens": 1}
        httpx.post(f"{running.url}/v1/completions", json=body).raise_for_status()
    lines = httpx.get(f"{running.url}/metrics").text.splitlines()
    assert f"kvq_prefix_cache_prompt_tokens_total {2 * len(LONG):.1f}" in lines
    assert "kvq_prefix_cache_hit_tokens_total 64.0" in lines
    assert "kvq_kv_pages_cached 4.0" in lines and "kvq_kv_pages_used 0.0" in lines


def test_metrics_tell_of_fidelity(serve: Any) -> None:
    running = serve(policy=42, fidelity=1.0)
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "ignore_eos": True}
    httpx.post(f"{running.url}/v1/completions", json=body).raise_for_status()
    text = httpx.get(f"{running.url}/metrics").text
    assert "kvq_fidelity_steps 7.0" in text and "kvq_fidelity_jumps 0.0" in text
    errors = [line.split() for line in text.splitlines() if line.startswith("kvq_fidelity_error{")]
    assert len(errors) == 2 and all(0 < float(value) < 1 for _, value in errors)
