"""Compile the kernels that a launcher would launch, for any architecture, without a GPU."""

import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from kvq_kernels import paged_decode, paged_prefill, quantize_store, warp_decode
from tests.kernels.machine import run_kernel

SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}
"""KiB of shared memory one program may have."""

_TYPES = {
    torch.uint8: "*u8", torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64", torch.int16: "*i16",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


@dataclass
class Launch:
    """One recorded launch: what `triton.compile` needs."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, int]
    counts: Counter[str] = field(default_factory=Counter)
    """Instructions that were run, by name, see `machine.py`."""

    @property
    def variant(self) -> tuple[str, str]:
        """What else than this has to be compiled anew."""
        return self.name, repr((self.constants, self.attributes, self.options))

    def compile(self, capability: int):
        kind = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = kind(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


class _Recorder:
    def __init__(self, name: str, kernel: Any, launches: list[Launch], run: bool) -> None:
        self.name, self.kernel, self.launches, self.run = name, kernel, launches, run

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.record, grid)

    def record(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(self.kernel.params):
            value = values[param.name]
            if isinstance(value, torch.Tensor):
                signature[param.name] = _TYPES[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif param.is_constexpr or (value == 1 and type(value) is int and not param.do_not_specialize):
                signature[param.name] = "constexpr"
                constants[(index,)] = value
            elif isinstance(value, float):
                signature[param.name] = "fp32"
            else:
                signature[param.name] = "i32"
                if value % 16 == 0 and not param.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        launch = Launch(self.name, self.kernel, signature, constants, attributes, options)
        self.launches.append(launch)
        if self.run:
            compiled = launch.compile(90)
            arguments = [values[name] for name, kind in signature.items() if kind != "constexpr"]
            launch.counts = run_kernel(
                compiled.asm["ptx"], grid, arguments, options.get("num_warps", 4), compiled.metadata.shared
            )


@contextmanager
def recording(*modules: ModuleType, run: bool = False) -> Iterator[list[Launch]]:
    """Inside, launches of these modules' kernels are recorded; to `run`, they are compiled for sm_90 and run
    by `machine.py`, on tensors of the CPU."""
    launches: list[Launch] = []
    saved = []
    for module in modules:
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel"):
                saved.append((module, name, kernel))
    for module, name, kernel in saved:
        setattr(module, name, _Recorder(name, kernel, launches, run))
    try:
        yield launches
    finally:
        for module, name, kernel in saved:
            setattr(module, name, kernel)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Have launchers on tensors of the CPU choose what they would on a GPU of this capability."""

    def has_products(dtype: torch.dtype, device: torch.device) -> bool:
        return dtype != torch.float32 and capability >= 80

    for module in (quantize_store, paged_decode, paged_prefill):
        monkeypatch.setattr(module, "has_products", has_products)
    for module in (quantize_store, warp_decode):
        monkeypatch.setattr(module, "has_e4m3", lambda device: capability >= 89)
    monkeypatch.setattr(warp_decode, "has_products", lambda device: capability >= 80)
    monkeypatch.setattr(warp_decode, "has_dependent_launches", lambda device: capability >= 90)
    monkeypatch.setattr(warp_decode, "shared_memory", lambda device: SHARED_LIMIT[capability] << 10)
    monkeypatch.setattr(paged_prefill, "generation", lambda device: capability // 10)


@lru_cache(maxsize=1)
def _cuobjdump() -> str | None:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, SHARED of a compiled kernel, as cuobjdump tells; empty without it."""
    tool = _cuobjdump()
    if tool is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = [part.split(":") for part in text.split() if ":" in part and part.split(":")[1].isdigit()]
    return {key: int(value) for key, value, *_ in fields if "[" not in key}
