"""What clients send: OpenAI's fields, checked. What kvq can't do is refused, not ignored."""

import json
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from kvq_core.config import SamplingParams
from kvq_core.errors import KvqError
from kvq_core.prompts import Prompt, as_prompts
from kvq_core.server.errors import ApiError

IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
"""Fields that don't change an answer."""
NEUTRAL: dict[str, list[Any]] = {
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0, 0.0],
    "logit_bias": [{}],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "audio": [],
    "prediction": [],
    "reasoning_effort": [],
    "verbosity": [],
    "web_search_options": [],
}
"""Fields that are not supported -> values, beside null, that ask for nothing."""
MOST_LOGPROBS = 20
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
PROMPT = {"anyOf": [{"type": "string"}, TEXTS, IDS, {"type": "array", "items": IDS, "minItems": 1}]}
EXTENSIONS = "top_k, stop_token_ids, ignore_eos, return_token_ids"


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against eavesdroppers, which there is none of here."""


class GenerationRequest(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    default_max_tokens: ClassVar[int | None] = None
    """None: as many as there is room for."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Any = None
    # Extensions, named as other servers name them
    top_k: Annotated[int, Field(ge=-1)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name in NEUTRAL.keys() & fields.keys():
            value = fields[name]
            if value is not None and not any(value == v and type(value) is type(v) for v in NEUTRAL[name]):
                raise ApiError(400, f"`{name}` is not supported", param=name, code="unsupported_parameter")
        return {name: value for name, value in fields.items() if name not in NEUTRAL and name not in IGNORED}

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > 16:
            raise ValueError("at most 16 stop strings")
        return stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "`stream_options` needs `stream`: true", param="stream_options")
        return self

    @property
    def choices(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def tokens_asked(self) -> int | None:
        """The most tokens that the client asks for, where it says so."""
        return self.max_tokens

    @property
    def logprobs_asked(self) -> int | None:
        """How many of the likeliest tokens come with each; None: no logprobs at all."""
        return self.logprobs

    def sampling(self, room: int, choice: int) -> SamplingParams:
        """How one of the choices is sampled, where there is room for `room` tokens.

        Raises `ApiError` where more are asked for. Each choice has a seed of its own.
        """
        asked = self.tokens_asked
        if asked is not None and asked > room:
            raise ApiError(
                400,
                f"{asked} tokens are asked for, and the context has room for {room} after this prompt; "
                "shorten the prompt or ask for fewer",
                param="max_tokens",
                code="context_length_exceeded",
            )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_new_tokens=asked or min(room, self.default_max_tokens or room),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed + choice,
            stop=tuple(text for text in stop if text),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs_asked,
        )


class CompletionRequest(GenerationRequest):
    """The body of `/v1/completions`."""

    default_max_tokens = 16

    prompt: Annotated[Any, WithJsonSchema(PROMPT)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @field_validator("prompt")
    @classmethod
    def _is_a_prompt(cls, prompt: Any) -> list[Prompt]:
        try:
            prompts, _ = as_prompts(prompt)
        except KvqError as error:
            raise ValueError(error.message) from error
        for one in prompts:
            if isinstance(one, list) and isinstance(one[0], dict):
                raise ValueError("chat messages go to /v1/chat/completions")
        return prompts


class TextPart(BaseModel):
    """One part of a message's content; only text is supported."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        for part in parts:
            if isinstance(part, dict) and part.get("type") not in (None, "text"):
                raise ValueError(f"a part of type {part['type']!r}; only text is supported")
        return content

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "`top_logprobs` needs `logprobs`: true", param="top_logprobs")
        return self

    @property
    def logprobs_asked(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def tokens_asked(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


R = TypeVar("R", bound=GenerationRequest)


def parse(kind: type[R], body: bytes) -> R:
    """The request in a body; raises `ApiError` that names the field."""
    try:
        document = json.loads(body)
        # JSON can spell half a surrogate pair, which no tokenizer takes; encoding fails on one.
        json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _first(error) from error


def _first(error: ValidationError) -> ApiError:
    """The first thing wrong, as OpenAI would say it."""
    wrong = error.errors(include_url=False, include_input=False)[0]
    where = [str(part) for part in wrong["loc"]]
    while len(where) > 1 and ("[" in where[-1] or where[-1] in ("str", "int", "float", "bool", "dict")):
        where.pop()  # which of several types it was tried for
    param = where[0] if where else None
    if wrong["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"unknown field `{param}`; beside OpenAI's fields there are {EXTENSIONS}",
            param=param,
            code="unknown_parameter",
        )
    if wrong["type"] == "missing":
        return ApiError(
            400, f"`{'.'.join(where)}` is missing", param=param, code="missing_required_parameter"
        )
    message = wrong["msg"].removeprefix("Value error, ")
    return ApiError(400, f"`{'.'.join(where)}`: {message}" if where else f"the body: {message}", param=param)
