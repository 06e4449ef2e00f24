"""The HTTP application: routes, the API key, limits."""

import asyncio
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvq_core.config import ServerConfig
from kvq_core.errors import KvqError
from kvq_core.prompts import Prompt, encode
from kvq_core.server.answers import Answers
from kvq_core.server.async_engine import AsyncEngine, Generation, Sequence
from kvq_core.server.errors import ApiError, internal_error
from kvq_core.server.openapi import description
from kvq_core.server.protocol import ChatRequest, CompletionRequest, GenerationRequest, parse

DRAIN_SECONDS = 5.0
"""How long a body that is too large is read and dropped, so that its sender sees the answer."""


def make_app(engine: AsyncEngine, name: str, config: ServerConfig) -> FastAPI:
    """The application for an engine that has been started; `name` is what clients call the model."""
    app = FastAPI(title="kvq", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_key=config.api_key, max_body=config.max_body)
    service = Service(engine, name)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        return respond(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        return respond(internal_error())

    @app.get("/openapi.json")
    async def openapi() -> Any:
        return description()

    @app.get("/health")
    async def health() -> Response:
        refusal = engine.refusal and engine.refusal()
        return respond(refusal) if refusal else JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(
            engine.metrics.render(engine.load, engine.engine.fidelity), media_type=CONTENT_TYPE_LATEST
        )

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Any:
        service.check_model(model)
        return service.describe()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await request.body())
        return await service.answer(request, asked, asked.prompt, "prompt")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await request.body())
        messages: Prompt = [message.plain() for message in asked.messages]
        return await service.answer(request, asked, [messages], "messages")

    return app


class Service:
    """Turns checked requests into responses."""

    def __init__(self, engine: AsyncEngine, name: str) -> None:
        self.engine = engine
        self.model = engine.engine.model
        self.name = name
        self._started = int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def describe(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        core = self.engine.engine
        return {
            "id": self.name,
            "object": "model",
            "created": self._started,
            "owned_by": "kvq",
            "max_model_len": core.plan.max_request_tokens,
            "policy": core.plan.policy.label,
        }

    def check_model(self, name: str) -> None:
        """`ApiError` (404) for a model that is not the one served."""
        if name != self.name:
            raise ApiError(
                404,
                f"there is no model `{name}` here; this server has `{self.name}`",
                param="model",
                code="model_not_found",
            )

    async def answer(
        self, request: Request, asked: GenerationRequest, prompts: list[Prompt], param: str
    ) -> Response:
        """Generate; `param` names the field of the prompts in errors."""
        self.check_model(asked.model)
        if asked.logprobs_asked is not None and self.model.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer to name tokens with", param="logprobs")
        if asked.stop and self.model.tokenizer is None:
            raise ApiError(
                400, "the model has no tokenizer for stop strings; use `stop_token_ids`", param="stop"
            )
        sequences: list[Sequence] = []
        prompt_tokens = 0
        for prompt in prompts:
            ids, room = await self._encode(prompt, param)
            prompt_tokens += len(ids)
            sequences += [Sequence(ids, asked.sampling(room, choice)) for choice in range(asked.choices)]
        generation = self.engine.generate(sequences)
        answers = Answers(self.model, asked, prompt_tokens, sequences, generation)
        if asked.stream:
            return EventStream(answers, generation)
        try:
            return await _unless_gone(request, answers)
        finally:
            generation.close()

    async def _encode(self, prompt: Prompt, param: str) -> tuple[list[int], int]:
        """Token ids of a prompt, and how many tokens its answer can have."""
        loop = asyncio.get_running_loop()
        try:
            ids = await loop.run_in_executor(self._tokenizing, encode, self.model, prompt)
            return ids, self.engine.engine.check_prompt(ids)
        except KvqError as error:
            raise ApiError.of(error, param) from error


class EventStream(StreamingResponse):
    """Server-sent events; however they end, nothing of the generation is left."""

    def __init__(self, answers: Answers, generation: Generation) -> None:
        super().__init__(
            answers.events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


class Gate:
    """Lets a request in with the right API key, and with its whole body, if that is not too large."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int) -> None:
        self._app = app
        self._key = api_key.encode() if api_key else None
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._app(scope, receive, send)
        try:
            self._check_key(dict(scope["headers"]).get(b"authorization", b""))
            body = await self._read(receive)
        except ApiError as error:
            return await respond(error)(scope, receive, send)
        if body is None:
            return None  # the client hung up
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, replay, send)

    def _check_key(self, header: bytes) -> None:
        scheme, _, key = header.partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else b""
        if self._key is not None and not secrets.compare_digest(given, self._key):
            raise ApiError(
                401,
                "the API key is wrong or missing; send it as `Authorization: Bearer …`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where the client hangs up. One that is too large is read to its end and dropped."""
        body, size = bytearray(), 0
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as timeout:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= self._max_body:
                        body += chunk
                    elif timeout.when() is None:
                        timeout.reschedule(asyncio.get_running_loop().time() + DRAIN_SECONDS)
                    if not message.get("more_body"):
                        break
        if size > self._max_body:
            raise ApiError(413, f"the body is larger than {self._max_body:,} bytes", code="request_too_large")
        return bytes(body)


def respond(error: ApiError) -> Response:
    """An error as an HTTP response."""
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _unless_gone(request: Request, answers: Answers) -> Response:
    """The whole response, or an empty one as soon as nobody waits for it any more."""
    whole = asyncio.create_task(answers.whole())
    gone = asyncio.create_task(_drop(request.receive))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(whole.result()) if whole.done() else Response(status_code=499)
    finally:
        whole.cancel()
        gone.cancel()


async def _drop(receive: Receive) -> None:
    """Read messages until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
