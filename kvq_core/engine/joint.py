"""Query, key and value projections as one product: with few tokens, a launch costs more than its work."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

NAMES = ("q_proj", "k_proj", "v_proj")


class JointProjection(nn.Module):
    """The first of some linear layers that read the same input in turn: does the work of all.

    `weight` [sum of outputs, inputs] holds those of the layers, one below the other.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        self.bias = None
        if layers[0].bias is not None:
            self.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
        self.source: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}
        """What the later layers will answer to `source`, by their place."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> the first layer's outputs; those of the others wait in `waiting`."""
        first, *rest = linear(x, self.weight, self.bias).split(self.sizes, -1)
        self.source, self.waiting = x, dict(enumerate(rest, 1))
        return first

    def later(self, x: Tensor, place: int) -> Tensor:
        """The answer of the layer at `place`: made already, or, for another input than the first's, now."""
        if self.source is not x or place not in self.waiting:
            start = sum(self.sizes[:place])
            rows = slice(start, start + self.sizes[place])
            return linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])
        answer = self.waiting.pop(place)
        if not self.waiting:
            self.source = None  # holds no tensor beyond the forward
        return answer


class LaterProjection(nn.Module):
    """One of the layers behind the first."""

    def __init__(self, joint: JointProjection, place: int) -> None:
        super().__init__()
        self.joint = joint
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return self.joint.later(x, self.place)


def join_projections(model: nn.Module) -> int:
    """Join the projections of all attention modules where they are plain linear layers; returns how many."""
    joined = 0
    for module in list(model.modules()):
        layers = [getattr(module, name, None) for name in NAMES]
        if all(type(layer) is nn.Linear for layer in layers) and _alike(layers):  # type: ignore[arg-type]
            joint = JointProjection(layers)  # type: ignore[arg-type]
            module.q_proj = joint
            module.k_proj, module.v_proj = (LaterProjection(joint, place) for place in (1, 2))
            joined += 1
    return joined


def _alike(layers: list[nn.Linear]) -> bool:
    """Whether the layers read inputs of one size, and all or none have a bias."""
    return len({(layer.in_features, layer.bias is None) for layer in layers}) == 1
