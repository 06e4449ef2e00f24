"""How far a model's predictions drift from those with an unquantized cache."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvq_core.errors import KvqError

ROWS = 128
"""Predictions compared at a time: vocabularies are large."""


@dataclass(frozen=True)
class Figures:
    """Quality over some predicted tokens."""

    tokens: int
    ppl: float
    kl: float
    """Mean of KL(unquantized ‖ policy), nats per predicted token."""
    kl_median: float
    kl_p99: float
    top1: float
    """Share of tokens whose most likely next token is the same."""


@dataclass
class Drift:
    """Collects predictions, token by token or window by window, for one policy."""

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """reference and logits [n, V], targets [n]: the tokens that came.

        Raises `KvqError` where one of them is no number: means would hide it, or be none themselves.
        """
        for start in range(0, targets.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            wanted, given = _log_softmax(reference[rows]), _log_softmax(logits[rows])
            kl = (wanted.exp() * (wanted - given)).sum(-1).double().cpu()
            nll = -given.gather(1, targets[rows, None])[:, 0].double().cpu()
            if not (kl.isfinite().all() and nll.isfinite().all()):
                raise KvqError(
                    "the model's predictions are no numbers (NaN or an infinity)",
                    "a --dtype with a larger range, as bfloat16 or float32, or a sound checkpoint",
                )
            self.kl.append(kl)
            self.nll.append(nll)
            self.same.append((wanted.argmax(-1) == given.argmax(-1)).cpu())

    def merge(self, other: "Drift") -> None:
        """Add the predictions that another one collected."""
        self.nll += other.nll
        self.kl += other.kl
        self.same += other.same

    def figures(self) -> Figures:
        """What was collected so far, as figures."""
        nll, kl, same = torch.cat(self.nll), torch.cat(self.kl), torch.cat(self.same)
        return Figures(
            tokens=nll.numel(),
            ppl=nll.mean().exp().item(),
            kl=max(0.0, kl.mean().item()),
            kl_median=max(0.0, kl.quantile(0.5).item()),
            kl_p99=kl.quantile(0.99).item(),
            top1=same.double().mean().item(),
        )


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
