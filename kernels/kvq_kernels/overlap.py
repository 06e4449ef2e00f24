"""Programmatic dependent launch: a kernel's programs take their places while the last of the one before run.

A decode step is some 600 short launches, and between any two of them the GPU would idle for about a
microsecond. Kernels that are launched with `launch_options` begin with `after_previous`. On sm_90 and later;
elsewhere both do nothing. CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Wait until all that earlier kernels wrote is there; from then on the next kernel may move in."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@lru_cache(maxsize=16)
def overlaps(device: torch.device) -> bool:
    """Whether launches on `device` may overlap."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """What to launch a kernel with that calls `after_previous`."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}
