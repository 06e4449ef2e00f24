"""The support gate: which architectures kvq runs, decided from a config alone."""

from typing import Any

from kvq_core.errors import KvqError
from kvq_core.models.geometry import text_config

HINT = "most dense and mixture-of-experts decoders with full or sliding-window attention work"
ATTENTION_TYPES = ("full_attention", "sliding_attention")
ALIBI_TYPES = ("bloom", "mpt")


def check_support(config: Any) -> type:
    """The model class for a transformers config; raises `KvqError` with the reason where kvq can't run it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = text_config(config)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise refusal(config, "it is an encoder-decoder model, and kvq runs decoders alone")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refusal(config, "transformers has no causal language model for it")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    reason = _reason(text)
    if reason is None and not getattr(model_class, "_supports_attention_backend", False):
        reason = "its code in transformers does not let the attention function be replaced"
    if reason is not None:
        raise refusal(config, reason)
    return model_class


def refusal(config: Any, reason: str) -> KvqError:
    """The error for an unsupported model."""
    names = getattr(config, "architectures", None) or [type(config).__name__.removesuffix("Config")]
    return KvqError(f"{names[0]} (model type {config.model_type!r}) is not supported: {reason}", HINT)


def _reason(config: Any) -> str | None:
    """What in a text config rules it out, if anything."""
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_TYPES))
    if others:
        return f"it has layers of type {', '.join(others)}, and kvq knows full and sliding attention only"
    if getattr(config, "kv_lora_rank", None):
        return "multi-head latent attention caches a compressed vector in place of keys and values"
    if getattr(config, "num_kv_shared_layers", None):
        return "some of its layers share the keys and values of others"
    if getattr(config, "alibi", False) or config.model_type in ALIBI_TYPES:
        return "ALiBi adds a bias to the scores that the kernels do not know"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention looks ahead"
    return None
