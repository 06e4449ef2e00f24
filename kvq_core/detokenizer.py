"""Text of an answer while its tokens arrive: whole characters only, and nothing past a stop string."""

from typing import Any

from kvq_core.engine.request import RequestOutput

INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one request.

    `push` returns what may be shown. Held back are characters whose bytes are not complete, and text that may
    turn out to be the beginning of a stop string; `finish` returns it when no more tokens come. The pieces
    together are `tokenizer.decode` of all tokens, up to the first stop string.
    Without a tokenizer all text is empty.
    """

    def __init__(self, tokenizer: Any | None, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._shown = 0
        """Tokens whose text was taken."""
        self._context = 0
        """Where decoding starts: text of a token depends on the tokens just before it."""
        self._held = ""
        self.stopped = False
        """A stop string was found; its text and all after it are dropped."""

    def push(self, token_ids: list[int]) -> str:
        """New tokens in, new text out."""
        if self._tokenizer is None:
            return ""
        text = ""
        # One by one, so that a stop string is found at the same token in any batching.
        for token in token_ids:
            if self.stopped:
                break
            self._ids.append(token)
            text += self._release(self._decode(final=False))
        return text

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self._tokenizer is None or self.stopped:
            return ""
        text = self._release(self._decode(final=True))
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def take(self, output: RequestOutput, ends: set[int]) -> tuple[str, str | None]:
        """New text of an output, and why the answer ended, if it did; tokens in `ends` have no text."""
        ids = output.token_ids
        if output.finish_reason == "stop" and ids and ids[-1] in ends:
            ids = ids[:-1]
        new = self.push(ids)
        if self.stopped:
            return new, "stop"
        if output.finished:
            new += self.finish()
            return new, "stop" if self.stopped else output.finish_reason
        return new, None

    def _decode(self, final: bool) -> str:
        """Text of the tokens not yet taken; empty while their last character is incomplete."""
        if self._shown == len(self._ids):
            return ""
        before = self._text(self._ids[self._context : self._shown])
        now = self._text(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith(INCOMPLETE) and not final):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _text(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str) -> str:
        """The part of held and new text that no stop string can take back."""
        held = self._held + text
        found = [(held.find(s) + len(s), held.find(s)) for s in self._stop if s in held]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, s) for s in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
