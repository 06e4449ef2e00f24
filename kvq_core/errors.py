"""The one exception type that users see, and the exit codes of the command line."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class KvqError(Exception):
    """A user's mistake or a limit of the machine: what happened, and how to mend it.

    The command line prints `error: <message>` and `hint: <hint>` on stderr and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class PromptTooLong(KvqError):
    """A prompt that leaves no room for a token in the model's context, or in the cache."""


class UsageError(KvqError):
    """A malformed or out-of-range option (exit code 2)."""

    exit_code = 2


class CheckFailed(KvqError):
    """A check that the user asked for did not hold (exit code 3)."""

    exit_code = 3
