"""Where a model's name leads, and what went wrong where it leads nowhere."""

import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from kvq_core.demo import DEMO, demo_folder
from kvq_core.errors import KvqError
from kvq_core.host import is_out_of_memory
from kvq_core.presets import PRESETS, find_preset


@dataclass(frozen=True)
class Source:
    """Where a name leads: what transformers' `from_pretrained` takes."""

    name: str
    path: str
    gguf_file: str | None = None
    local: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained`."""
        extra: dict[str, Any] = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        if not self.local and not hub_reachable():
            extra["local_files_only"] = True  # spares half a minute of retries
        return extra


def resolve(name: str) -> Source:
    """Turn a model's name into files or a hub id; raises `KvqError` for a path that leads nowhere."""
    if name == DEMO:
        return Source(name, str(demo_folder()))
    path = Path(name).expanduser()
    if name and path.is_dir():
        if (path / "config.json").is_file():
            return Source(name, str(path))
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return Source(name, str(path), files[0].name)
        raise KvqError(
            f"the folder {name!r} holds no model: it has no config.json",
            "name the .gguf file" if files else "give a folder as `save_pretrained` writes it",
        )
    if path.is_file():
        if path.suffix == ".gguf":
            return Source(name, str(path.parent), path.name)
        raise KvqError(f"{name!r} is a file, but not a .gguf one", "give a folder, a .gguf file or a hub id")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf"
    if looks_like_path or not name.strip():
        raise KvqError(f"there is no model at {name!r}", "give a folder, a .gguf file, a hub id or `demo`")
    preset = find_preset(name)
    return Source(name, preset.hub_id if preset else name, local=False)


@cache
def hub_reachable() -> bool:
    """False where the hub's name can't be resolved or offline mode is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn what transformers, the hub and safetensors raise into a `KvqError` about `name`."""
    try:
        yield
    except KvqError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            whose = "GPU" if isinstance(error, torch.OutOfMemoryError) else "machine"
            raise KvqError(
                f"the weights of {name!r} do not fit in the {whose}'s memory",
                f"use a smaller model or `--dtype bfloat16`, or a {whose} with more memory",
            ) from error
        raise explain(name, error) from error


def explain(name: str, error: Exception) -> KvqError:
    """What went wrong while `name` was loaded, as an error with a hint."""
    kinds: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    local = name == DEMO or Path(name).expanduser().exists()
    if "GatedRepoError" in kinds:
        return KvqError(f"the model {name!r} is gated", "accept its licence on the hub, then `hf auth login`")
    if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
        return KvqError(
            f"there is no model {name!r} on the hub, and no folder of that name",
            f"check the spelling; presets are {', '.join(PRESETS)}, and `demo` always works",
        )
    lost = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}
    if not local and (kinds & lost or (isinstance(error, OSError | ValueError) and not hub_reachable())):
        return KvqError(
            f"cannot fetch {name!r}: the hub is out of reach, and the model is not in the local cache",
            "check the name and the network; or use a local folder, `--model demo`, or a preset with "
            "`--load-format dummy`",
        )
    first = str(error).strip().splitlines() or [type(error).__name__]
    text = first[0]
    unknown = "model type" in text and "does not recognize" in text
    if unknown or "Unrecognized model" in text:
        return KvqError(
            f"{name!r} is of an architecture that this transformers does not know: {text}",
            "models that bring their own code are not run; a newer transformers may know it",
        )
    kind = "file" if Path(name).expanduser().is_file() else "folder"
    where = f"the {kind} {name!r}" if local else repr(name)
    if not isinstance(error, OSError | ValueError):
        text = f"{type(error).__name__}: {text}"
    return KvqError(
        f"cannot load {where}: {text}",
        "its files may be damaged or incomplete: fetch the model again" if local else "",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and advice from transformers while it loads."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # reading GGUF has a bar of its own
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
