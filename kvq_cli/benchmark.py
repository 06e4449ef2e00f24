"""What `kvq profile-throughput` and `kvq compare` share: the load's flags, measuring policies, showing tables."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_cli import console
from kvq_cli.options import ENGINE_PANEL, format_size
from kvq_core.bench.metrics import DEFINITIONS
from kvq_core.bench.workload import NAMES, WorkloadSpec
from kvq_core.config import EngineConfig
from kvq_core.errors import KvqError, UsageError
from kvq_core.policies import Policy

if TYPE_CHECKING:
    from rich.text import Text

    from kvq_core.bench.record import RunRecord
    from kvq_core.bench.report import Cell, Table
    from kvq_core.bench.workload import Workload
    from kvq_core.models import LoadedModel

LOAD_PANEL = "Load"
CPU_OUTPUT_CAP = 64
"""On a CPU, answers are cut to this many tokens unless --max-output-len says otherwise."""
ONE_LINE_WIDTH = 140
"""From this width on, a change stands beside its value instead of under it."""

DEFINITIONS_HELP = "What the figures mean:\n\n" + "\n\n".join(f"{k}: {v}." for k, v in DEFINITIONS.items())

LOAD_FLAGS: dict[str, tuple[Any, Any]] = {
    "concurrency": (
        Annotated[int, typer.Option("--concurrency", "-c", min=1, metavar="N", rich_help_panel=LOAD_PANEL,
            help="Requests in flight: the next one is sent as soon as one ends.")],
        64,
    ),
    "num_prompts": (
        Annotated[int | None, typer.Option("--num-prompts", "-n", min=1, metavar="N", rich_help_panel=LOAD_PANEL,
            help="Requests to measure.", show_default="2 x concurrency; on a CPU, concurrency")],
        None,
    ),
    "max_output_len": (
        Annotated[int | None, typer.Option("--max-output-len", min=1, metavar="N", rich_help_panel=LOAD_PANEL,
            help="Cut answers to N tokens.", show_default=f"uncut; on a CPU, {CPU_OUTPUT_CAP}")],
        None,
    ),
    "warmup": (
        Annotated[int | None, typer.Option("--warmup", min=1, metavar="N", rich_help_panel=LOAD_PANEL,
            help="Requests before the measured ones, stopped after 8 tokens; at least as many as are in "
            "flight, so that nothing is measured for the first time.", show_default="as many as are in flight")],
        None,
    ),
    "dataset_name": (
        Annotated[str, typer.Option("--dataset-name", metavar="NAME", rich_help_panel=LOAD_PANEL,
            autocompletion=lambda incomplete: [name for name in NAMES if name.startswith(incomplete)],
            help="sharegpt: recorded conversations, first prompt and the length of its answer. lengths: random "
            "token ids with lengths from a file. fixed, random: random token ids, --input-len and --output-len "
            "of them.")],
        "sharegpt",
    ),
    "dataset_path": (
        Annotated[str | None, typer.Option("--dataset-path", "--dataset", metavar="FILE",
            rich_help_panel=LOAD_PANEL, show_default="the sample that ships with kvq",
            help="sharegpt: a JSON file in ShareGPT's schema, or `hub` to download the usual one. lengths: a "
            "JSON list of [input, output] pairs.")],
        None,
    ),
    "input_len": (
        Annotated[int, typer.Option("--input-len", min=1, metavar="N", rich_help_panel=LOAD_PANEL,
            help="Tokens of a prompt (fixed), or their mean (random).")],
        512,
    ),
    "output_len": (
        Annotated[int, typer.Option("--output-len", min=1, metavar="N", rich_help_panel=LOAD_PANEL,
            help="Tokens of an answer (fixed), or their mean (random).")],
        128,
    ),
    "range_ratio": (
        Annotated[float, typer.Option("--range-ratio", metavar="X", rich_help_panel=LOAD_PANEL,
            help="random: lengths are uniform in mean * (1 - X) ... mean * (1 + X).")],
        0.5,
    ),
    "max_num_seqs": (
        Annotated[int | None, typer.Option("--max-num-seqs", min=1, metavar="N", rich_help_panel=ENGINE_PANEL,
            help="Most requests that run at the same time.", show_default="concurrency")],
        None,
    ),
}  # fmt: skip
"""Argument -> its flag and default."""


@dataclass(frozen=True)
class LoadPlan:
    """What to replay and how; None is resolved once it is known where the model runs."""

    spec: WorkloadSpec
    concurrency: int
    num_prompts: int | None
    max_output_len: int | None
    warmup: int | None
    max_num_seqs: int | None

    def resolve(self, on_cpu: bool) -> WorkloadSpec:
        """Sizes for where the model runs; says so where they are smaller than elsewhere."""
        num_prompts = self.num_prompts or self.concurrency * (1 if on_cpu else 2)
        max_output_len = self.max_output_len or (CPU_OUTPUT_CAP if on_cpu else None)
        if on_cpu and None in (self.num_prompts, self.max_output_len):
            console.say(
                f"on a CPU: {num_prompts} requests, answers cut to {max_output_len} tokens"
                " (--num-prompts, --max-output-len)"
            )
        in_flight = min(self.concurrency, num_prompts)
        warmup = self.warmup or in_flight
        if warmup < in_flight:
            raise UsageError(
                f"--warmup {warmup} is less than the {in_flight} requests in flight",
                "leave it out, or warm up with at least as many: what runs first is slower",
            )
        return replace(
            self.spec, num_prompts=num_prompts, num_warmup=warmup, max_output_len=max_output_len
        )


def load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the flags of the load; it receives one `plan: LoadPlan`."""

    @wraps(command)
    def with_plan(**values: Any) -> Any:
        return command(plan=_plan({name: values.pop(name) for name in LOAD_FLAGS}), **values)

    signature = inspect.signature(command)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=kind) for p in signature.parameters.values() if p.name != "plan"]
    parameters += [
        inspect.Parameter(name, kind, default=default, annotation=flag)
        for name, (flag, default) in LOAD_FLAGS.items()
    ]
    with_plan.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_plan


