"""Experts of large steps: grouped GEMMs, and a sum in a fixed order."""

import pytest
import torch

from kvq_core.experts import _grouped
from kvq_kernels import reference


@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_grouped_experts_equal_the_twin(tokens: int) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 64).bfloat16()
    gate_up, down = (torch.randn(6, 64, 64) / 8).bfloat16(), (torch.randn(6, 64, 32) / 6).bfloat16()
    weights, index = torch.randn(tokens, 6).softmax(-1).topk(3, -1)
    weights = weights.bfloat16()
    out = _grouped(x, index, weights, gate_up, down).double()
    expected = reference.experts(x.double(), index, weights.double(), gate_up, down)
    assert (out - expected).norm() < 1e-2 * expected.norm()
    assert _grouped(x, index, weights, gate_up, down).double().equal(out)
