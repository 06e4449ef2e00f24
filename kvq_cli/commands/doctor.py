"""`kvq doctor`: what this machine can do, and what stands in the way."""

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvq_cli import console
from kvq_cli.options import Json, format_size
from kvq_core.errors import CheckFailed

MINIMUM = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17)}
"""As pyproject.toml asks for; said again here for an environment in which something else changed them."""


@dataclass(frozen=True)
class Finding:
    """One line: `ok`, a `note` worth knowing, or a `problem` with its `hint`."""

    what: str
    value: str
    status: str = "ok"
    hint: str = ""


def doctor(json: Json = False) -> None:
    """Check this machine: versions, GPU, kernels, memory, demo model.

    Exit code 3 where something stands in the way.
    """
    findings = list(examine())
    problems = [finding for finding in findings if finding.status == "problem"]
    if json:
        console.emit_json({"ok": not problems, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            mark = {"ok": " ", "note": "-", "problem": "!"}[finding.status]
            console.emit(f"{mark} {finding.what:<14} {finding.value}")
            if finding.hint:
                console.emit(f"{'':<17}{finding.hint}")
    if problems:
        names = ", ".join(finding.what for finding in problems)
        raise CheckFailed(f"not ready: {names}", "the lines marked `!` say what to do")


def examine() -> Iterator[Finding]:
    """Everything worth checking, from the ground up."""
    from kvq_core.bench.env import kvq_version

    yield Finding("kvq", kvq_version() or "unknown version")
    python = f"{platform.python_version()} ({sys.executable})"
    yield Finding("python", python)
    for package, minimum in MINIMUM.items():
        yield _package(package, minimum)
    yield from _devices()
    yield _host_memory()
    yield _demo_model()


def _package(package: str, minimum: tuple[int, int]) -> Finding:
    wanted = ".".join(map(str, minimum))
    try:
        found = version(package)
    except PackageNotFoundError:
        if package == "triton":
            return Finding(
                package, "not installed", "note", "needed on a GPU; torch for Linux brings it along"
            )
        return Finding(package, "not installed", "problem", f"pip install '{package}>={wanted}'")
    if tuple(int(part) for part in found.split(".")[:2]) < minimum:
        hint = f"kvq needs {wanted} or newer: pip install --upgrade '{package}>={wanted}'"
        return Finding(package, found, "problem", hint)
    return Finding(package, found)


def _devices() -> Iterator[Finding]:
    try:
        import torch

        from kvq_kernels.hadamard import hadamard_backend
    except ImportError as error:
        yield Finding("torch", f"cannot be imported: {error}", "problem", "reinstall torch")
        return
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
        yield Finding("kernels", "torch reference on the CPU: right, and slow")
        yield Finding("hadamard", hadamard_backend("cpu"))
        return
    for index in range(torch.cuda.device_count()):
        yield _gpu(torch, index)
    yield _triton_kernels()
    yield Finding("hadamard", f"fused into the kernels; beside them {hadamard_backend('cuda')}")


def _no_gpu(cuda: str | None) -> Finding:
    from kvq_core.bench.env import gpu_state

    name, driver = gpu_state("cuda")
    if name is None:
        return Finding("gpu", "none: everything runs on the CPU, at the reference backend's speed", "note")
    if cuda is None:
        hint = "this torch is a CPU build: reinstall it without constraints.txt, in a new virtual environment"
    else:
        hint = f"torch is built for CUDA {cuda}; driver {driver} may be too old for it"
    return Finding("gpu", f"{name}, which torch can't use", "problem", hint)


def _gpu(torch: Any, index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(index)
    value = (
        f"{properties.name}, sm_{capability[0]}{capability[1]}, CUDA {torch.version.cuda}, "
        f"{format_size(free)} of {format_size(total)} free"
    )
    status, hint = gpu_advice(capability, torch.version.cuda or "")
    return Finding(f"gpu {index}", value, status, hint)


def gpu_advice(capability: tuple[int, int], cuda: str) -> tuple[str, str]:
    """`(status, hint)` for a GPU of this compute capability under a torch built for this CUDA version."""
    if capability < (7, 0):
        return "problem", "kvq's kernels need sm_70 (V100) or newer"
    if capability < (7, 5) and not cuda.startswith("12"):
        return "problem", "sm_70 (V100) needs a torch built for CUDA 12: newer CUDA dropped it"
    if capability < (8, 0):
        return "note", "no native bfloat16 before sm_80: use `--dtype float16`"
    if capability < (8, 9):
        return "note", "no fp8 units before sm_89: policy 16 is decoded with integer operations"
    return "ok", ""


def _triton_kernels() -> Finding:
    try:
        import triton
    except ImportError as error:
        hint = "reinstall torch in a new virtual environment: it brings the triton it was built with"
        return Finding("kernels", f"triton cannot be imported: {error}", "problem", hint)
    return Finding("kernels", f"Triton {triton.__version__}")


def _host_memory() -> Finding:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return Finding("host memory", "unknown", "note")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("host memory", f"{format_size(free)} of {format_size(total)} free, {cores} cores")


def _demo_model() -> Finding:
    from kvq_core.demo import FOLDER, cache_folder

    folder = cache_folder() / FOLDER
    if (folder / "config.json").is_file():
        return Finding("demo model", f"cached in {folder}")
    return Finding("demo model", f"not cached yet; its first use fetches 98 MB into {cache_folder()}", "note")
