"""Where and with what a run was made: GPU, driver, versions, commit, command, seed, date."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kvq_core

PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenizers")
DISTRIBUTION = "kvq-toolkit"


def collect_env(*, seed: int, device: str = "cpu", command: Sequence[str] | None = None) -> dict[str, Any]:
    """The `env` of a run record; `gpu` and `driver` are None where the run used none."""
    sha, dirty = git_state()
    gpu, driver = gpu_state(device) if device.startswith("cuda") else (None, None)
    return {
        "gpu": gpu,
        "driver": driver,
        "device": device,
        "versions": {"kvq": kvq_version(), **{name: _version(name) for name in PACKAGES}},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".strip(", "),
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git_sha": sha,
        "git_dirty": dirty,
        "command": command_line(sys.argv if command is None else command),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line(argv: Sequence[str]) -> str:
    """`kvq` or a script of the repository, and its arguments as typed.

    Absolute paths are cut to their last part: a record tells nothing of a disk.
    """
    program = Path(argv[0]).resolve()
    name = f"scripts/{program.name}" if program.parent.name == "scripts" else "kvq"
    return shlex.join([name, *(_shorten(argument) for argument in argv[1:])])


def _shorten(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_shorten(value)}"
    return Path(argument).name or argument if os.path.isabs(argument) else argument


def kvq_version() -> str | None:
    """The version of the installed package, else that of the source tree."""
    return _version(DISTRIBUTION) or _version_of_source_tree()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _source_tree() -> Path:
    return Path(kvq_core.__file__).resolve().parent.parent


def _version_of_source_tree() -> str | None:
    import tomllib

    try:
        project = tomllib.loads((_source_tree() / "pyproject.toml").read_text("utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return None
    return project.get("version")


def git_state() -> tuple[str | None, bool | None]:
    """Commit of kvq's own checkout, and whether tracked files differ from it; None for an installed kvq.

    A checkout that merely contains the virtual environment is not kvq's own.
    """
    tree = _source_tree()
    if not (tree / ".git").exists():
        return None, None
    sha = _output("git", "-C", str(tree), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(tree), "status", "--porcelain", "--untracked-files=no")
    return sha or None, None if changes is None else bool(changes)


def gpu_state(device: str) -> tuple[str | None, str | None]:
    """Name of the GPU and version of its driver.

    Torch is asked for the name where it is loaded, since it knows which of several GPUs is used.
    """
    lines = (
        _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or ""
    ).splitlines()
    name, _, driver = lines[0].partition(", ") if lines else ("", "", "")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    return name or None, driver or None


def cpu_name() -> str | None:
    """The processor's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
