"""The tiny random model that tests share: config, checkpoint, a tokenizer of bytes, and its replies."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kvq_core.config import SamplingParams
from kvq_core.engine.engine import Engine

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""What tests change of it stands in the test."""
END = "<end>"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
BYTES = 256
"""Tokens of `byte_tokenizer` without its end."""


def save_tiny(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Write a checkpoint with weights so large that attention is far from uniform; returns the folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TINY | {"initializer_range": 0.2} | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters beyond ASCII take several, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=template)


def replies(
    engine: Engine, prompts: list[list[int]], count: int, late: int = 0
) -> tuple[list[list[int]], list[Tensor]]:
    """`count` tokens for each prompt, and their logits [count, V]; a prompt comes every `late` steps."""
    rows: dict[int, list[Tensor]] = {}

    def keep(requests: list[int], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            rows.setdefault(request, []).append(row.clone())

    engine.runner.on_logits = keep
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    tokens: dict[int, list[int]] = {}
    waiting, steps = list(prompts), 0
    while waiting or engine.has_work:
        while waiting and steps >= late * len(tokens):
            tokens[engine.add_request(waiting.pop(0), params)] = []
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        steps += 1
    ids = sorted(tokens)
    return [tokens[i] for i in ids], [torch.stack(rows[i]) for i in ids]
