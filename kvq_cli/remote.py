"""`--base-url` and `--target`: the same load on servers that speak OpenAI's API, in turns."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_cli import console
from kvq_cli.benchmark import Session, replay
from kvq_cli.load_options import ANYWHERE, LoadPlan
from kvq_cli.options import DEFAULTS, ENGINE_FLAGS, SERVER_PANEL, api_key_from
from kvq_core.bench.sweep import Point
from kvq_core.config import EngineConfig
from kvq_core.errors import KvqError, UsageError

if TYPE_CHECKING:
    from kvq_core.bench.load import Load
    from kvq_core.bench.run import Measurement
    from kvq_core.bench.workload import Workload

KEY_VARIABLE = "OPENAI_API_KEY"
CLIENT_FLAGS = ("seed", "max_model_len")
"""Of the engine's flags those that also mean something to a client."""


def parse_api(text: str) -> str:
    """The name of an API; `UsageError` for one that is not known."""
    from kvq_core.bench.http_target import APIS

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


Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="NAME=URL",
        help="Measure this OpenAI-compatible server under this name instead of policies; may be repeated; "
        "servers take turns under the same load, by one clock. Further `,model=NAME` and `,api=chat`.",
        show_default=False,
        rich_help_panel=SERVER_PANEL,
    ),
]
LoadProcesses = Annotated[
    int,
    typer.Option(
        "--load-processes",
        min=1,
        metavar="N",
        help="Send requests to servers from N processes; each takes some ten thousand tokens a second. "
        "A run that they could not keep up with is marked generator_bound.",
        rich_help_panel=SERVER_PANEL,
    ),
]


@dataclass(frozen=True)
class Server:
    """Where to send requests, and from how many processes."""

    base_url: str
    api: str
    served_model: str | None
    key: str | None
    label: str | None = None
    processes: int = 1


def find_server(base_url: str, api: str, served_model: str | None, api_key_env: str, **more: Any) -> Server:
    """The server of the flags; raises `UsageError` where the variable that was named is not set."""
    key = os.environ.get(KEY_VARIABLE) if api_key_env == KEY_VARIABLE else api_key_from(api_key_env)
    return Server(base_url, api, served_model, key, **more)


def find_servers(targets: Sequence[str], api_key_env: str, processes: int) -> list[Server]:
    """The servers of `NAME=URL[,model=NAME][,api=chat]`."""
    servers: list[Server] = []
    for text in targets:
        head, *options = text.split(",")
        name, _, url = head.partition("=")
        known = dict(option.partition("=")[::2] for option in options)
        if not (name and url) or not known.keys() <= {"model", "api"} or not all(known.values()):
            raise UsageError(
                f"`{text}` is no --target", "as in `--target vllm=http://127.0.0.1:8000,model=NAME,api=chat`"
            )
        if name in {server.label for server in servers}:
            raise UsageError(f"--target has {name} twice", "give every server a name of its own")
        api = parse_api(known.get("api", "completions"))
        servers.append(
            find_server(url, api, known.get("model"), api_key_env, label=name, processes=processes)
        )
    return servers


def measure_servers(
    servers: Sequence[Server],
    tokenizer_name: str | None,
    config: EngineConfig,
    plan: LoadPlan,
    output: Path | None,
    *,
    repeats: int = 1,
    points: Sequence[Point] = (ANYWHERE,),
    as_list: bool,
) -> Session:
    """Replay the same requests on every server, in turns (A B C A B C) for every cell and repeat.

    Without the name of a tokenizer it is that of the first server's model.
    Ctrl-C and a broken server end up in the session.
    """
    from kvq_core.bench.env import collect_env
    from kvq_core.bench.http_target import find_served_model, normalize_url
    from kvq_core.bench.record import check_output
    from kvq_core.bench.workload import make_workload, read_dataset

    _check_flags(config, plan)
    for server in servers:
        normalize_url(server.base_url)
    dataset = read_dataset(plan.at(points[0]).spec)
    if output:
        check_output(output, others=[("--dataset-path", plan.spec.file)])
    models = [server.served_model or find_served_model(server.base_url, server.key) for server in servers]
    tokenizer = _load_tokenizer(models[0] if tokenizer_name is None else tokenizer_name)
    session = Session(output, as_list=as_list)
    env = collect_env(seed=config.seed)
    available = len(dataset.entries) if dataset else None
    runs = product(range(1, repeats + 1), points, zip(servers, models, strict=True))
    for repeat, point, (server, model) in runs:
        cell = plan.at(point)
        workload = make_workload(
            replace(cell.resolve(on_cpu=False, available=available), seed=config.seed),
            dataset,
            tokenizer=tokenizer,
            vocab_size=len(tokenizer),
            max_len=config.max_model_len,
        )
        if server.api == "chat":
            workload = as_text(workload, tokenizer)
        label = server.label or model
        name = ", ".join(filter(None, [label, point.label, f"run {repeat}" if repeats > 1 else ""]))
        load = replace(cell.load, seed=config.seed)
        try:
            measurement = _replay(server, model, tokenizer, workload, load, plan.limits, name, env, label)
        except KvqError as error:
            session.error = error
            if len(servers) * len(points) * repeats == 1:
                raise
            console.warn(f"{name} was not measured: {error.message}")
            continue
        except KeyboardInterrupt:  # in the warm-up
            if not session.records:
                raise
            session.interrupted = True
            break
        session.interrupted = measurement.load.interrupted
        session.add(replace(measurement.record, repeat=repeat if repeats > 1 else None), measurement.rows)
        session.error = session.error or measurement.load.error
        if session.interrupted:
            break
    if not session.records and session.error:
        raise session.error
    return session


def _replay(
    server: Server,
    model: str,
    tokenizer: Any,
    workload: "Workload",
    load: "Load",
    limits: dict[str, float],
    name: str,
    env: dict[str, Any],
    label: str,
) -> "Measurement":
    from kvq_core.bench.http_target import HttpTarget
    from kvq_core.bench.spread import SpreadTarget

    target: HttpTarget | SpreadTarget
    make = partial(HttpTarget, server.base_url, model, api=server.api, key=server.key, tokenizer=tokenizer)
    target = make() if server.processes == 1 else SpreadTarget(make, server.processes)
    try:
        return replay(target, workload, load, limits, name, env=env, label=label)
    finally:
        target.close()


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
            f"--{changed[0].replace('_', '-')} is up to the server",
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
