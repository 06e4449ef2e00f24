"""Logprobs against a direct forward pass, through OpenAI's client, in both of OpenAI's shapes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from kvq_core import EngineConfig, pipeline
from kvq_core.engine import runner
from kvq_core.models import LoadedModel
from kvq_core.server.logprobs import name

ASK: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 12,
    "seed": 3,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}
PROMPT = "A prompt that is longer than one chunk of thirty-two tokens."
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture
def client(serve: Any) -> Iterator[OpenAI]:
    running = serve()
    with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    assert running.is_clean()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def expected(reference: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities [len(answer), V] of every token at every position of the answer."""
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def likeliest(row: torch.Tensor, count: int) -> list[tuple[int, float]]:
    values, ids = row.topk(count)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_completions(client: OpenAI, model: LoadedModel, reference: Any, temperature: float) -> None:
    tokenizer: Any = model.tokenizer
    answer = client.completions.create(prompt=PROMPT, logprobs=3, temperature=temperature, **ASK)
    choice, ids = answer.choices[0], answer.choices[0].token_ids
    rows = expected(reference, tokenizer(PROMPT).input_ids, ids)
    found = choice.logprobs
    assert found.token_logprobs == pytest.approx([rows[i, t].item() for i, t in enumerate(ids)], abs=1e-4)
    assert found.tokens == [name(tokenizer, t)[0] for t in ids]
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(12)]
    for row, token, top in zip(rows, ids, found.top_logprobs, strict=True):
        best = likeliest(row, 3)
        wanted = {name(tokenizer, t)[0] for t, _ in best} | {name(tokenizer, token)[0]}
        assert set(top) == wanted
    *chunks, _ = client.completions.create(
        prompt=PROMPT,
        logprobs=3,
        temperature=temperature,
        stream=True,
        stream_options={"include_usage": True},
        **ASK,
    )
    for part in ("token_logprobs", "tokens", "text_offset", "top_logprobs"):
        assert [x for c in chunks for x in getattr(c.choices[0].logprobs, part)] == getattr(found, part)


def test_chats(client: OpenAI, model: LoadedModel, reference: Any) -> None:
    tokenizer: Any = model.tokenizer
    ask = ASK | {"messages": MESSAGES, "logprobs": True, "temperature": 0}
    answer = client.chat.completions.create(top_logprobs=2, **ask)
    ids = answer.choices[0].token_ids
    prompt = tokenizer(tokenizer.apply_chat_template(MESSAGES, tokenize=False)).input_ids
    rows = expected(reference, prompt, ids)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12 and answer.choices[0].logprobs.refusal is None
    for row, token, entry in zip(rows, ids, content, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert (entry.token, bytes(entry.bytes)) == name(tokenizer, token)
        best = likeliest(row, 2)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([v for _, v in best], abs=1e-4)
        assert [bytes(top.bytes) for top in entry.top_logprobs] == [name(tokenizer, t)[1] for t, _ in best]
        assert entry.top_logprobs[0].token == entry.token, "greedy"
    text = answer.choices[0].message.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == text
    chunks = list(client.chat.completions.create(top_logprobs=2, stream=True, **ask))
    streamed = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    # the prompt's first chunks are cached now, and products of another shape round differently
    assert [x.logprob for x in streamed] == pytest.approx([x.logprob for x in content], abs=1e-4)
    plain = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [e.logprob for e in plain] == [e.logprob for e in streamed] and plain[0].top_logprobs == []


def test_a_token_that_ends_an_answer_has_no_text_and_no_entry(client: OpenAI, model: LoadedModel) -> None:
    ask = ASK | {"prompt": ["Hi", "Ho"], "n": 2, "temperature": 2, "logprobs": 0}
    ids = client.completions.create(**ask).choices[2].token_ids
    ask["extra_body"] = ask["extra_body"] | {"stop_token_ids": [ids[5]]}
    choices = client.completions.create(**ask).choices
    assert [choice.finish_reason for choice in choices].count("stop") >= 1
    for choice in choices:
        texts = [name(model.tokenizer, t)[0] for t in choice.token_ids if t != ids[5]]
        assert choice.logprobs.tokens == texts
        assert [list(top) for top in choice.logprobs.top_logprobs] == [[text] for text in texts]


@pytest.mark.parametrize("policy", [0, 42])
def test_the_same_logprobs_offline_and_nothing_computed_for_others(
    model: LoadedModel, policy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    compute = runner.log_probabilities

    def spy(logits: torch.Tensor, tokens: torch.Tensor, most: int) -> Any:
        rows.append((logits.shape[0], most))
        return compute(logits, tokens, most)

    monkeypatch.setattr(runner, "log_probabilities", spy)
    config = EngineConfig(policy=policy, page_size=16, max_num_seqs=4, kv_memory=4 << 20)
    with pipeline(model, config) as pipe:
        plain = pipe(["Hi", "Ho"], max_new_tokens=5, ignore_eos=True)
        assert rows == [] and plain[0].logprobs is None
        engine, params = pipe.engine, {"max_new_tokens": 5, "ignore_eos": True}
        scored = pipe("Hi", logprobs=2, **params)
        assert rows == [(1, 2)] * 5 and len(scored.logprobs) == 5
        assert all(known.top[0][1] == known.logprob and len(known.top) == 2 for known in scored.logprobs)
        assert scored.token_ids == plain[0].token_ids
        assert len(pipe("Hi", logprobs=999, **params).logprobs[0].top) == 260
        assert not engine.has_work


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("completions", {"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ("completions", {"logprobs": True}, "logprobs", "integer"),
        ("chat/completions", {"logprobs": 1}, "logprobs", "boolean"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ],
)
def test_mistakes(serve: Any, path: str, fields: Any, param: str, message: str) -> None:
    body = {"model": "tiny", "max_tokens": 1} | fields
    body |= {"messages": MESSAGES} if "chat" in path else {"prompt": "Hi"}
    response = httpx.post(f"{serve().url}/v1/{path}", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param and message in response.json()["error"]["message"]
