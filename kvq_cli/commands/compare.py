"""`kvq compare`: policies, or records of earlier runs, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvq_cli import console
from kvq_cli.benchmark import DEFINITIONS_HELP, Session, emit_tables, measure_policies
from kvq_cli.load_options import LOAD_PANEL, LoadPlan, load_options
from kvq_cli.options import (
    CHECK_PANEL,
    DEFAULT_MODEL,
    OUTPUT_PANEL,
    Json,
    Model,
    OutputFile,
    Policies,
    engine_options,
    parse_fraction,
)
from kvq_core.config import EngineConfig
from kvq_core.errors import CheckFailed, KvqError, UsageError
from kvq_core.policies import Policy, parse_policies

if TYPE_CHECKING:
    from kvq_core.bench.compare import Comparison


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
    repeats: Annotated[
        int,
        typer.Option(
            "--repeats",
            min=1,
            metavar="N",
            help="Measure every policy N times, in turns, and show means with their 95% intervals.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = 1,
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
            parser=parse_fraction,
            metavar="SHARE",
            help="Exit with code 3 where output throughput, mean TTFT or mean TPOT is worse than the "
            "baseline's by more than this share: 0.05 or 5%.",
            rich_help_panel=CHECK_PANEL,
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
            help="What `kvq eval --output` wrote, to stand beside speed; --max-kl limits its KL divergence. "
            "May be repeated.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
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
    if bool(files) == bool(policies):
        raise UsageError(
            "`kvq compare` takes files of records, or --policies to measure" + ", not both" * bool(files),
            "`kvq compare --policies 0,8,4,42`, or `kvq compare A.json B.json`",
        )
    if max_kl is not None and not quality:
        raise UsageError(
            "--max-kl needs --quality",
            "`kvq eval --policies … --output quality.json`, then `--quality quality.json --max-kl 0.02`",
        )
    from kvq_core.bench.advice import advise, quality_warnings, read_quality

    measured_quality = read_quality(quality) if quality else None
    if files:
        session = _read(files, output)
    else:
        chosen = parse_policies(policies)
        _check_baseline(baseline, chosen, config)
        session = measure_policies(model, config, chosen, plan, output, repeats=repeats, as_list=True)
        if baseline and not any(record.is_called(baseline) for record in session.records):
            console.warn(f"the baseline {baseline} was not measured; the first policy takes its place")
            baseline = None

    from kvq_core.bench import report
    from kvq_core.bench.compare import compare_records
    from kvq_core.bench.scores import collect_scores

    comparison = compare_records(session.records, baseline)
    warnings, advice = comparison.warnings(), list[str]()
    scores = collect_scores([*session.records, *(measured_quality.records if measured_quality else ())])
    if measured_quality is not None:
        warnings += quality_warnings(comparison, measured_quality)
        if max_kl is not None:
            advice = advise(comparison, measured_quality, max_kl)
    if json:
        console.emit_json(session.documents(comparison.documents()))
    elif markdown:
        console.emit(report.markdown(comparison, advice, scores))
    elif csv:
        console.emit(report.csv(comparison))
    else:
        tables = report.comparison_tables(comparison, scores)
        emit_tables(tables, [*report.comparison_notes(comparison), *advice], [])
    if json or csv:
        for line in advice:
            console.say(line)
    for warning in warnings:
        console.warn(warning)
    session.save(comparison.documents())
    if output:
        console.say(f"wrote {output}")
    session.finish()
    if fail_on_regression is not None:
        _check_regressions(comparison, fail_on_regression)


def _check_regressions(comparison: "Comparison", share: float) -> None:
    if len(comparison.records) == 1:
        raise UsageError(
            "--fail-on-regression has nothing to compare with", "give it two records or policies"
        )
    worse = comparison.regressions(share)
    if worse:
        raise CheckFailed(
            f"worse than --fail-on-regression {share:.4g} allows: {'; '.join(worse)}",
            "the changes are against the baseline; --repeats tells chance from change",
        )


def _read(files: list[Path], output: Path | None) -> Session:
    from kvq_core.bench.record import check_output, read_records

    if output:
        check_output(output)
    return Session(output, as_list=True, records=read_records(files))


def _check_baseline(baseline: str | None, policies: list[Policy], config: EngineConfig) -> None:
    """Refuse a baseline that is none of the policies, before any of them is measured."""
    resolved = [config.replace(policy=policy).resolved_policy() for policy in policies]
    names = {str(name) for policy in resolved for name in (policy.label, policy.name, policy.number)}
    if baseline is not None and baseline.lower() not in names:
        raise KvqError(
            f"--baseline {baseline} is none of the policies",
            f"use one of {', '.join(policy.label for policy in resolved)}",
        )


compare.__doc__ = f"""Put policies side by side: throughput, latency, memory, and changes against a baseline.

With --policies, one model load serves all of them: the same requests, one policy after another, with the same
memory for the cache. With files, compares runs of earlier, on any machine.

kvq compare --policies 0,8,4,42
kvq compare --policies 0,42 --model Qwen/Qwen3-8B --concurrency 128 --kv-memory 16GiB --output runs.json
kvq compare --policies 0,42 --repeats 5
kvq compare runs.json other.json --baseline none --markdown
kvq compare runs.json --quality tasks.json
kvq compare --policies 0,8,4,42 --quality quality.json --max-kl 0.02
kvq compare before.json after.json --fail-on-regression 5%

{DEFINITIONS_HELP}
"""
