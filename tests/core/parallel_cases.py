"""Run in a process of its own: `parallel_cases.py TP FOLDER`. Tokens of one process and of TP, as JSON."""

import json
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvq_core.cache.plan import plan_cache
from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.engine.engine import Engine
from kvq_core.models import LoadedModel, load_model
from kvq_core.policies import get_policy
from kvq_core.quality.read_back import logits
from tests.tiny import TINY

VOCAB = TINY["vocab_size"]
PAGE, CHUNK, NEW_TOKENS, PAGES = 16, 16, 32, 8
LENGTHS = (5, 45, 16, 33, 50)
BASE: dict[str, Any] = {
    **TINY,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """`dummy` weights are made on each rank, others come from a checkpoint."""

    kind: str
    options: dict[str, Any]
    dummy: bool
    policies: tuple[str, ...]


EVERY = ("0", "4", "8", "42")
CASES = {
    2: [
        Case("llama", {}, True, (*EVERY, "42+s4r8")),
        Case("qwen3_moe", EXPERTS, True, EVERY),
        # Biases on every projection, one MLP form more, and tied embeddings.
        Case("starcoder2", {"use_bias": True, "head_dim": 16, "tie_word_embeddings": True}, False, ("8",)),
    ],
    4: [Case("llama", {}, True, ("8",)), Case("qwen3_moe", EXPERTS, False, ("42",))],
}


def load(case: Case, folder: str, tp: int) -> LoadedModel:
    load_format = "dummy" if case.dummy else "auto"
    return load_model(
        folder, dtype="float64", device="cpu", load_format=load_format, need_tokenizer=False, tp=tp
    )


def write(case: Case, folder: str) -> None:
    config = AutoConfig.for_model(case.kind, **(BASE | case.options))
    if case.dummy:
        config.save_pretrained(folder)
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


def generate(model: LoadedModel, policy: str, tp: int) -> dict[str, Any]:
    """Answers to several prompts, with so few pages that some are preempted; cached prompts come twice."""
    prefix_caching = "+" in policy
    own = get_policy(policy)
    plan = plan_cache(
        model.geometry, own, 1 << 30, page_size=PAGE, max_num_seqs=4, prefill_chunk=CHUNK, max_model_len=256,
        dtype=model.dtype,
    )  # fmt: skip
    pages = PAGES * (3 if prefix_caching else 1)
    config = EngineConfig(
        policy=policy, tp=tp, page_size=PAGE, prefill_chunk=CHUNK, max_num_seqs=4, max_num_batched_tokens=40,
        prefix_caching=prefix_caching,
        kv_memory=pages * sum(g.page_bytes for g in plan.groups) + 4 * plan.raw_bytes_per_request,
    )  # fmt: skip
    engine = Engine(model, config)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    answers: dict[int, list[int]] = {}
    for _ in range(2 if prefix_caching else 1):
        for prompt in prompts:
            engine.add_request(prompt, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
        while engine.has_work:
            for output in engine.step():
                answers.setdefault(output.request_id, []).extend(output.token_ids)
    found = {
        "answers": [answers[i] for i in sorted(answers)],
        "preemptions": engine.scheduler.preemptions,
        "cached": engine.scheduler.cached_tokens,
        "kv": engine.kv_stats(),
        "drift": float(logits(model, torch.tensor(prompts[1]), own).sum()),
    }
    engine.close()
    return found


def interrupted(model: LoadedModel, tp: int, press: bool) -> list[int]:
    """The tokens after the first step, in the middle of which Ctrl-C is pressed or not."""
    engine = Engine(model, EngineConfig(tp=tp, kv_memory=1 << 20))
    engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=8, ignore_eos=True))
    run = engine.runner.run
    if press:
        engine.runner.run = lambda *work: (signal.raise_signal(signal.SIGINT), run(*work))[1]  # type: ignore
    with suppress(KeyboardInterrupt):
        engine.step()
        assert not press, "Ctrl-C was lost"
    engine.runner.run = run  # type: ignore[method-assign]
    answer = [token for _ in range(7) for output in engine.step() for token in output.token_ids]
    engine.close()
    return answer


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tp, folder = int(sys.argv[1]), sys.argv[2]
    rows = []
    for number, case in enumerate(CASES[tp]):
        place = f"{folder}/{number}"
        write(case, place)
        alone, split = load(case, place, 1), load(case, place, tp)
        for policy in case.policies:
            results = {"one": generate(alone, policy, 1), "several": generate(split, policy, tp)}
            described = split.describe() == alone.describe()
            rows.append({"case": f"{case.kind} {policy}", "described": described, **results})
        assert interrupted(split, tp, True) == interrupted(alone, 1, False), "Ctrl-C left ranks out of step"
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
