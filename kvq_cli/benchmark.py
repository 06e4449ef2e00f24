"""What `kvq profile-throughput` and `kvq compare` share: measuring, keeping records, showing tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import typer

from kvq_cli import console
from kvq_cli.load_options import LoadPlan
from kvq_cli.options import format_size
from kvq_core.bench.metrics import DEFINITIONS
from kvq_core.config import EngineConfig
from kvq_core.errors import INTERRUPTED, KvqError
from kvq_core.policies import Policy

if TYPE_CHECKING:
    from rich.text import Text

    from kvq_core.bench.load import Load
    from kvq_core.bench.record import RunRecord
    from kvq_core.bench.report import Cell, Table
    from kvq_core.bench.run import Measurement
    from kvq_core.bench.sweep import Cell as SweepCell
    from kvq_core.bench.sweep import Point
    from kvq_core.bench.target import Target
    from kvq_core.bench.workload import Dataset, Workload
    from kvq_core.models import LoadedModel

NAME_WIDTH = 24
"""What a name may take of a line, and twice that on wide terminals: longer ones go on in the next."""
DEFINITIONS_HELP = "What the figures mean:\n\n" + "\n".join(f"{k}: {v}." for k, v in DEFINITIONS.items())


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
    part: int | None = None
    """Which invocation this is, from 2, where an earlier one is resumed."""
    cells: list["SweepCell"] = field(default_factory=list)
    """What is to be measured in all, where an earlier invocation is resumed."""

    def has(self, cell: "SweepCell") -> bool:
        """Whether the cell was measured by an earlier invocation."""
        return self.part is not None and any(cell.matches(record) for record in self.records)

    def keep(self, records: Sequence["RunRecord"]) -> None:
        """Drop all records but these, and the rows of those that go."""
        place = {id(record): number for number, record in enumerate(records)}
        moved = {old: place.get(id(record)) for old, record in enumerate(self.records)}
        self.records = list(records)
        self.rows = [row | {"run": new} for row in self.rows if (new := moved[row["run"]]) is not None]

    def add(self, record: "RunRecord", rows: Sequence[dict[str, Any]]) -> None:
        """Keep a record and the rows of its requests, and write the file again."""
        record = replace(record, part=self.part)
        self.records.append(record)
        self.rows += [{"label": record.label, "run": len(self.records) - 1} | row for row in rows]
        if not record.metrics.get("completed") and record.complete:
            cancelled = record.metrics.get("cancelled")
            reason = next(iter(record.errors), "all were cancelled" if cancelled else "none was sent")
            self.error = KvqError(
                f"{record.name}: no request was completed: {reason}",
                "mend what made them fail, and measure again",
            )
        try:
            self.save([record.to_dict() for record in self.records], rescue=False)
        except KvqError as error:
            # The next policies are still worth measuring; the last attempt to write decides.
            console.warn(error.message)

    def documents(self, documents: list[dict[str, Any]]) -> Any:
        """What goes into the file and on stdout."""
        if self.output and self.rows:
            from kvq_core.bench.record import requests_path

            documents = [
                document | {"requests_file": requests_path(self.output).name} for document in documents
            ]
        return documents if self.as_list else documents[0]

    def save(self, documents: list[dict[str, Any]], *, rescue: bool = True) -> None:
        """Write the output file, if there is one; `KvqError` where that fails."""
        if self.output:
            from kvq_core.bench.record import write_records

            write_records(self.output, self.documents(documents), self.rows, rescue=rescue)

    def finish(self) -> None:
        """Exit as it went: 130 after Ctrl-C, else with what went wrong."""
        if self.interrupted:
            raise typer.Exit(INTERRUPTED)
        if self.error:
            raise self.error


def measure_policies(
    model_name: str,
    config: EngineConfig,
    policies: Sequence[Policy],
    plan: LoadPlan,
    output: Path | None,
    *,
    label: str | None = None,
    repeats: int = 1,
    points: "Sequence[Point] | None" = None,
    equal_batch: bool = False,
    resume: bool = False,
    as_list: bool,
) -> Session:
    """Load the model once and replay the same requests under each policy, with the same KV memory.

    Each policy's engine is started once and measures every point of the sweep. With `repeats` policies take
    turns (A B C A B C), so that what changes with time meets all of them. With `resume`, what the output
    file has already is not measured again.

    Ctrl-C and a policy that fails end up in the session; what is wrong with the input is raised at once.
    """
    from kvq_core.bench.record import check_output
    from kvq_core.bench.sweep import Point
    from kvq_core.bench.workload import read_dataset

    points = points or [Point()]
    plan = plan.at(points[0])
    dataset = read_dataset(plan.spec)
    if output:
        check_output(output, others=[("--dataset-path", plan.spec.file)])
    session = _open_session(output, as_list, resume)
    with console.progress(f"loading {model_name}"):
        from kvq_core.cache.plan import check_head_dims
        from kvq_core.models import load_model

        model = load_model(
            model_name,
            dtype=config.dtype,
            device=config.device,
            load_format=config.load_format,
            need_tokenizer=plan.spec.needs_tokenizer,
            tp=config.tp,
        )
    for policy in policies:
        check_head_dims(model.geometry, policy)
    works = [_work(plan.at(point), point is points[0], model, config, dataset) for point in points]
    if equal_batch:
        works = [replace(work, workload=work.workload.with_settings(mode="equal-batch")) for work in works]
    seqs = plan.max_num_seqs or max(
        min(work.load.concurrency or config.max_num_seqs, len(work.workload.requests)) for work in works
    )
    config = config.replace(max_num_seqs=seqs)
    if session.records:
        config = _take_up(session, model, config, policies, works, repeats)
    runs = [(repeat, policy) for repeat in range(1, repeats + 1) for policy in policies]
    given_up: set[Policy] = set()
    for repeat, policy in runs:
        own, number = config.with_policy(policy), repeat if repeats > 1 else None
        left = [work for work in works if not session.has(work.cell(own.resolved_policy(), number))]
        if policy in given_up or not left:
            continue
        try:
            config = _measure(model, own, left, label, number, session)
        except KeyboardInterrupt:
            session.interrupted = True
        except KvqError as error:
            session.error = error
            given_up.add(policy)
            if (repeat, policy) != runs[-1]:
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


@dataclass(frozen=True)
class Work:
    """What is measured under every policy: a cell of a sweep."""

    name: str
    """What tells it from other cells; empty where there is but one."""
    workload: "Workload"
    load: "Load"
    limits: dict[str, float]

    def cell(self, policy: Policy, repeat: int | None) -> "SweepCell":
        from kvq_core.bench.record import scheme_of
        from kvq_core.bench.run import describe_work
        from kvq_core.bench.sweep import Cell

        work = describe_work(self.workload, self.load, self.limits)
        return Cell(scheme_of(policy.describe()), work, repeat)

    @property
    def longest(self) -> int:
        """Most tokens that a request has, prompt and answer together."""
        return max(request.input_len + request.output_len for request in self.workload.requests)


def _work(
    plan: LoadPlan, is_first: bool, model: "LoadedModel", config: EngineConfig, dataset: "Dataset | None"
) -> Work:
    from kvq_core.bench.workload import make_workload

    spec = replace(
        plan.resolve(
            on_cpu=model.device.type == "cpu",
            talk=is_first,
            available=len(dataset.entries) if dataset else None,
        ),
        seed=config.seed,
    )
    workload = make_workload(
        spec,
        dataset,
        tokenizer=model.tokenizer,
        vocab_size=model.geometry.vocab_size,
        max_len=config.max_model_len or model.geometry.max_model_len,
    )
    return Work(plan.point.label, workload, replace(plan.load, seed=config.seed), plan.limits)


def _open_session(output: Path | None, as_list: bool, resume: bool) -> Session:
    """A session that goes on from the output file, where that is wanted and there is one."""
    from kvq_core.bench.record import read_with_rows

    if not (resume and output and output.exists()):
        return Session(output, as_list)
    records, rows = read_with_rows([output])
    return Session(output, as_list, records, rows, part=max(record.part or 1 for record in records) + 1)


def _take_up(
    session: Session,
    model: "LoadedModel",
    config: EngineConfig,
    policies: Sequence[Policy],
    works: Sequence[Work],
    repeats: int,
) -> EngineConfig:
    """Keep the records of an earlier invocation that are finished; the cache gets the memory it had then."""
    from kvq_core.bench.record import without_folder
    from kvq_core.bench.sweep import take_up

    numbers = range(1, repeats + 1) if repeats > 1 else [None]
    resolved = [config.with_policy(policy).resolved_policy() for policy in policies]
    session.cells = [work.cell(policy, n) for n in numbers for policy in resolved for work in works]
    described = without_folder(model.describe())
    identity = {key: described.get(key) for key in ("name", "dtype", "load_format")}
    before = session.records
    session.keep(take_up(before, session.cells, identity))
    kept, cells = len(session.records), len(session.cells)
    console.say(f"resuming: {kept} of {cells} cells are measured already, {cells - kept} to go")
    memory = before[0].engine.get("kv_memory")
    if config.kv_memory is not None and memory not in (None, config.kv_memory):
        raise KvqError(
            f"--resume: --kv-memory was {format_size(memory)} before",
            "the same memory makes cells comparable",
        )
    return config.replace(kv_memory=memory)


def _measure(
    model: "LoadedModel",
    config: EngineConfig,
    works: Sequence[Work],
    label: str | None,
    repeat: int | None,
    session: Session,
) -> EngineConfig:
    """Measure one policy, adding a record for each cell; returns the config with the KV memory that it got.

    A cell that fails is told of, and the next one measured; the last failure is raised at the end.
    """
    from kvq_core.bench.engine_target import EngineTarget
    from kvq_core.bench.env import collect_env
    from kvq_core.engine.engine import Engine

    policy = config.resolved_policy().label
    with console.progress(f"{policy}: starting the engine") as update:
        engine = Engine(model, config, lambda done, total: update(done=done, total=total))
    failure: KvqError | None = None
    try:
        memory = engine.config.kv_memory
        console.say(f"{policy}: KV cache of {format_size(memory or 0)}")
        env = collect_env(seed=config.seed, device=str(model.device))
        for work in works:
            name = ", ".join(filter(None, [policy, work.name, f"run {repeat}" if repeat else ""]))
            target = EngineTarget(engine)
            try:
                _check_batch(work, target.kv_stats())
                measurement = replay(
                    target, work.workload, work.load, work.limits, name, env=env, label=label
                )
            except KvqError as error:
                if work is not works[-1]:
                    console.warn(f"{name} was not measured: {error.message}")
                failure = error
                target.close()
                continue
            session.interrupted |= measurement.load.interrupted
            session.add(replace(measurement.record, repeat=repeat), measurement.rows)
            if measurement.load.error:
                raise measurement.load.error
            if session.interrupted:
                break
    finally:
        engine.close()
    if failure:
        raise failure
    return config.replace(kv_memory=memory)


def _check_batch(work: Work, kv: dict[str, Any]) -> None:
    """Refuse an equal batch that does not fit, page by page: it would be no equal batch."""
    page = kv.get("page_size", 1)
    needed = (work.load.concurrency or 0) * -(-work.longest // page) * page
    if work.workload.settings.get("mode") == "equal-batch" and needed > kv["capacity_tokens"]:
        raise KvqError(
            f"--mode equal-batch: {work.load.concurrency} requests of {work.longest:,} tokens, in pages of "
            f"{page}, do not fit into {kv['capacity_tokens']:,}",
            "more --kv-memory, a lower --concurrency, or `--mode equal-memory`, in which requests wait",
        )


def replay(
    target: "Target",
    workload: "Workload",
    load: "Load",
    limits: dict[str, float],
    name: str,
    *,
    env: dict[str, Any],
    label: str | None,
) -> "Measurement":
    """Measure a target, with a bar that shows how far it is."""
    from kvq_core.bench.run import measure

    warmup, requests = len(workload.warmup), len(workload.requests)
    with console.progress(f"{name}: warm-up, then {requests} requests", total=warmup + requests) as update:
        return measure(
            target,
            workload,
            load,
            env=env,
            limits=limits,
            label=label,
            on_warmup=lambda ended, _: update(done=ended),
            progress=lambda ended, _: update(done=warmup + ended, label=f"{name}: measuring"),
        )


def emit_tables(tables: "Sequence[Table]", notes: Sequence[str], warnings: Sequence[str]) -> None:
    """Data: tables on stdout, what they mean under them; warnings on stderr."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    out = console.out()
    one_line = out.width >= console.ONE_LINE_WIDTH
    for table in tables:
        view = RichTable(
            title=Text(table.title, style="bold") if table.title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1 if one_line else 0, 0, 0 if one_line else 1),
        )
        columns: list[list[Text]] = []
        for i, column in enumerate(table.columns):
            heading = column.replace("pre-\n", "pre") if one_line else column
            heading = heading.replace("\n", " ") if one_line else heading
            cells = [_render(row[i], one_line) for row in table.rows]
            if i == 0:
                most = NAME_WIDTH * (1 + one_line)
                cells = [Text("\n".join(wrap(c.plain, most, break_on_hyphens=False))) for c in cells]
            width = console.column_width(heading, (cell.plain for cell in cells))
            view.add_column(Text(heading, overflow="fold"), justify="right" if i else "left", width=width)
            columns.append(cells)
        for row in zip(*columns, strict=True):
            view.add_row(*row)
        console.print_table(view)
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
