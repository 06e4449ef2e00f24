"""`kvq serve`: an OpenAI-compatible server."""

import ipaddress
from typing import Annotated

import typer

from kvq_cli import console
from kvq_cli.commands.run import open_pipeline
from kvq_cli.options import (
    DEFAULT_MODEL,
    SERVER_PANEL,
    ApiKeyEnv,
    Model,
    api_key_from,
    engine_options,
    naming,
    parse_size,
)
from kvq_core.config import SERVING, EngineConfig, ServerConfig
from kvq_core.errors import KvqError

DEFAULTS = ServerConfig()


@engine_options(defaults=SERVING)
def serve(
    model: Model = DEFAULT_MODEL,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.", rich_help_panel=SERVER_PANEL
        ),
    ] = DEFAULTS.host,
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="N", help="Port; 0 takes a free one.", rich_help_panel=SERVER_PANEL
        ),
    ] = DEFAULTS.port,
    api_key_env: ApiKeyEnv = None,
    max_queue: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Requests that may wait while --max-num-seqs run; more are answered with status 429.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = DEFAULTS.max_queue,
    max_body: Annotated[
        int,
        typer.Option(
            parser=naming("--max-body", parse_size),
            metavar="SIZE",
            help="Largest body of a request, as `16MiB`; larger ones are answered with status 413.",
            show_default=f"{DEFAULTS.max_body >> 20}MiB",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = DEFAULTS.max_body,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            max=24 * 3600,
            metavar="SECONDS",
            help="How long running requests may take to finish after Ctrl-C or SIGTERM.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = DEFAULTS.shutdown_timeout,
    *,
    config: EngineConfig,
) -> None:
    """Serve a model with OpenAI's HTTP interface: /v1/completions, /v1/chat/completions, /v1/models.

    kvq serve --policy 42 --port 8000
    KEY=secret kvq serve --host 0.0.0.0 --api-key-env KEY

    /health says whether it works, /metrics what it does, for Prometheus; /openapi.json describes it all.
    Prompts that begin alike share what was computed of them (--prefix-caching).
    """
    server = ServerConfig(
        host=host,
        port=port,
        api_key=api_key_from(api_key_env),
        max_queue=max_queue,
        max_body=max_body,
        shutdown_timeout=shutdown_timeout,
    )
    try:
        from kvq_core.server.run import bind
        from kvq_core.server.run import serve as run_server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvq"):
            raise
        raise KvqError(f"`kvq serve` needs {error.name}", "`pip install -e '.[serve]'`") from error
    if server.api_key is None and not _is_loopback(host):
        console.warn("anyone who reaches this address can use the server; --api-key-env asks for a key")
    with bind(server) as listener, open_pipeline(model, config) as pipe:
        run_server(pipe.engine, model, listener, server)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
