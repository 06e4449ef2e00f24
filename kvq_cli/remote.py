"""`kvq profile-throughput --base-url`: the same load on a server that speaks OpenAI's API."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_cli import console
from kvq_cli.benchmark import Session, replay
from kvq_cli.load_options import LoadPlan
from kvq_cli.options import DEFAULT_MODEL, DEFAULTS, ENGINE_FLAGS
from kvq_core.config import EngineConfig
from kvq_core.errors import KvqError, UsageError

if TYPE_CHECKING:
    from kvq_core.bench.workload import Workload

SERVER_PANEL = "Server"
APIS = ("completions", "chat")
KEY_VARIABLE = "OPENAI_API_KEY"
CLIENT_FLAGS = ("seed", "max_model_len")
"""Of the engine's flags those that also mean something to a client."""


def parse_api(text: str) -> str:
    if text not in APIS:
        raise UsageError(f"unknown --api `{text}`", f"use one of {', '.join(APIS)}")
    return text


BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        metavar="URL",
        help="Measure this OpenAI-compatible server instead of an engine of our own, as in "
        "http://127.0.0.1:8000. --model then names the tokenizer.",
        show_default=False,
        rich_help_panel=SERVER_PANEL,
    ),
]
Api = Annotated[
    str,
    typer.Option(
        "--api",
        metavar="NAME",
        parser=parse_api,
        help="completions: prompts are sent as token ids. chat: as the text of one user's message.",
        rich_help_panel=SERVER_PANEL,
    ),
]
ServedModel = Annotated[
    str | None,
    typer.Option(
        "--served-model",
        metavar="NAME",
        help="The model's name on the server.",
        show_default="the only one that it has",
        rich_help_panel=SERVER_PANEL,
    ),
]
ApiKeyEnv = Annotated[
    str,
    typer.Option(
        "--api-key-env",
        metavar="NAME",
        help="Environment variable that holds the server's key, if it wants one.",
        rich_help_panel=SERVER_PANEL,
    ),
]


@dataclass(frozen=True)
class Server:
    """Where to send requests."""

    base_url: str
    api: str
    served_model: str | None
    key: str | None


def find_server(base_url: str, api: str, served_model: str | None, api_key_env: str) -> Server:
    """The server of the flags; raises `UsageError` where the variable that was named is not set."""
    key = os.environ.get(api_key_env)
    if key is None and api_key_env != KEY_VARIABLE:
        raise UsageError(f"--api-key-env {api_key_env}: no such environment variable", "export it first")
    return Server(base_url, api, served_model, key)


def measure_server(
    server: Server,
    tokenizer_name: str,
    config: EngineConfig,
    plan: LoadPlan,
    output: Path | None,
    label: str | None,
) -> Session:
    """Replay requests on a server. Ctrl-C and a broken server end up in the session."""
    from kvq_core.bench.env import collect_env
    from kvq_core.bench.http_target import HttpTarget, find_served_model, normalize_url
    from kvq_core.bench.record import check_output
    from kvq_core.bench.workload import make_workload, read_dataset

    _check_flags(config, plan)
    normalize_url(server.base_url)
    dataset = read_dataset(plan.spec)
    if output:
        check_output(output)
    model = server.served_model or find_served_model(server.base_url, server.key)
    tokenizer = _load_tokenizer(model if tokenizer_name == DEFAULT_MODEL else tokenizer_name)
    workload = make_workload(
        replace(
            plan.resolve(on_cpu=False, available=len(dataset.entries) if dataset else None), seed=config.seed
        ),
        dataset,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        max_len=config.max_model_len,
    )
    if server.api == "chat":
        workload = as_text(workload, tokenizer)
    target = HttpTarget(server.base_url, model, api=server.api, key=server.key, tokenizer=tokenizer)
    session = Session(output, as_list=False)
    try:
        measurement = replay(
            target,
            workload,
            replace(plan.load, seed=config.seed),
            plan.limits,
            label or model,
            env=collect_env(seed=config.seed),
            label=label or model,
        )
    finally:
        target.close()
    session.interrupted = measurement.load.interrupted
    session.add(measurement.record, measurement.rows)
    session.error = session.error or measurement.load.error
    return session


def as_text(workload: "Workload", tokenizer: Any) -> "Workload":
    """The workload with prompts as text, which is what the chat API takes."""

    def decode(prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=True)

    return replace(
        workload,
        requests=[replace(request, prompt=decode(request.prompt)) for request in workload.requests],
        warmup=[replace(request, prompt=decode(request.prompt)) for request in workload.warmup],
    )


def _check_flags(config: EngineConfig, plan: LoadPlan) -> None:
    """Refuse flags that only an engine of our own could follow."""
    changed = [
        name
        for name in ENGINE_FLAGS
        if name not in CLIENT_FLAGS and str(getattr(config, name)) != str(getattr(DEFAULTS, name))
    ] + ["max_num_seqs"] * (plan.max_num_seqs is not None)
    if changed:
        raise UsageError(
            f"--{changed[0].replace('_', '-')} is up to the server that --base-url names",
            "leave it out, and set it where the server is started",
        )


def _load_tokenizer(name: str) -> Any:
    with console.progress(f"loading the tokenizer of {name}"):
        from kvq_core.models.load import load_tokenizer

        try:
            tokenizer = load_tokenizer(name)
        except KvqError as error:
            raise KvqError(
                f"no tokenizer of {name}: {error.message}", "--model names a hub id or a folder that has it"
            ) from error
    if tokenizer is None:
        raise KvqError(f"{name} has no tokenizer", "--model names a hub id or a folder that has it")
    return tokenizer
