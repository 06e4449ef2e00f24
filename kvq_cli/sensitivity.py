"""`kvq eval --sensitivity`: which layers cost most, and which codecs to give them."""

from typing import TYPE_CHECKING

from kvq_cli import console
from kvq_cli.options import parse_size
from kvq_core.errors import UsageError
from kvq_core.policies import Policy

if TYPE_CHECKING:
    from kvq_core.models import LoadedModel
    from kvq_core.quality.sensitivity import Proposal, Side
    from kvq_core.quality.text import Windows

DEFAULT_POLICY = "42"
DEFAULT_BUDGET = 1.1
"""Of the policy's bytes per token."""


def parse_budget(text: str | float) -> float | int:
    """`1.1x` -> 1.1, a multiple of the policy's bytes; `20000` or `20KiB` -> bytes, an int."""
    if not isinstance(text, str):
        return text
    if not text.endswith("x"):
        try:
            return parse_size(text)
        except UsageError:
            raise _no_budget(text) from None
    try:
        multiple = float(text[:-1])
    except ValueError:
        raise _no_budget(text) from None
    if not 0 < multiple < float("inf"):
        raise _no_budget(text)
    return multiple


def _no_budget(text: str) -> UsageError:
    return UsageError(
        f"`{text}` is no budget",
        "a multiple of the policy's bytes per token, as `1.1x`, or bytes per token, as `20000` or `20KiB`",
    )


def only_policy(chosen: list[Policy]) -> Policy:
    """The policy to start from: the one that was given."""
    if len(chosen) != 1:
        raise UsageError(
            "--sensitivity starts from one policy", "for example `--policies 42 --sensitivity --budget 1.1x`"
        )
    if chosen[0].layers:
        raise UsageError(
            "--sensitivity proposes layers by itself", "leave out `--layers` and `@LAYERS=POLICY`"
        )
    return chosen[0]


def propose_layers(
    model: "LoadedModel", windows: "Windows", policy: Policy, budget: float | int, key_bias: str
) -> tuple[list["Side"], "Proposal"]:
    """Measure every layer, and propose."""
    from kvq_core.quality.sensitivity import policy_bytes, propose, sensitivity

    with console.progress("measuring keys and values of each layer") as update:
        sides = sensitivity(
            model, windows, policy, key_bias, lambda done, total: update(done=done, total=total)
        )
    if isinstance(budget, float):
        budget = int(policy_bytes(sides, policy) * budget)
    return sides, propose(sides, policy, budget)


def show_ranking(sides: list["Side"], proposal: "Proposal", policy: Policy) -> None:
    """A row a layer, the costliest first."""
    from kvq_core.quality.sensitivity import policy_bytes

    own = proposal.policy.by_layer(len(sides) // 2)
    cost: dict[int, dict[bool, float]] = {}
    for side in sides:
        cost.setdefault(side.layer, {})[side.values] = side.kl
    total = sum(side.kl for side in sides) or 1.0
    rows = [
        [
            str(layer), f"{sum(kl.values()):.5f}", f"{sum(kl.values()) / total:.1%}",
            f"{kl[False]:.5f}", f"{kl[True]:.5f}", own[layer].key, own[layer].value,
        ]
        for layer, kl in sorted(cost.items(), key=lambda item: -sum(item[1].values()))
    ]  # fmt: skip
    notes = (
        f"KL: of {policy.label} in this layer alone, nats per token; K, V: proposed codecs",
        f"proposed: {proposal.bytes_per_token:,} bytes per token of a budget of {proposal.budget:,} "
        f"({policy.label}: {policy_bytes(sides, policy):,})",
        proposal.flags,
    )
    console.emit_table("layers", ["layer", "KL", "share", "KL of K", "KL of V", "K", "V"], rows, notes)
