"""Logprobs in OpenAI's two shapes."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from kvq_core.detokenizer import INCOMPLETE
from kvq_core.engine.logprobs import TokenLogprob

Scored = tuple[int, TokenLogprob]
"""A token and what is known of it."""


def chat_logprobs(tokenizer: Any, scored: Sequence[Scored]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = name(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    content = [
        entry(token, known.logprob) | {"top_logprobs": [entry(*other) for other in known.top]}
        for token, known in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Any, scored: Sequence[Scored], offset: int) -> dict[str, Any]:
    """The `logprobs` of a choice of a completion; `offset` is how much text precedes, in characters."""
    texts = [name(tokenizer, token)[0] for token, _ in scored]
    offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
    top = [
        {
            name(tokenizer, other)[0]: logprob
            for other, logprob in [*reversed(known.top), (token, known.logprob)]
        }
        for token, known in scored
    ]
    return {
        "tokens": texts,
        "token_logprobs": [known.logprob for _, known in scored],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def name(tokenizer: Any, token: int) -> tuple[str, bytes]:
    """A token's text, in the middle of a sentence, and its bytes, which may be part of a character alone."""
    once = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if INCOMPLETE in once:
        return once, _bytes(tokenizer.convert_ids_to_tokens(token)) or once.encode()
    # Some tokenizers drop a space at the start of a text
    twice = tokenizer.decode([token, token], clean_up_tokenization_spaces=False)
    text = twice[len(once) :]
    return text, text.encode()


def _bytes(piece: str) -> bytes:
    """The bytes that a piece of the vocabulary stands for; none where it can't be told."""
    if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    try:
        return bytes(_byte_of()[letter] for letter in piece)
    except KeyError:
        return b""


@cache
def _byte_of() -> dict[str, int]:
    """How byte-level vocabularies spell bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
