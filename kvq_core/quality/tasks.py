"""Scores of policies on tasks, by lm-evaluation-harness."""

import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial, partialmethod
from importlib import resources
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvq_core.cache.plan import check_head_dims
from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel
from kvq_core.models.source import hub_reachable
from kvq_core.policies import Policy
from kvq_core.quality import local_data, retrieval
from kvq_core.quality.perplexity import Progress, effective_bits
from kvq_core.quality.text import check_context_len

OWN: dict[str, Callable[..., list[dict[str, str]]]] = {
    "needle": retrieval.needles,
    "kv_retrieval": retrieval.lookups,
}
"""Tasks whose samples are generated."""
BOOTSTRAPS = 1000
"""Resamplings for the standard error of a perplexity."""
OWN_SAMPLES = 44
"""Samples of a generated task without a limit: each of its eleven depths four times."""
LOCAL = (*local_data.FILES, local_data.MMLU)
"""Tasks whose samples are read from `--tasks-path`."""


@dataclass(frozen=True)
class TaskRow:
    """Scores of one policy."""

    policy: Policy
    scores: dict[str, float]
    """`TASK_METRIC` -> value, `TASK_METRIC_stderr` -> its standard error."""
    samples: dict[str, int]
    """Task -> samples that were scored."""
    bits_per_element: float


@dataclass(frozen=True)
class TaskResult:
    """Scores of all policies on the same samples."""

    rows: list[TaskRow]
    """In the order of the policies; those that were finished."""
    seconds: float
    complete: bool
    """False: interrupted; later policies are missing."""


def evaluate_tasks(
    model: LoadedModel,
    names: Sequence[str],
    policies: Sequence[Policy],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    context_len: int = 1024,
    seed: int = 0,
    progress: Progress | None = None,
) -> TaskResult:
    """Score every policy on the same samples, the first `limit` of each task (None: all).

    A name is one of `OWN`, one of `LOCAL` where a folder is given, a YAML file's in that folder, or one of
    lm-evaluation-harness's own, whose data come from the hub.
    Raises `KvqError` where lm-evaluation-harness is missing, a task is unknown, its data can't be had or
    its samples are longer than the model takes.
    """
    for policy in policies:
        check_head_dims(model.geometry, policy)
    evaluate, manager, KvqLM = _harness(names, folder)
    with _quietly():
        lm = KvqLM(model, batch_size=batch_size)
    specs = [
        _spec(name, lm, folder, limit or OWN_SAMPLES, num_fewshot, context_len, seed) or name
        for name in names
    ]
    start, rows, complete = time.perf_counter(), [], True
    try:
        for index, policy in enumerate(policies):
            lm.policy = policy
            if progress:
                lm.on_progress = partial(_report, progress, index, len(policies))
            with _quietly(), _without_retries(), _translated(names):
                found = evaluate(
                    lm,
                    task_dict=_load(manager, specs, num_fewshot, seed),
                    limit=limit,
                    bootstrap_iters=BOOTSTRAPS,
                    log_samples=False,
                )
            samples = {task: counts["effective"] for task, counts in found["n-samples"].items()}
            bits = effective_bits(model.geometry, policy, context_len)
            rows.append(TaskRow(policy, _scores(found["results"]), samples, bits))
    except KeyboardInterrupt:
        complete = False
    return TaskResult(rows, time.perf_counter() - start, complete)


def _report(progress: Progress, policy: int, policies: int, share: float) -> None:
    """Parts in a thousand of all policies, `share` being what is done of this one."""
    progress(round(1000 * (policy + share) / policies), 1000)


def _load(manager: Any, specs: list[Any], num_fewshot: int | None, seed: int) -> Any:
    """The tasks, with their number of worked examples; tasks that are set to none keep it."""
    loaded = manager.load(specs)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config("num_fewshot", own or 0 if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=seed)
    return loaded


