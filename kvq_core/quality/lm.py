"""kvq as a model of lm-evaluation-harness: `lm_eval.simple_evaluate(model="kvq", …)` once this is imported.

Log-likelihoods come from one plain forward a batch whose keys and values are read back through the policy's
codecs, as `kvq eval` does it; generation goes through the engine. All else (tokens, batches, order, how
contexts are cut) is the harness's own Hugging Face backend, so that policy none gives its figures exactly.
"""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kvq_core.attention import NAME as ENGINE_ATTENTION
from kvq_core.config import EngineConfig, SamplingParams
from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel, load_model
from kvq_core.pipeline import Pipeline
from kvq_core.policies import Policy, get_policy
from kvq_core.quality.read_back import attention_of, logits


@register_model("kvq")
class KvqLM(HFLM):
    """A model under a policy; `policy` may be changed between evaluations.

    `pretrained` is a name as `kvq --model` takes it, or a loaded model. Raises `KvqError` as loading does.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel = "demo",
        policy: int | str | Policy = 0,
        sink: int | None = None,
        recent: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str):
            pretrained = load_model(pretrained, dtype=dtype, device=device or "auto")
        if pretrained.tokenizer is None:
            raise KvqError(f"{pretrained.name} has no tokenizer", "tasks are texts: use a model that has one")
        self.loaded = pretrained
        self.policy = get_policy(policy).with_window(sink, recent)
        self.on_progress: Callable[[float], None] | None = None
        """Called with the share of a kind of requests that is done; progress bars are off then."""
        self._done = self._total = 0
        self._pipe: Pipeline | None = None
        super().__init__(
            pretrained=pretrained.model,
            tokenizer=pretrained.tokenizer,
            backend="causal",
            batch_size=batch_size,
            **{"max_length": pretrained.geometry.max_model_len, **options},
        )

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """[B, L] ids, padded on the right -> logits [B, L, V]."""
        self._advance(inps.shape[0])
        if self.policy.is_quantized or self.loaded.group.size > 1:
            return logits(self.loaded, inps, self.policy)
        with attention_of(self.loaded, "sdpa" if self.model._supports_sdpa else "eager"):
            return super()._model_call(inps)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=self._quiet(disable_tqdm))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=self._quiet(disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._done, self._total = 0, len(requests)
        quiet = self._quiet(disable_tqdm)
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self._done, self._total = 0, len(requests)
        try:
            with attention_of(self.loaded, ENGINE_ATTENTION):
                return super().generate_until(requests, disable_tqdm=self._quiet(disable_tqdm))
        finally:
            if self._pipe is not None:
                self._pipe.close()
                self._pipe = None

    def _model_generate(
        self,
        context: Tensor,
        max_length: int,
        stop: list[str],
        attention_mask: Tensor | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        **others: Any,
    ) -> Tensor:
        """[B, L] ids, padded on the left, and their answers -> [B, L + longest answer]."""
        if others:
            raise KvqError(
                f"the engine has no generation setting {', '.join(others)}", "change the task's YAML"
            )
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        if self._pipe is None:
            # Layers stay as they are: log-likelihoods use them too.
            seqs, tp = int(self.batch_size), self.loaded.group.size
            config = EngineConfig(policy=self.policy, max_num_seqs=seqs, tp=tp, compile=False)
            self._pipe = Pipeline(self.loaded, config)
        mask = torch.ones_like(context) if attention_mask is None else attention_mask
        prompts = [ids[seen.bool()].tolist() for ids, seen in zip(context, mask, strict=True)]
        params = SamplingParams(
            max_new_tokens=max_length - context.shape[1],
            temperature=temperature if do_sample is not False else 0.0,
            top_k=top_k,
            top_p=top_p,
            stop=tuple(stop),
        )
        self._advance(len(prompts))
        answers = self._pipe(prompts, params)
        assert isinstance(answers, list)
        longest = max(len(answer.token_ids) for answer in answers)
        pad = self.tokenizer.pad_token_id
        rows = [answer.token_ids + [pad] * (longest - len(answer.token_ids)) for answer in answers]
        return torch.cat([context, torch.tensor(rows, device=context.device)], 1)

    def _quiet(self, disable_tqdm: bool) -> bool:
        return disable_tqdm or self.on_progress is not None

    def _advance(self, count: int) -> None:
        if self.on_progress is not None:
            self.on_progress(min(1.0, self._done / max(1, self._total)))
        self._done += count