def _plan(values: dict[str, Any]) -> LoadPlan:
    own = ("concurrency", "num_prompts", "max_output_len", "warmup", "max_num_seqs")
    spec = WorkloadSpec(
        name=values["dataset_name"],
        path=values["dataset_path"],
        input_len=values["input_len"],
        output_len=values["output_len"],
        range_ratio=values["range_ratio"],
    )
    return LoadPlan(spec, **{name: values[name] for name in own})


@dataclass
class Session:
    """Records of one invocation: kept in memory, and in the output file as soon as each is finished."""

    output: Path | None
    as_list: bool
    """The output file holds a list even if there is a single record."""
    records: list["RunRecord"] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    error: Exception | None = None
    """What went wrong, to be reported when everything measured has been shown."""

    def add(self, record: "RunRecord", rows: Sequence[dict[str, Any]]) -> None:
        self.records.append(record)
        self.rows += [{"label": record.label, "run": len(self.records) - 1} | row for row in rows]
        try:
            self.save([record.to_dict() for record in self.records])
        except KvqError as error:
            # The next policies are still worth measuring; the last attempt to write decides.
            console.warn(f"{error.message}; {error.hint}")

    def documents(self, documents: list[dict[str, Any]]) -> Any:
        """What goes into the file and on stdout."""
        if self.output and self.rows:
            from kvq_core.bench.record import requests_path

            documents = [document | {"requests_file": requests_path(self.output).name} for document in documents]
        return documents if self.as_list else documents[0]

    def save(self, documents: list[dict[str, Any]]) -> None:
        if self.output:
            from kvq_core.bench.record import write_records

            write_records(self.output, self.documents(documents), self.rows)

    def finish(self) -> None:
        """Exit as it went: 130 after Ctrl-C, else with what went wrong."""
        if self.interrupted:
            raise typer.Exit(130)
        if self.error:
            raise self.error
        for record in self.records:
            if not record.metrics.get("completed"):
                reason = next(iter(record.errors), "none was sent")
                raise KvqError(f"{record.name}: no request was completed: {reason}")


