"""Routers through the op of one launch."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_core.experts import _routed, install


def _model(kind: str, **options: object) -> torch.nn.Module:
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        vocab_size=50, num_attention_heads=2, num_key_value_heads=1, head_dim=16, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "kind,options",
    [
        ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}),
        ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
    ids=["qwen3-moe", "qwen3-moe-plain", "mixtral"],
)
def test_softmax_routers_take_one_launch_and_route_alike(kind: str, options: dict[str, object]) -> None:
    model, ids = _model(kind, **options), torch.arange(20)[None]
    before = model(ids).logits
    install(model)
    model.set_experts_implementation("eager")
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    assert len(routers) == 2 and all(m.forward.__func__ is _routed for m in routers)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)


def test_other_routers_are_left_alone() -> None:
    """GLM's take a sigmoid, and a bias that counts in the choice alone."""
    model = _model("glm4_moe", n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=0)
    install(model)
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopkRouter")]
    assert routers and not any("forward" in m.__dict__ for m in routers)
