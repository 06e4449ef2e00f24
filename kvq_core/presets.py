"""Ready-made configs by name, so that speed and memory of a model can be measured without its checkpoint."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A published model: where it lives, and its config as arguments of transformers' config class."""

    hub_id: str
    config: dict[str, Any]
    aliases: tuple[str, ...] = ()
    """Other hub ids with the same config."""


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _llama2(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(10000.0),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float16",
    }


def _qwen3(hidden: int, intermediate: int, layers: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _rope(1e6),
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
    }


PRESETS: dict[str, Preset] = {
    "qwen3-30b-a3b": Preset(
        "Qwen/Qwen3-30B-A3B",
        _qwen3(hidden=2048, intermediate=6144, layers=48, kv_heads=4)
        | {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "qwen3-8b": Preset("Qwen/Qwen3-8B", _qwen3(hidden=4096, intermediate=12288, layers=36, kv_heads=8)),
    "llama-2-7b": Preset(
        "meta-llama/Llama-2-7b-hf",
        _llama2(hidden=4096, intermediate=11008, layers=32, heads=32),
        ("meta-llama/Llama-2-7b-chat-hf",),
    ),
    "llama-2-13b": Preset(
        "meta-llama/Llama-2-13b-hf",
        _llama2(hidden=5120, intermediate=13824, layers=40, heads=40),
        ("meta-llama/Llama-2-13b-chat-hf",),
    ),
    # transformers has no InternLM2 class; it is a Llama with fused projections.
    "internlm2.5-7b": Preset(
        "internlm/internlm2_5-7b",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 92544,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1e6),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        },
        ("internlm/internlm2_5-7b-chat",),
    ),
}

DEMO_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _rope(100000.0),
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}
"""SmolLM2-135M-Instruct, the demo model."""


def find_preset(name: str) -> Preset | None:
    """The preset with this name or hub id, in any case."""
    wanted = name.lower()
    for key, preset in PRESETS.items():
        if wanted in (key, preset.hub_id.lower(), *(alias.lower() for alias in preset.aliases)):
            return preset
    return None
