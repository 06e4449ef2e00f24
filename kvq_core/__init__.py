"""kvq: quantize the KV cache of a language model while it generates, and measure what that buys."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvq_core.config import EngineConfig, SamplingParams
    from kvq_core.errors import KvqError
    from kvq_core.hf_cache import KVQCache
    from kvq_core.pipeline import Pipeline, Response, pipeline

__all__ = ["EngineConfig", "KVQCache", "KvqError", "Pipeline", "Response", "SamplingParams", "pipeline"]

_HOMES = {
    "EngineConfig": "kvq_core.config",
    "SamplingParams": "kvq_core.config",
    "KVQCache": "kvq_core.hf_cache",
    "KvqError": "kvq_core.errors",
    "Pipeline": "kvq_core.pipeline",
    "Response": "kvq_core.pipeline",
    "pipeline": "kvq_core.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import kvq_core` stays free of torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvq_core' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