def check_names(names: Sequence[str], folder: Path | None) -> None:
    """`KvqError` for what can be told before a model is loaded: no harness, no such folder or file."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise KvqError(
            "tasks need lm-evaluation-harness, which is not installed", "pip install 'kvq-toolkit[tasks]'"
        ) from error
    if folder is not None and not folder.is_dir():
        raise KvqError(f"--tasks-path {folder} is no folder", "give the folder that holds the tasks' files")
    for name in names:
        if folder is not None and name in LOCAL:
            local_data.read_samples(name, folder)


def _harness(names: Sequence[str], folder: Path | None) -> tuple[Any, Any, Any]:
    """lm-evaluation-harness's entry point, its tasks as far as they are needed, and our model class."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from kvq_core.quality.lm import KvqLM

    files = {path.stem for path in folder.glob("*.yaml")} if folder else set()
    ours = {*OWN, *(LOCAL if folder else ())}
    elsewhere = [name for name in names if name not in ours]
    # The index of all their tasks takes seconds to build.
    manager = TaskManager(
        include_path=str(folder) if folder and files else None, include_defaults=bool(set(elsewhere) - files)
    )
    for name in elsewhere:
        if name not in manager.all_tasks:
            raise KvqError(
                f"there is no task {name!r}",
                f"ours are {', '.join([*OWN, *LOCAL])}; all others are those of `lm_eval ls tasks`",
            )
    return evaluate, manager, KvqLM


def _spec(
    name: str,
    lm: Any,
    folder: Path | None,
    samples: int,
    num_fewshot: int | None,
    context_len: int,
    seed: int,
) -> dict[str, Any] | None:
    """The configuration of a task of ours, its samples included; None for the harness's own."""
    import yaml
    from datasets import Dataset

    if name in OWN:
        check_context_len(lm.loaded, context_len)
        rows: list[dict[str, Any]] = OWN[name](
            lambda text: len(lm.tok_encode(text)), context_len, samples, seed
        )
    elif folder is not None and name in LOCAL:
        rows = local_data.read_samples(name, folder)
    else:
        return None
    text = resources.files("kvq_core.quality").joinpath("task_files", f"{name}.yaml").read_text("utf-8")
    data = {"test": Dataset.from_list(rows)}
    return {**yaml.safe_load(text), "custom_dataset": lambda **_: data}


def _scores(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Flat names: `arc_easy_acc`, `arc_easy_acc_stderr`, `gsm8k_exact_match_strict-match`."""
    scores = {}
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if kind and isinstance(value, int | float):
                suffix = "" if kind == "none" else f"_{kind}"
                stderr = "_stderr" if metric.endswith("_stderr") else ""
                scores[f"{task}_{metric.removesuffix('_stderr')}{suffix}{stderr}"] = float(value)
    return scores


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars, advice and processes from the harness."""
    from tqdm import tqdm

    logger, start = logging.getLogger("lm_eval"), tqdm.__init__
    before = logger.level
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(start, disable=True)  # there is no setting for it
    try:
        # Its bootstrap forks a pool of processes; a fork of torch's threads may hang.
        with redirect_stdout(io.StringIO()), patch.dict(os.environ, DISABLE_MULTIPROC="1"):
            yield
    finally:
        logger.setLevel(before)
        tqdm.__init__ = start


@contextmanager
def _without_retries() -> Iterator[None]:
    """Where the hub is out of reach, data come from the local cache or not at all, at once."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not hub_reachable():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _translated(names: Sequence[str]) -> Iterator[None]:
    """What the harness and the hub raise, as a `KvqError`."""
    try:
        yield
    except KvqError:
        raise
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if kinds & {"ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "ConnectError"}:
            raise KvqError(
                f"the data of {', '.join(names)} can't be fetched from the hub: {first}",
                f"with files of your own: `--tasks-path FOLDER`, for {', '.join(LOCAL)}",
            ) from error
        raise KvqError(
            f"lm-evaluation-harness failed on {', '.join(names)}: {type(error).__name__}: {first}",
            "KVQ_DEBUG=1 shows where; a sample longer than the model's context is a usual cause",
        ) from error
