"""Policies by layer: what users type, the cache that comes of it, and the proposal for a budget."""

import pytest
import torch

from kvq_core.cache.plan import plan_cache
from kvq_core.config import EngineConfig
from kvq_core.errors import KvqError, UsageError
from kvq_core.models import LayerGeometry, ModelGeometry
from kvq_core.policies import get_policy, parse_policies
from kvq_core.quality.sensitivity import Side, policy_bytes, propose


def codecs(spec: str, num_layers: int) -> list[str]:
    return [f"{own.key}:{own.value}" for own in get_policy(spec).by_layer(num_layers)]


def test_rules_by_layer() -> None:
    turbo, int8 = "turbo:lm2", "int8:int8"
    assert codecs("42@0,1,-2,-1=8", 6) == [int8, int8, turbo, turbo, int8, int8]
    assert codecs("42@1-3=8@2=int8:lm4", 5) == [turbo, int8, "int8:lm4", int8, turbo]
    assert codecs("0@-2--1=4", 3) == ["none:none", "int4:int4", "int4:int4"]
    policy = get_policy("42@0,1=8+s4r16")
    assert (policy.sink, policy.recent) == (4, 16)
    assert get_policy(policy.label) == policy and policy.describe()["layers"] == ["0,1=int8"]
    assert {own.sink for own in policy.by_layer(3)} == {4}


def test_lists_of_policies_keep_the_commas_of_layers() -> None:
    assert [p.label for p in parse_policies("0,42@0,1,-1=8@4=4,int8:lm4")] == [
        "none", "turbo@0,1,-1=int8@4=int4", "int8:lm4",
    ]  # fmt: skip


def test_config_applies_rules_once() -> None:
    config = EngineConfig(policy=42, layers=("0=8",))
    assert config.resolved_policy().label == "turbo@0=int8"
    assert config.replace(policy=config.resolved_policy()).resolved_policy().label == "turbo@0=int8"
    assert config.with_policy("none").resolved_policy().label == "none", "a baseline stays one"
    assert EngineConfig(policy=0, layers=("0=8",)).resolved_policy().is_quantized


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("42@0", "has no `=POLICY`"),
        ("42@x=8", "no layer and no range"),
        ("42@0=nothing", "unknown policy"),
        ("42@0=42-window", "more than codecs"),
    ],
)
def test_mistakes(spec: str, message: str) -> None:
    with pytest.raises((KvqError, UsageError), match=message):
        get_policy(spec)


@pytest.mark.parametrize(("rule", "message"), [("4=8", "names layer 4"), ("3-1=8", "runs backwards")])
def test_layers_that_are_not_there(rule: str, message: str) -> None:
    with pytest.raises(KvqError, match=message):
        get_policy(f"42@{rule}").by_layer(4)


def test_capacity_is_against_a_cache_of_two_bytes_whose_windows_are_full_as_well() -> None:
    """Windows take what they take; what a codec saves there is for the layers without."""
    layers = tuple(LayerGeometry(1, 64, 64, window) for window in (256, 256, 256, 256, 256, 0))
    geometry = ModelGeometry(6, layers, 4, 100, 1 << 17, ())

    def plan(spec: str):
        return plan_cache(
            geometry, get_policy(spec), 64 << 20, page_size=64, max_num_seqs=64, prefill_chunk=256,
            max_model_len=1 << 17, dtype=torch.bfloat16,
        )  # fmt: skip

    none = plan("0")
    assert none.capacity_ratio == 1
    for spec in ("8", "4", "42"):
        ratio = plan(spec).capacity_tokens / none.capacity_tokens
        assert plan(spec).capacity_ratio == ratio > 16 / plan(spec).bits_per_element


def test_the_cache_has_a_layout_for_each_pair() -> None:
    layers = tuple(LayerGeometry(2, 64, 64) for _ in range(4))
    geometry = ModelGeometry(4, layers, 4, 100, 4096, ())

    def plan(spec: str):
        return plan_cache(
            geometry, get_policy(spec), 1 << 20, page_size=16, max_num_seqs=2, prefill_chunk=64,
            max_model_len=512, dtype=torch.float32,
        )  # fmt: skip

    mixed = plan("42@0,-1=8")
    assert [group.layers for group in mixed.groups] == [(0, 3), (1, 2)]
    assert mixed.bytes_per_token == (plan("42").bytes_per_token + plan("8").bytes_per_token) / 2
    assert plan("8").capacity_tokens < mixed.capacity_tokens < plan("42").capacity_tokens
    assert mixed.bits_per_element == pytest.approx(
        (plan("42").bits_per_element + plan("8").bits_per_element) / 2
    )


def sides() -> list[Side]:
    sizes = {"turbo": 36, "lm2": 18, "lm4-fit": 34, "int8": 68}
    shares = {"turbo": 1.0, "lm2": 12.0, "lm4-fit": 1.0, "int8": 0.01}
    return [
        Side(layer, values, kl, {n: kl * share / shares[own] for n, share in shares.items()}, sizes)
        for layer, (key, value) in enumerate([(0.2, 0.1), (0.001, 0.002), (0.01, 0.02)])
        for values, kl, own in ((False, key, "turbo"), (True, value, "lm2"))
    ]  # fmt: skip


def test_a_proposal_spends_its_budget_where_it_helps_most() -> None:
    policy = get_policy(42)
    assert policy_bytes(sides(), policy) == 3 * 54
    previous = float("inf")
    for budget in (120, 162, 180, 230, 10_000):
        found = propose(sides(), policy, budget)
        own = found.policy.by_layer(3)
        size = {"turbo": 36, "lm2": 18, "lm4-fit": 34, "int8": 68}
        assert found.bytes_per_token == sum(size[p.key] + size[p.value] for p in own) <= budget
        assert found.predicted_kl < previous
        previous = found.predicted_kl
    assert {(p.key, p.value) for p in own} == {("int8", "int8")}
    tight = propose(sides(), policy, 180).policy.by_layer(3)
    assert tight[0].key != "lm2", "the costliest keys come first"
    assert propose(sides(), policy, 10_000).flags == "--policy 42 --layers 0-2=int8"
    with pytest.raises(KvqError, match="below the 108 of the smallest codecs"):
        propose(sides(), policy, 100)
