"""Scores of policies on tasks, by lm-evaluation-harness."""

import io
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kvq_core.errors import KvqError
from kvq_core.models import LoadedModel
from kvq_core.policies import Policy
from kvq_core.quality import local_data, retrieval
from kvq_core.quality.perplexity import Progress, check_head_dims, effective_bits

OWN: dict[str, Callable[..., list[dict[str, str]]]] = {
    "needle": retrieval.needles,
    "kv_retrieval": retrieval.lookups,
}
"""Tasks whose samples are generated."""
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
    Raises `KvqError` where lm-evaluation-harness is missing, a task is unknown or its data can't be had.
    """
    for policy in policies:
        check_head_dims(model.geometry, policy)
    simple_evaluate, manager, KvqLM = _harness(names, folder)
    with _quietly():
        lm = KvqLM(model, batch_size=batch_size)
    specs = [
        _spec(name, lm, folder, limit or OWN_SAMPLES, num_fewshot, context_len, seed) or name
        for name in names
    ]
    start, rows, complete = time.perf_counter(), [], True
    try:
        for index, policy in enumerate(policies):
            if progress:
                progress(index + 1, len(policies))
            lm.policy = policy
            with _quietly(), _translated(names):
                found = simple_evaluate(
                    lm,
                    tasks=specs,
                    task_manager=manager,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    batch_size=batch_size,
                    bootstrap_iters=1000,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            samples = {task: counts["effective"] for task, counts in found["n-samples"].items()}
            bits = effective_bits(model.geometry, policy, context_len)
            rows.append(TaskRow(policy, _scores(found["results"]), samples, bits))
    except KeyboardInterrupt:
        complete = False
    return TaskResult(rows, time.perf_counter() - start, complete)


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
    from lm_eval import simple_evaluate
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
    return simple_evaluate, manager, KvqLM


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
        room = min(context_len, lm.loaded.geometry.max_model_len)
        rows: list[dict[str, Any]] = OWN[name](lambda text: len(lm.tok_encode(text)), room, samples, seed)
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
def _quietly():  # type: ignore[no-untyped-def]
    """No progress bars, tables and advice from the harness."""
    logger = logging.getLogger("lm_eval")
    before, silence = logger.level, io.StringIO()
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(silence), redirect_stdout(silence):
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _translated(names: Sequence[str]):  # type: ignore[no-untyped-def]
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
