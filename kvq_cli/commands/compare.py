"""`kvq compare`: policies, or records of earlier runs, side by side."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq_cli import console
from kvq_cli.benchmark import DEFINITIONS_HELP, Session, emit_tables, measure_policies
from kvq_cli.load_options import LOAD_PANEL, LoadPlan, Repeats, load_options
from kvq_cli.options import (
    CHECK_PANEL,
    DEFAULT_MODEL,
    OUTPUT_PANEL,
    BenchModel,
    Json,
    OutputFile,
    Policies,
    engine_options,
    naming,
    parse_fraction,
)
from kvq_cli.remote import KEY_VARIABLE, ApiKeyEnv, LoadProcesses, Targets, find_servers, measure_servers
from kvq_core.bench.sweep import Point, parse_sweep
from kvq_core.config import EngineConfig
from kvq_core.errors import CheckFailed, KvqError, UsageError
from kvq_core.policies import Policy, parse_policies

if TYPE_CHECKING:
    from kvq_core.bench.compare import Comparison


EQUAL_MEMORY, EQUAL_BATCH = "equal-memory", "equal-batch"


def parse_mode(text: str) -> str:
    """The value of --mode; `UsageError` for an unknown one."""
    if text not in (EQUAL_MEMORY, EQUAL_BATCH):
        raise UsageError(f"unknown --mode `{text}`", f"use {EQUAL_MEMORY} or {EQUAL_BATCH}")
    return text


@engine_options(without=("policy", "max_num_seqs"))
@load_options
def compare(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RECORD.json]...",
            help="Files written by `--output`; each holds one record or a list of them.",
            show_default=False,
        ),
    ] = None,
    policies: Policies = "",
    repeats: Repeats = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="AXIS=N,N...",
            help="Measure every policy at each combination of these: concurrency=1,8,64 (requests in flight) "
            "and context=512,2048 (tokens of prompts, answered by --output-len tokens). With --output, each "
            "record is written as its cell finishes.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar="MODE",
            parser=parse_mode,
            help="equal-memory: the same memory for every policy, --concurrency requests in flight; those "
            "that do not fit wait, so that policies that pack more run more. equal-batch: all of them must "
            "fit under every policy, so that steps of the same size are compared.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = EQUAL_MEMORY,
    capacity: Annotated[
        bool,
        typer.Option(
            "--capacity",
            help="Measure where memory is the limit: every policy gets the same --kv-memory and more "
            "requests than fit; a warning says so where the baseline had memory to spare.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an interrupted run with the same flags stopped: what --output has already is "
            "not measured again.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the others are measured against: a label, or a policy's name or number.",
            show_default="the first",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    fail_on_regression: Annotated[
        float | None,
        typer.Option(
            parser=naming("--fail-on-regression", parse_fraction),
            metavar="SHARE",
            help="Exit with code 3 where output throughput, mean TTFT or mean TPOT is worse by more than "
            "this share (0.05 or 5%), or was not measured wholly. They are held against the baseline's or, "
            "with several files, against those of the same policy and load in the first.",
            rich_help_panel=CHECK_PANEL,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a report: one page with charts and tables, which needs no network; --quality adds "
            "quality against bits.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            "--slo",
            metavar="LIMIT...",
            help="Recommend the quickest policy that meets all of these at p99, in milliseconds: ttft:500 "
            "tpot:50 e2el:20000.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="Recommend the quickest policy whose KL divergence, by --quality, is at most this, and say "
            "from which load on the others pay.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    quality: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="What `kvq eval --output` wrote: quality to show beside speed, and for --max-kl. May be "
            "repeated.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    target: Targets = None,
    load_processes: LoadProcesses = 1,
    api_key_env: ApiKeyEnv = KEY_VARIABLE,
    model: BenchModel = None,
    output: OutputFile = None,
    json: Json = False,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print a Markdown table.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    csv: Annotated[
        bool,
        typer.Option("--csv", help="Print CSV, with every figure.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    *,
    plan: LoadPlan,
    config: EngineConfig,
) -> None:
    if json + markdown + csv > 1:
        raise UsageError(
            "--json, --markdown and --csv are one or the other", "--output writes JSON beside any of them"
        )
    if bool(files) + bool(policies) + bool(target) != 1:
        both = bool(files) + bool(policies) + bool(target) > 1
        raise UsageError(
            "`kvq compare` takes files of records, --policies or --target" + ", one of them" * both,
            "`kvq compare --policies 0,8,4,42`, `kvq compare A.json B.json`, or `--target vllm=URL`",
        )
    if files:
        _refuse_load(plan, config, repeats=repeats != 1, mode=mode != EQUAL_MEMORY, model=model is not None)
    if load_processes > 1 and not target:
        raise UsageError("--load-processes needs --target", "an engine of our own needs no clients")
    if target and resume:
        raise UsageError("--resume goes with --policies", "servers are measured anew")
    if max_kl is not None and not quality:
        raise UsageError(
            "--max-kl needs --quality",
            "`kvq eval --policies … --output quality.json`, then `--quality quality.json --max-kl 0.02`",
        )
    if capacity:
        _check_capacity(bool(policies), mode, config)
    from kvq_core.bench.advice import Limits, read_quality
    from kvq_core.bench.metrics import parse_limits
    from kvq_core.bench.record import check_output, read_records, write_text

    limits = Limits(max_kl, parse_limits(slo or (), "--slo"))
    read = [*(("--quality", file) for file in quality or ()), ("--dataset-path", plan.spec.file)]
    if html:
        given = [(str(file), file) for file in files or ()]
        check_output(html, "--html", [*read, *given, ("--output", output)])
    if output:
        check_output(output, others=read)
    points = _check_sweep(sweep, resume, not files, output)
    measured_quality = read_quality(quality) if quality else None
    before = 0
    if files:
        session = _read(files, output)
        if len(files) > 1 and baseline is None:
            before = len(read_records(files[:1]))
    elif target:
        servers = find_servers(target, api_key_env, load_processes)
        session = measure_servers(
            servers, model, config, plan, output, repeats=repeats, points=points, as_list=True
        )
    else:
        chosen = parse_policies(policies)
        _check_baseline(baseline, chosen, config)
        session = measure_policies(
            DEFAULT_MODEL if model is None else model,
            config,
            chosen,
            plan,
            output,
            repeats=repeats,
            points=points,
            equal_batch=mode == EQUAL_BATCH,
            resume=resume,
            as_list=True,
        )
        if baseline and not any(record.is_called(baseline) for record in session.records):
            console.warn(f"the baseline {baseline} was not measured; the first policy takes its place")
            baseline = None

    from kvq_core.bench import report
    from kvq_core.bench.advice import advise, quality_warnings
    from kvq_core.bench.breakeven import break_even_table, sentences
    from kvq_core.bench.compare import compare_records
    from kvq_core.bench.scores import collect_scores

    comparison = compare_records(session.records, baseline)
    warnings, advice = comparison.warnings(), list[str]()
    if capacity:
        warnings += comparison.memory_to_spare()
    scores = collect_scores([*session.records, *(measured_quality.records if measured_quality else ())])
    if max_kl is not None or limits.slo:
        advice = advise(comparison, measured_quality, limits)
    else:
        advice = sentences(comparison)
    kl = measured_quality.of if measured_quality else None
    if measured_quality is not None:
        warnings += quality_warnings(comparison, measured_quality)
    if html:
        from kvq_core.bench.html import page

        records = measured_quality.records if measured_quality else ()
        text = page(comparison, advice=advice, warnings=warnings, quality=records, kl=kl)
    if json:
        console.emit_json(session.documents(comparison.documents()))
    elif markdown:
        console.emit(report.markdown(comparison, advice, kl, scores))
    elif csv:
        console.emit(report.csv(comparison))
    else:
        even = break_even_table(comparison)
        tables = [*report.comparison_tables(comparison, kl, scores), *([even] if even else [])]
        emit_tables(tables, [*report.comparison_notes(comparison), *advice], [])
    if json or csv:
        for line in advice:
            console.say(line)
    for warning in warnings:
        console.warn(warning)
    session.save(comparison.documents())
    if output:
        console.say(f"wrote {output}")
    if html:
        write_text(html, text, "--html")
        console.say(f"wrote {html}")
    session.finish()
    if fail_on_regression is not None:
        _check_regressions(comparison, fail_on_regression, before)


def _refuse_load(plan: LoadPlan, config: EngineConfig, **others: bool) -> None:
    """Records were measured already: refuse flags that say how to measure."""
    default = EngineConfig()
    engine = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    given = [*plan.asked, *engine, *(name for name, is_given in others.items() if is_given)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"{flags}: this says how to measure, and the records in these files are measured",
            "leave it out, or measure with `--policies`",
        )


def _check_sweep(sweep: list[str] | None, resume: bool, measures: bool, output: Path | None) -> list[Point]:
    """The cells of --sweep; nothing that was measured may be overwritten."""
    points = parse_sweep(sweep or ())
    if (sweep or resume) and not measures:
        flag = "--sweep" if sweep else "--resume"
        raise UsageError(f"{flag} goes with --policies", f"`kvq compare --policies 0,42 {flag} …`")
    if resume and output is None:
        raise UsageError("--resume needs --output", "the file that the interrupted run wrote")
    if sweep and output and output.exists() and not resume:
        raise KvqError(
            f"{output} exists, and a sweep overwrites nothing",
            "`--resume` goes on with it; for a new sweep choose another --output",
        )
    return points


def _check_capacity(measures: bool, mode: str, config: EngineConfig) -> None:
    """Refuse --capacity where memory is not stated, or not the same for all."""
    if not measures:
        raise UsageError("--capacity goes with --policies", "records are compared as they were measured")
    if mode == EQUAL_BATCH:
        raise UsageError(
            "--capacity and --mode equal-batch exclude each other", "in an equal batch every request fits"
        )
    if config.kv_memory is None:
        raise UsageError(
            "--capacity needs --kv-memory", "state what every policy gets, as in `--kv-memory 16GiB`"
        )


def _check_regressions(comparison: "Comparison", share: float, before: int) -> None:
    pairs = comparison.pairs(before)
    if not pairs:
        raise UsageError(
            "--fail-on-regression has nothing to compare with",
            "give it two records or policies, of the same load",
        )
    worse = comparison.regressions(share, pairs)
    if worse:
        raise CheckFailed(
            f"worse than --fail-on-regression {share:.4g} allows: {'; '.join(worse)}",
            "than the baseline, or the first file; --repeats tells chance from change",
        )


def _read(files: list[Path], output: Path | None) -> Session:
    from kvq_core.bench.record import read_records, read_with_rows

    if output is None:
        return Session(None, as_list=True, records=read_records(files))
    records, rows = read_with_rows(files)
    return Session(output, as_list=True, records=records, rows=rows)


def _check_baseline(baseline: str | None, policies: list[Policy], config: EngineConfig) -> None:
    """Refuse a baseline that is none of the policies, before any of them is measured."""
    resolved = [config.with_policy(policy).resolved_policy() for policy in policies]
    names = {str(name) for policy in resolved for name in (policy.label, policy.name, policy.number)}
    if baseline is not None and baseline.lower() not in names:
        raise KvqError(
            f"--baseline {baseline} is none of the policies",
            f"use one of {', '.join(policy.label for policy in resolved)}",
        )


compare.__doc__ = f"""Put policies side by side: throughput, latency, memory, and changes against a baseline.

With --policies, one model load serves all of them: the same requests, one policy after another, with the same
memory for the cache. With files, compares earlier runs, made on any machine.

kvq compare --policies 0,8,4,42
kvq compare --policies 0,42 --model Qwen/Qwen3-8B --concurrency 128 --kv-memory 16GiB --output runs.json
kvq compare --policies 0,8,4,42 --capacity --kv-memory 16GiB --concurrency 256
kvq compare --policies 0,42 --repeats 5
kvq compare --policies 0,8,4,42 --sweep concurrency=1,8,64 context=512,2048 --output sweep.json --resume
kvq compare runs.json other.json --baseline none --markdown
kvq compare runs.json --quality tasks.json
kvq compare --policies 0,8,4,42 --quality quality.json --max-kl 0.02
kvq compare --target vllm=http://127.0.0.1:8000 --target kvq=http://127.0.0.1:8001 --model Qwen/Qwen3-8B
kvq compare sweep.json --slo ttft:500 tpot:50 --html report.html
kvq compare before.json after.json --fail-on-regression 5%

{DEFINITIONS_HELP}
"""
