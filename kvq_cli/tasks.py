"""The part of `kvq eval` that scores policies on tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvq_cli import console
from kvq_core.config import EngineConfig
from kvq_core.errors import UsageError
from kvq_core.policies import Policy

if TYPE_CHECKING:
    from kvq_core.bench.record import RunRecord
    from kvq_core.quality.tasks import TaskResult

CPU_SAMPLES = 20
"""Samples of each task without `--limit`, on a CPU."""


def parse_tasks(text: str) -> list[str]:
    """A comma-separated list of tasks, without repeats."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError("no task given", "for example `--tasks lambada,arc_easy`")
    return names


def score(
    names: Sequence[str],
    policies: Sequence[Policy],
    model: str,
    config: EngineConfig,
    *,
    folder: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    context_len: int,
) -> tuple["TaskResult", list["RunRecord"]]:
    """Score every policy on every task; one record a policy.

    Ctrl-C is raised where not one policy was finished, and else gives incomplete records.
    """
    from kvq_core.quality.tasks import check_names, evaluate_tasks

    check_names(names, folder)
    with console.progress(f"loading {model}"):
        from kvq_core.models import load_model

        loaded = load_model(model, dtype=config.dtype, device=config.device, tp=config.tp)
    if limit is None:
        limit = CPU_SAMPLES if loaded.device.type == "cpu" else 0
    console.say(f"{', '.join(names)}: {f'the first {limit} samples' if limit else 'all samples'} of each")
    with console.progress(f"scoring {len(policies)} policies") as update:
        result = evaluate_tasks(
            loaded,
            names,
            policies,
            folder=folder,
            limit=limit or None,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            context_len=context_len,
            seed=config.seed,
            progress=lambda done, total: update(done=done, total=total),
        )
    if not result.rows:
        raise KeyboardInterrupt
    from kvq_core.bench.env import collect_env
    from kvq_core.bench.record import RunRecord, without_folder

    env = collect_env(seed=config.seed, device=str(loaded.device))
    workload = {
        "kind": "tasks",
        "name": ", ".join(names),
        "limit": limit or None,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "context_len": context_len,
        "read_back": "log-likelihoods in one forward, generation through the engine",
    }
    records = [
        RunRecord(
            label=row.policy.label,
            complete=result.complete,
            policy=row.policy.describe(),
            model=without_folder(loaded.describe()),
            env=env,
            workload={**workload, "samples": row.samples, "scores": list(row.scores)},
            kv={"bits_per_element": row.bits_per_element},
            metrics={
                **row.scores,
                "duration": result.seconds,
                "completed": sum(row.samples.values()),
                "failed": 0,
            },
        )
        for row in result.rows
    ]
    return result, records


def emit_scores(result: "TaskResult") -> None:
    """A row a policy, a column a score, each with its standard error."""
    from kvq_core.bench.scores import score_text

    names = [name for name in result.rows[0].scores if not name.endswith("_stderr")]
    rows = [
        [
            row.policy.label,
            f"{row.bits_per_element:.2f}",
            *(score_text(row.scores.get(name), row.scores.get(f"{name}_stderr")) for name in names),
        ]
        for row in result.rows
    ]
    title = "tasks" if result.complete else f"tasks (interrupted after {len(result.rows)} policies)"
    console.emit_table(title, ["policy", "bits", *names], rows)
