"""Projections that read the same input, as one product."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_core.engine.joint import JointProjection, LaterProjection, join_projections


def model(kind: str) -> nn.Module:
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_a_model_predicts_the_same(kind: str) -> None:
    plain, ids = model(kind), torch.arange(1, 12)[None]
    with torch.inference_mode():
        before = plain(ids, use_cache=False).logits
        parameters = sum(p.numel() for p in plain.parameters())
        assert join_projections(plain) == 3 and join_projections(plain) == 0
        after = plain(ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in plain.parameters()) == parameters
    joints = [m for m in plain.modules() if isinstance(m, JointProjection)]
    assert len(joints) == 3 and all(j.source is None and not j.waiting for j in joints)


def test_layers_called_out_of_turn_answer_for_their_own_input() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, n) for n in (6, 4, 2)]
    joint = JointProjection(layers)
    later = [LaterProjection(joint, place) for place in (1, 2)]
    x, y = torch.randn(2, 3, 8).unbind(0)
    close = torch.testing.assert_close
    close(later[0](x), layers[1](x))  # before the first
    close(joint(x), layers[0](x))
    close(later[1](y), layers[2](y))  # another input
    close(later[1](x), layers[2](x))
    close(later[1](x), layers[2](x))  # a second time
    close(later[0](x), layers[1](x))
    assert joint.source is None


def test_other_forms_are_left_alone() -> None:
    gpt = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    )
    assert join_projections(gpt) == 0
    module = nn.Module()
    module.q_proj, module.k_proj, module.v_proj = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 8)
    assert join_projections(module) == 0