def measure_policies(
    model_name: str,
    config: EngineConfig,
    policies: Sequence[Policy],
    plan: LoadPlan,
    output: Path | None,
    *,
    label: str | None = None,
    as_list: bool,
) -> Session:
    """Load the model once and replay the same requests under each policy, with the same KV memory.

    Ctrl-C and a policy that fails end up in the session; what is wrong with the input is raised at once.
    """
    from kvq_core.bench.record import check_output
    from kvq_core.bench.workload import make_workload, read_dataset

    dataset = read_dataset(plan.spec)
    if output:
        check_output(output)
    with console.progress(f"loading {model_name}"):
        from kvq_core.models import load_model

        model = load_model(
            model_name,
            dtype=config.dtype,
            device=config.device,
            load_format=config.load_format,
            need_tokenizer=plan.spec.name == "sharegpt",
        )
    _check_codecs(model, policies)
    spec = replace(plan.resolve(on_cpu=model.device.type == "cpu"), seed=config.seed)
    workload = make_workload(
        spec,
        dataset,
        tokenizer=model.tokenizer,
        vocab_size=model.geometry.vocab_size,
        max_len=config.max_model_len or model.geometry.max_model_len,
    )
    config = config.replace(max_num_seqs=plan.max_num_seqs or min(plan.concurrency, spec.num_prompts))
    session = Session(output, as_list)
    for policy in policies:
        try:
            config = _measure(model, config.replace(policy=policy), workload, plan.concurrency, label, session)
        except KeyboardInterrupt:
            session.interrupted = True
        except KvqError as error:
            session.error = error
            if policy is not policies[-1]:
                console.warn(f"{policy.label} was not measured: {error.message}")
        except Exception as error:  # a fault: the device may be in any state, and other policies share it
            session.error = error
            break
        if session.interrupted:
            break
    if session.interrupted and not session.records:
        raise KeyboardInterrupt
    if session.error and not session.records:
        raise session.error
    return session


def _check_codecs(model: "LoadedModel", policies: Sequence[Policy]) -> None:
    """Refuse a policy that can't take the model's head dim before any of them is measured."""
    from kvq_core.codecs import get_codec

    for policy in policies:
        for layer in model.geometry.layers:
            get_codec(policy.key).check_head_dim(layer.key_dim)
            get_codec(policy.value).check_head_dim(layer.value_dim)


def _measure(
    model: "LoadedModel",
    config: EngineConfig,
    workload: "Workload",
    concurrency: int,
    label: str | None,
    session: Session,
) -> EngineConfig:
    """Measure one policy and add its record; returns the config with the KV memory that it got."""
    from kvq_core.bench.engine_target import EngineTarget
    from kvq_core.bench.env import collect_env
    from kvq_core.bench.run import measure
    from kvq_core.engine.engine import Engine

    name = config.resolved_policy().label
    with console.progress(f"{name}: starting the engine") as update:
        engine = Engine(model, config, lambda done, total: update(done=done, total=total))
    try:
        memory = engine.config.kv_memory
        console.say(f"{name}: KV cache of {format_size(memory or 0)}")
        total = len(workload.warmup) + len(workload.requests)
        with console.progress(f"{name}: warm-up", total=total) as update:
            measurement = measure(
                EngineTarget(engine),
                workload,
                concurrency,
                env=collect_env(seed=config.seed, device=str(model.device)),
                label=label,
                on_warmup=lambda ended, _: update(done=ended),
                progress=lambda ended, _: update(done=len(workload.warmup) + ended, label=f"{name}: measuring"),
            )
    finally:
        engine.close()
    session.interrupted |= measurement.load.interrupted
    session.add(measurement.record, measurement.rows)
    if measurement.load.error:
        raise measurement.load.error
    return config.replace(kv_memory=memory)


def emit_tables(tables: "Sequence[Table]", notes: Sequence[str], warnings: Sequence[str]) -> None:
    """Data: tables on stdout, what they mean under them; warnings on stderr."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    out = console.out()
    one_line = out.width >= ONE_LINE_WIDTH
    for table in tables:
        view = RichTable(
            title=Text(table.title, style="bold") if table.title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1 if one_line else 0, 0, 0 if one_line else 1),
        )
        for i, column in enumerate(table.columns):
            heading = column.replace("pre-\n", "pre") if one_line else column
            heading = heading.replace("\n", " ") if one_line else heading
            view.add_column(Text(heading), justify="right" if i else "left", no_wrap=i == 0)
        for row in table.rows:
            view.add_row(*(_render(cell, one_line) for cell in row))
        out.print(view)
    for note in notes:
        out.print(Text(note))
    for warning in warnings:
        console.warn(warning)


def _render(cell: "Cell", one_line: bool) -> "Text":
    from rich.text import Text

    text = Text(cell.text)
    if cell.change:
        style = "" if cell.better is None else "green" if cell.better else "red"
        text.append(" " if one_line else "\n")
        text.append(f"({cell.change})" if one_line else cell.change, style=style)
    return text
