"""`kvq compare`: policies, or records of earlier runs, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from kvq_cli import console
from kvq_cli.benchmark import DEFINITIONS_HELP, LoadPlan, Session, emit_tables, load_options, measure_policies
from kvq_cli.options import DEFAULT_MODEL, OUTPUT_PANEL, Json, Model, OutputFile, Policies, engine_options
from kvq_core.config import EngineConfig
from kvq_core.errors import UsageError
from kvq_core.policies import parse_policies


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
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the others are measured against: a label, or a policy's name or number.",
            show_default="the first",
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
        raise UsageError("--json, --markdown and --csv are one or the other", "--output writes JSON beside any of them")
    if bool(files) == bool(policies):
        raise UsageError(
            "`kvq compare` takes files of records, or --policies to measure" + ", not both" * bool(files),
            "`kvq compare --policies 0,8,4,42`, or `kvq compare A.json B.json`",
        )
    session = _read(files, output) if files else _run(policies, baseline, model, plan, config, output)

    from kvq_core.bench import report
    from kvq_core.bench.compare import compare_records

    if baseline and session.interrupted:
        baseline = None if not _has(session, baseline) else baseline
    comparison = compare_records(session.records, baseline)
    warnings = comparison.warnings()
    if json:
        console.emit_json(session.documents(comparison.documents()))
    elif markdown:
        console.emit(report.markdown(comparison))
    elif csv:
        console.emit(report.csv(comparison))
    else:
        emit_tables(report.comparison_tables(comparison), report.comparison_notes(comparison), [])
    if not markdown:
        for warning in warnings:
            console.warn(warning)
    session.save(comparison.documents())
    if output:
        console.say(f"wrote {output}")
    session.finish()
