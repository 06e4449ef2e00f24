"""Errors as clients see them: an HTTP status, and OpenAI's body."""

from typing import Any

from kvq_core.errors import KvqError, PromptTooLong


class ApiError(Exception):
    """What a client did wrong, or what the server can't do now."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": type, "param": param, "code": code}
        }

    @classmethod
    def of(cls, error: KvqError, param: str | None = None) -> "ApiError":
        """A prompt that the tokenizer, the chat template or the engine refuses."""
        message = f"{error.message}; {error.hint}" if error.hint else error.message
        code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
        return cls(400, message, param=param, code=code)


def queue_full(limit: int) -> ApiError:
    """429: `limit` requests run and wait already."""
    return ApiError(
        429,
        f"the server is busy: it takes {limit} requests at a time, and all are taken; try again later",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def shutting_down() -> ApiError:
    """503: a signal has come."""
    return ApiError(
        503,
        "the server is shutting down",
        type="server_error",
        code="shutting_down",
        headers={"Retry-After": "5"},
    )


def engine_died(status: int = 503) -> ApiError:
    """503 for a new request, 500 for one that was under way."""
    return ApiError(
        status,
        "the engine died, and the server has to be started again; its log has the reason",
        type="server_error",
        code="engine_died",
    )


def internal_error() -> ApiError:
    """500: a fault of ours."""
    return ApiError(500, "a fault of the server; its log has the reason", type="server_error")
