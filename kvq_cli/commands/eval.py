"""`kvq eval`: what a policy does to a model's predictions."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_cli import console
from kvq_cli.options import (
    CHECK_PANEL,
    DEFAULT_MODEL,
    Json,
    Model,
    OutputFile,
    Policies,
    engine_options,
    naming,
    parse_fraction,
)
from kvq_cli.sensitivity import (
    DEFAULT_BUDGET,
    DEFAULT_POLICY,
    only_policy,
    parse_budget,
    propose_layers,
    show_ranking,
)
from kvq_cli.tasks import CPU_SAMPLES, emit_scores, parse_tasks, score
from kvq_core.bench.record import RunRecord, check_output, without_folder, write_records
from kvq_core.config import EngineConfig
from kvq_core.errors import INTERRUPTED, CheckFailed, UsageError
from kvq_core.policies import parse_policies

if TYPE_CHECKING:
    from kvq_core.models import LoadedModel
    from kvq_core.quality.perplexity import Result, Row
    from kvq_core.quality.text import Windows

TEXT_PANEL, LAYERS_PANEL, TASKS_PANEL = "Text", "Layers", "Tasks"
DEFAULT_POLICIES = "0,8,4,42"
CPU_LIMIT, GPU_LIMIT = 4, 32
"""Windows without `--limit`."""
NOT_HERE = (
    "policy", "kv_memory", "gpu_memory_utilization", "page_size", "load_format", "max_num_seqs",
    "prefill_chunk", "prefix_caching", "max_model_len", "enforce_eager", "fidelity",
)  # fmt: skip


@engine_options(without=NOT_HERE)
def eval(
    policies: Policies = DEFAULT_POLICIES,
    model: Model = DEFAULT_MODEL,
    dataset_path: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="A text file, UTF-8.",
            show_default="the shipped conversations",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    context_len: Annotated[
        int,
        typer.Option(
            min=2, metavar="N", help="Tokens of a window, or of a generated task.", rich_help_panel=TEXT_PANEL
        ),
    ] = 1024,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Measure this many windows from the start of the text, or samples of each task; 0: all.",
            show_default=f"{CPU_LIMIT} windows or {CPU_SAMPLES} samples on a CPU; {GPU_LIMIT}, all on a GPU",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
    through_engine: Annotated[
        bool,
        typer.Option(
            "--through-engine",
            help="Decode the text token by token from the paged cache: slow, and the same figures.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Rank the layers by the KL divergence that each costs, and propose codecs for them, beside "
            "one policy (--policies; else 42). Takes two forwards a layer and window.",
            rich_help_panel=LAYERS_PANEL,
        ),
    ] = False,
    budget: Annotated[
        Any,
        typer.Option(
            parser=parse_budget,
            metavar="SIZE",
            help="For --sensitivity: bytes per token, all layers: a multiple of the policy's, `1.1x`, or a "
            "number, as `20000` or `20KiB`.",
            show_default=f"{DEFAULT_BUDGET}x",
            rich_help_panel=LAYERS_PANEL,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Score tasks in place of a text: needle, kv_retrieval (made here); lambada, arc_easy, "
            "arc_challenge, hellaswag, mmlu, gsm8k from --tasks-path; any other of lm-evaluation-harness, "
            "with data from the hub.",
            show_default=False,
            rich_help_panel=TASKS_PANEL,
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the tasks' files are: lambada*.jsonl, arc_easy*.jsonl, hellaswag*.jsonl, "
            "gsm8k*.jsonl, mmlu/; and task YAML files of your own.",
            show_default=False,
            rich_help_panel=TASKS_PANEL,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Worked examples before each sample.",
            show_default="the task's own",
            rich_help_panel=TASKS_PANEL,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Samples of a forward.", rich_help_panel=TASKS_PANEL),
    ] = 1,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="Exit with code 3 if a policy's mean KL divergence is above this.",
            rich_help_panel=CHECK_PANEL,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(
            parser=naming("--max-ppl-increase", parse_fraction),
            metavar="SHARE",
            help="Exit with code 3 if a policy raises the perplexity by more than this share: 0.01 or 1%.",
            rich_help_panel=CHECK_PANEL,
        ),
    ] = None,
    output: OutputFile = None,
    json: Json = False,
    *,
    config: EngineConfig,
) -> None:
    """Measure perplexity and drift of policies on a text, or their scores on tasks.

    Every key and value is read back through its codec, as in decoding; prefill
    over fresh ones would hide the quantization. The text is cut into windows
    from its start; tokens 2 … N of each are predicted.

    ppl: perplexity. KL: divergence from the predictions with an unquantized
    cache, nats per token. top-1: share of tokens whose likeliest successor
    stays the same. bits: codes, metadata and unquantized tokens, per element
    of a request as long as a window.

    On a CPU, float32 models are computed in float64. In float32 the order of
    a sum decides on which side of an edge between two codes a number falls,
    and two runs that are equally right differ by 2 or 3% in the KL of a 3-bit
    policy.

    Tasks are run by lm-evaluation-harness: log-likelihoods with every key and
    value read back, generation through the engine. With policy none, scores are
    those of its own Hugging Face backend. They come with standard errors.

    kvq eval --policies none,int8,42 --dataset-path book.txt --context-len 2048
    kvq eval --policies 42 --sink 4 --recent 128 --max-kl 0.02
    kvq eval --policies 42 --sensitivity --budget 1.1x --dataset-path book.txt
    kvq eval --policies none,8,42 --tasks needle,kv_retrieval --context-len 2048
    kvq eval --policies none,42 --tasks lambada,arc_easy --tasks-path data/ --limit 200
    """
    if sensitivity and policies == DEFAULT_POLICIES:
        policies = DEFAULT_POLICY
    if budget is not None and not sensitivity:
        raise UsageError("--budget is for --sensitivity", "add `--sensitivity`, or leave it out")
    if sensitivity and tasks is not None:
        raise UsageError("--sensitivity and --tasks exclude each other", "layers are ranked on a text")
    if sensitivity and config.tp > 1:
        raise UsageError("--sensitivity needs --tp 1", "each rank sees the keys and values of its own heads")
    chosen = [config.with_policy(policy).resolved_policy() for policy in parse_policies(policies)]
    start = only_policy(chosen) if sensitivity else None
    if tasks is not None:
        _refuse_with_tasks(dataset_path, through_engine, max_kl, max_ppl_increase)
        names = parse_tasks(tasks)
        if output:
            check_output(output)
        scored, records = score(
            names,
            chosen,
            model,
            config,
            folder=tasks_path,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            context_len=context_len,
        )
        _report(records, lambda: emit_scores(scored), output, json)
        return
    for flag, given in (("--tasks-path", tasks_path), ("--num-fewshot", num_fewshot)):
        if given is not None:
            raise UsageError(f"{flag} goes with --tasks", "for example `--tasks lambada,arc_easy`")
    from kvq_core.quality.text import read_text, sample_text

    text, name = (read_text(dataset_path), dataset_path.name) if dataset_path else sample_text()
    if output:
        check_output(output, others=[("--dataset-path", dataset_path)])
    with console.progress(f"loading {model}"):
        from kvq_core.quality.perplexity import evaluate, load_for_evaluation

        loaded = load_for_evaluation(model, dtype=config.dtype, device=config.device, tp=config.tp)
    from kvq_core.quality.text import cut_windows

    if limit is None:
        limit = CPU_LIMIT if loaded.device.type == "cpu" else GPU_LIMIT
    windows = cut_windows(loaded, text, name, context_len=context_len, limit=limit)
    count = windows.ids.shape[0]
    console.say(f"{name}: {count} of {windows.available} windows of {context_len} tokens")
    found = None
    if start is not None:
        budget = DEFAULT_BUDGET if budget is None else budget
        found = propose_layers(loaded, windows, start, budget, config.key_bias)
        chosen = list(dict.fromkeys((start, found[1].policy)))
    with console.progress(f"measuring {len(chosen)} policies") as update:
        result = evaluate(
            loaded,
            windows,
            chosen,
            through_engine=through_engine,
            key_bias=config.key_bias,
            progress=lambda done, total: update(done=done, total=total),
        )
    if not result.rows:
        raise KeyboardInterrupt
    records = _records(loaded, windows, result, config, through_engine)
    if found is not None and start is not None:
        from kvq_core.quality.sensitivity import describe

        records[-1].kv["sensitivity"] = describe(*found)
        if not json:
            show_ranking(*found, start)
    _report(records, lambda: _emit(result), output, json)
    _check(result, max_kl, max_ppl_increase)


def _refuse_with_tasks(dataset_path: Path | None, *others: object) -> None:
    flags = ("--dataset-path", "--through-engine", "--max-kl", "--max-ppl-increase")
    for flag, given in zip(flags, (dataset_path, *others), strict=True):
        if given is not None and given is not False:
            raise UsageError(f"{flag} is about a text, and --tasks measures none", "run `kvq eval` twice")


def _report(
    records: list[RunRecord], emit_table: Callable[[], None], output: Path | None, json: bool
) -> None:
    """Records as JSON or as a table, and in a file; exits where they are incomplete, after Ctrl-C."""
    documents: Any = [record.to_dict() for record in records]
    documents = documents if len(documents) > 1 else documents[0]
    if json:
        console.emit_json(documents)
    else:
        emit_table()
    if output:
        write_records(output, documents)
        console.say(f"wrote {output}")
    if not all(record.complete for record in records):
        raise typer.Exit(INTERRUPTED)


def _emit(result: "Result") -> None:
    """A row a policy."""
    title = "quality" if result.complete else f"quality (interrupted after {result.windows} windows)"
    columns = ["policy", "bits", "ppl", "change", "KL", "KL median", "KL p99", "top-1"]
    console.emit_table(title, columns, [_cells(row, result) for row in result.rows])


def _cells(row: "Row", result: "Result") -> list[str]:
    figures = row.figures
    return [
        row.policy.label,
        f"{row.bits_per_element:.2f}",
        f"{figures.ppl:.3f}",
        f"{figures.ppl / result.reference_ppl - 1:+.2%}",
        f"{figures.kl:.5f}",
        f"{figures.kl_median:.5f}",
        f"{figures.kl_p99:.4f}",
        f"{figures.top1:.2%}",
    ]


def _records(
    model: "LoadedModel", windows: "Windows", result: "Result", config: EngineConfig, through_engine: bool
) -> list[RunRecord]:
    """A run record for each policy, with the figures at its top level."""
    from kvq_core.bench.env import collect_env

    env = collect_env(seed=config.seed, device=str(model.device))
    workload = windows.describe() | {
        "kind": "quality",
        "windows": result.windows,
        "read_back": "by decoding through the engine" if through_engine else "in one forward a window",
    }
    described = without_folder(model.describe())
    return [
        RunRecord(
            label=row.policy.label,
            complete=result.complete,
            policy=row.policy.describe(),
            model=described,
            env=env,
            workload=workload,
            kv={"bits_per_element": row.bits_per_element, "key_bias": config.key_bias},
            metrics={
                **row.to_dict(),
                "reference_ppl": result.reference_ppl,
                "duration": result.seconds,
                "completed": result.windows,
                "failed": 0,
            },
        )
        for row in result.rows
    ]


def _check(result: "Result", max_kl: float | None, max_ppl_increase: float | None) -> None:
    """`CheckFailed` where a policy is worse than what was asked for."""
    for row in result.rows:
        kl, increase = row.figures.kl, row.figures.ppl / result.reference_ppl - 1
        if max_kl is not None and not kl <= max_kl:  # nor is NaN
            raise CheckFailed(
                f"{row.policy.label}: KL divergence {kl:.5f} is above --max-kl {max_kl:g}",
                "a policy with more bits, or `--sink 4 --recent 128`, drifts less",
            )
        if max_ppl_increase is not None and not increase <= max_ppl_increase:
            raise CheckFailed(
                f"{row.policy.label}: perplexity rises by {increase:.2%}, above --max-ppl-increase "
                f"{max_ppl_increase:.2%}",
                "a policy with more bits, or `--sink 4 --recent 128`, drifts less",
            )
