"""Text to measure quality on, cut into windows of tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvq_core.errors import KvqError, UsageError
from kvq_core.models import LoadedModel


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows of a text's tokens, from its start."""

    name: str
    sha256: str
    context_len: int
    ids: Tensor
    """[windows, context_len] int64"""
    available: int
    """Windows that the whole text has."""

    def describe(self) -> dict[str, Any]:
        """The `workload` of a run record."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "context_len": self.context_len,
            "windows": self.ids.shape[0],
            "windows_available": self.available,
            "predicted_tokens": self.ids.shape[0] * (self.context_len - 1),
        }


def read_text(path: Path) -> str:
    """A UTF-8 text file; raises `KvqError` where it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise KvqError(f"cannot read {path}: {error.strerror}", "check `--dataset-path`") from error
    except UnicodeDecodeError as error:
        raise KvqError(f"{path} is not UTF-8 text (byte {error.start})", "convert it to UTF-8") from error
    if not text.strip():
        raise KvqError(f"{path} is empty", "give a text of at least one window of tokens")
    return text


def sample_text() -> tuple[str, str]:
    """The shipped conversations as one text, and its name."""
    from kvq_core.bench.sharegpt import read_sharegpt

    dataset = read_sharegpt(None)
    return "\n\n".join(str(turn) for pair in dataset.pairs for turn in pair), dataset.name


def check_context_len(model: LoadedModel, context_len: int) -> None:
    """Raises `UsageError` where the model takes no windows of so many tokens."""
    longest = model.geometry.max_model_len
    if not 2 <= context_len <= longest:
        raise UsageError(f"--context-len must lie in 2 … {longest} for {model.name}, got {context_len}")


def cut_windows(model: LoadedModel, text: str, name: str, *, context_len: int, limit: int = 0) -> Windows:
    """Tokenize without a beginning-of-text token and cut; `limit` 0 takes all windows.

    A last window that is not full is dropped. Raises `KvqError` for a text shorter than one window.
    """
    check_context_len(model, context_len)
    if model.tokenizer is None:
        raise KvqError(f"{model.name} has no tokenizer", "measure quality with a model that has one")
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    available = len(ids) // context_len
    if not available:
        raise KvqError(
            f"{name} has {len(ids)} tokens, less than one window of {context_len}",
            "give a longer text or a smaller `--context-len`",
        )
    count = min(available, limit) if limit else available
    windows = torch.tensor(ids[: count * context_len]).view(count, context_len)
    return Windows(name, hashlib.sha256(text.encode()).hexdigest(), context_len, windows, available)
