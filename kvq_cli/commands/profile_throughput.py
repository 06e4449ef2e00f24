"""`kvq profile-throughput`: replay requests under one policy and measure."""

from typing import Annotated

import typer

from kvq_cli import console
from kvq_cli.benchmark import DEFINITIONS_HELP, emit_tables, measure_policies
from kvq_cli.load_options import LoadPlan, Repeats, load_options
from kvq_cli.options import DEFAULT_MODEL, OUTPUT_PANEL, BenchModel, Json, OutputFile, engine_options
from kvq_cli.remote import (
    KEY_VARIABLE,
    Api,
    ApiKeyEnv,
    BaseUrl,
    LoadProcesses,
    ServedModel,
    find_server,
    measure_servers,
)
from kvq_core.config import EngineConfig
from kvq_core.errors import UsageError


@engine_options(without=("max_num_seqs",))
@load_options
def profile_throughput(
    model: BenchModel = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Name of the run in tables.",
            show_default="the policy's name",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    repeats: Repeats = 1,
    base_url: BaseUrl = None,
    api: Api = "completions",
    served_model: ServedModel = None,
    api_key_env: ApiKeyEnv = KEY_VARIABLE,
    load_processes: LoadProcesses = 1,
    output: OutputFile = None,
    json: Json = False,
    *,
    plan: LoadPlan,
    config: EngineConfig,
) -> None:
    if base_url is None:
        if load_processes > 1:
            raise UsageError("--load-processes needs --base-url", "an engine of our own needs no clients")
        if api != "completions":
            raise UsageError("--api needs --base-url", "an engine of our own is not asked over HTTP")
        if served_model is not None:
            raise UsageError("--served-model needs --base-url", "--model names the model that is run here")
        policy = config.resolved_policy()
        session = measure_policies(
            DEFAULT_MODEL if model is None else model,
            config,
            [policy],
            plan,
            output,
            label=label,
            repeats=repeats,
            as_list=repeats > 1,
        )
    else:
        server = find_server(base_url, api, served_model, api_key_env, label=label, processes=load_processes)
        session = measure_servers([server], model, config, plan, output, repeats=repeats, as_list=repeats > 1)
    documents = [record.to_dict() for record in session.records]
    if json:
        console.emit_json(session.documents(documents))
    else:
        from kvq_core.bench.compare import compare_records
        from kvq_core.bench.report import run_notes, run_tables

        comparison = compare_records(session.records)
        tables = run_tables(comparison.records[0])
        emit_tables(tables, run_notes(comparison), comparison.warnings())
    session.save(documents)
    if output:
        console.say(f"wrote {output}")
    session.finish()


profile_throughput.__doc__ = f"""Replay requests under one policy, and measure throughput and latency.

With nothing else given, the demo model answers the conversations that ship with kvq.

kvq profile-throughput --policy 42 --concurrency 64
kvq profile-throughput --policy 42 --concurrency 64 --repeats 5
kvq profile-throughput --model Qwen/Qwen3-8B --policy 42 --dataset-path hub --num-prompts 1000
kvq profile-throughput --model qwen3-30b-a3b --load-format dummy --dataset-name fixed --input-len 8192
kvq profile-throughput --base-url http://127.0.0.1:8000 --model Qwen/Qwen3-8B --request-rate 4

{DEFINITIONS_HELP}
"""
