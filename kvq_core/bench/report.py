"""Tables of run records, as data: a terminal, Markdown, CSV and JSON are views of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvq_core.bench.compare import CHANGES, Comparison
from kvq_core.bench.metrics import LATENCIES, PERCENTILES
from kvq_core.bench.record import RunRecord
from kvq_core.bench.repeats import usable
from kvq_core.bench.scores import Scores, has_speed

if TYPE_CHECKING:
    from pandas import DataFrame

REFERENCE_NOTE = (
    "measured on a CPU: these are the speeds of the reference backend, not of the kernels; "
    "memory figures hold everywhere"
)
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}


@dataclass(frozen=True)
class Cell:
    """A value, and how it relates to the baseline's."""

    text: str
    change: str = ""
    """`+3.2%` against the baseline, `x5.02` against a 16-bit cache; empty where there is nothing to say."""
    better: bool | None = None

    def __str__(self) -> str:
        return f"{self.text} ({self.change})" if self.change else self.text


@dataclass(frozen=True)
class Table:
    """A table, whatever it is shown in."""

    title: str
    columns: list[str]
    """A line break in a heading separates the unit."""
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Figure:
    """A column: a key of a record, its heading, its unit, and which direction is good."""

    key: str
    heading: str
    unit: str = ""
    divisor: float = 1.0
    higher_is_better: bool = True


SPEED = (
    Figure("request_throughput", "requests", "/s"),
    Figure("input_throughput", "input", "tok/s"),
    Figure("output_throughput", "output", "tok/s"),
    Figure("mean_e2el_ms", "E2E", "s", 1e3, False),
    Figure("mean_ttft_ms", "TTFT", "s", 1e3, False),
    Figure("mean_tpot_ms", "TPOT", "ms", 1.0, False),
    Figure("mean_itl_ms", "ITL", "ms", 1.0, False),
)
GOODPUT = Figure("request_goodput", "goodput", "/s")
MEMORY = ["KV\nB/token", "effective\nbits", "capacity\ntokens", "peak\ntokens", "pre-\nempted", "requests"]

Kl = Callable[[RunRecord], float | None]
QUEUE = {"mean_running": "running\non average", "mean_waiting": "waiting\non average"}
"""Requests inside the engine: what runs, and what waits for room, preempted ones among them."""


def number(value: float | None, digits: int = 4) -> str:
    """About `digits` significant digits, whole numbers in full with thousands separated: 9.304, 2,368."""
    if value is None:
        return "-"
    if float(value).is_integer() or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 1
    return f"{value:.{max(0, digits - whole)}f}"


def comparison_tables(
    comparison: Comparison, kl: Kl | None = None, scores: Scores | None = None
) -> list[Table]:
    """Speed and memory, a row a record, every figure with its change against the baseline; then quality.

    `kl` gives a record's drift, nats per token, where it was measured; it stands beside speed.
    """
    quality = [] if scores is None or not scores.names else [_quality_table(comparison, scores)]
    if not any(map(has_speed, comparison.records)):
        return quality
    figures = speed_figures(comparison.records)
    speed, memory = [], []
    queued = any((record.get("mean_waiting") or 0) > 0 for record in comparison.records)
    for i in comparison.order:
        record = comparison.records[i]
        if not has_speed(record):
            continue
        name = Cell(comparison.names[i] + ("" if record.complete else " (incomplete)"))
        drift = [] if kl is None else [Cell(number(kl(record)))]
        speed.append([name, *(_cell(comparison, i, figure) for figure in figures), *drift])
        queue = [Cell(number(record.get(key))) for key in QUEUE]
        memory.append([name, *_memory_cells(record), *(queue if queued else [])])
    return [
        Table(
            "speed (latencies are means)", ["policy", *map(_heading, figures), *(["KL"] if kl else [])], speed
        ),
        _known(
            Table(
                "memory (x: against 16 bits a number)",
                ["policy", *MEMORY, *(QUEUE.values() if queued else [])],
                memory,
            )
        ),
        *quality,
    ]


def _known(table: Table) -> Table:
    """Without the columns that nothing is known for: a server does not tell of its cache."""
    kept = [i for i in range(len(table.columns)) if any(row[i].text != "-" for row in table.rows)]
    columns = [table.columns[i] for i in kept]
    title = table.title if any(column in columns for column in MEMORY[:-1]) else "requests"
    return Table(title, columns, [[row[i] for i in kept] for row in table.rows])


def _quality_table(comparison: Comparison, scores: Scores) -> Table:
    """A row a policy: what `kvq eval` found for it."""
    rows = {record.scheme: (comparison.names[i], record) for i, record in enumerate(comparison.records)}
    return Table(
        "quality (± one standard error)",
        ["policy", *scores.names],
        [[Cell(name), *map(Cell, scores.cells(record))] for name, record in rows.values()],
    )


def speed_figures(records: Sequence[RunRecord]) -> list[Figure]:
    """The columns of the table of speeds: goodput only where it was asked for."""
    asked = any(record.get(GOODPUT.key) is not None for record in records)
    return [SPEED[0], *([GOODPUT] * asked), *SPEED[1:]]


def _heading(figure: Figure) -> str:
    return f"{figure.heading}\n{figure.unit}"


def _cell(comparison: Comparison, i: int, figure: Figure) -> Cell:
    value = comparison.records[i].get(figure.key)
    half = comparison.records[i].intervals.get(figure.key)
    text = _with_interval(
        number(None if value is None else value / figure.divisor),
        None if half is None else half / figure.divisor,
    )
    change = comparison.change(i, figure.key)
    if change is None or comparison.is_baseline(i):
        return Cell(text)
    nothing = max(0.005, comparison.noise(i, figure.key))
    better = None if abs(change - 1) < nothing else (change > 1) == figure.higher_is_better
    return Cell(text, f"{change - 1:+.1%}", better)


def _with_interval(text: str, half: float | None) -> str:
    """A number, ± half its 95% interval with as many digits after the point."""
    return text if half is None else f"{text} ±{half:,.{len(text.partition('.')[2])}f}"


def _memory_cells(record: RunRecord) -> list[Cell]:
    kv = record.kv
    bits, capacity = kv.get("bits_per_element"), kv.get("capacity_ratio")
    return [
        Cell(number(kv.get("bytes_per_token")), f"x{bits / 16:.2f}" if bits else ""),
        Cell(number(bits)),
        Cell(number(kv.get("capacity_tokens")), f"x{capacity:.2f}" if capacity else ""),
        Cell(number(kv.get("peak_tokens"))),
        Cell(number(kv.get("preemptions"))),
        Cell(requests_done(record)),
    ]


def requests_done(record: RunRecord) -> str:
    """`64 ok`, and how many failed or were not finished, if any."""
    metrics = record.metrics
    parts = [f"{metrics.get('completed') or 0:.0f} ok"]
    parts += [
        f"{metrics[key]:.0f} {key}"
        for key in ("failed", "cancelled", "unfinished", "unsent")
        if metrics.get(key)
    ]
    return ", ".join(parts)


def conditions(record: RunRecord) -> str:
    """One line: the model, where it ran, and what was replayed."""
    work, model = record.workload, record.model
    where = record.engine.get("url") if record.is_remote else record.env.get("gpu") or "CPU"
    source = work.get("dataset") or work.get("name")
    text = f"{model.get('name', '?')} ({', '.join(filter(None, [model.get('dtype'), where]))}), {source}"
    if work.get("num_prompts"):
        text += f": {work['num_prompts']} requests"
    if work.get("mean_input_len"):
        text += f" of {work['mean_input_len']:.0f} + {work.get('mean_output_len') or 0:.0f} tokens on average"
    if work.get("output_len_cap"):
        text += f", answers cut to {work['output_len_cap']}"
    if work.get("prefix_len"):
        count = work["num_prefixes"]
        text += f", {count} shared beginning{'s' * (count > 1)} of {work['prefix_len']:,}"
    if work.get("ramp_up"):
        shape, _, rates = str(work["ramp_up"]).partition(":")
        text += f", arriving {rates.replace('..', ' to ')} times a second ({shape} ramp)"
    if work.get("trace_speed"):
        speed = "" if work["trace_speed"] == 1 else f", {work['trace_speed']:g} times as fast"
        text += f", arriving as in the trace{speed}"
    if work.get("request_rate"):
        text += f", {number(work['request_rate'])} requests per second asked for"
        text += f", {number(record.get('achieved_request_rate'))} sent"
        if work.get("burstiness", 1) != 1:
            text += f", burstiness {work['burstiness']:g}"
    if record.concurrency:
        text += f", {'at most ' * (work.get('loop') == 'open')}{record.concurrency} at a time"
    if work.get("duration_limit_s"):
        text += f", none sent after {work['duration_limit_s']:g} s"
    if work.get("cancel_rate"):
        text += f", {work['cancel_rate']:.0%} to be cancelled"
    if work.get("goodput"):
        limits = " and ".join(f"{NAMES[name]} ≤ {ms:g} ms" for name, ms in work["goodput"].items())
        text += f"; goodput: {limits}"
    if (work.get("distinct_prompts") or work.get("num_prompts")) != work.get("num_prompts"):
        text += f"; only {work['distinct_prompts']} different prompts"
    return text


def is_on_cpu(records: Sequence[RunRecord]) -> bool:
    """Whether any of them was measured on a CPU by an engine of our own."""
    return any(record.env.get("gpu") is None and not record.is_remote for record in records)


def notes(records: Sequence[RunRecord]) -> list[str]:
    """What was measured, and whose speeds these are."""
    lines = list(dict.fromkeys(conditions(record) for record in records))
    if is_on_cpu([record for record in records if has_speed(record)]):
        lines.append(REFERENCE_NOTE)
    return lines + list(dict.fromkeys(record.note for record in records if record.note))


def comparison_notes(comparison: Comparison) -> list[str]:
    """What stands under the tables of a comparison."""
    baselines = dict.fromkeys(
        comparison.names[i] for i in range(len(comparison.records)) if comparison.is_baseline(i)
    )
    lines = [f"changes are against {', '.join(baselines)}"] * any(map(has_speed, comparison.records))
    if comparison.resumed:
        lines.append(comparison.resumed)
    return lines + run_notes(comparison)


def run_notes(comparison: Comparison) -> list[str]:
    """How many runs figures are of, what was measured, and whose speeds these are."""
    counts = sorted({len(usable(runs)) for runs in comparison.runs})
    means = f"means of {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} runs "
    means += "± half their 95% interval (Student's t)"
    return [means] * (counts[-1] > 1) + notes(comparison.records)


def run_tables(record: RunRecord) -> list[Table]:
    """One record in full: throughput and memory, and the distribution of every latency."""
    metrics, kv = record.metrics, record.kv

    def shown(key: str) -> str:
        return _with_interval(number(metrics.get(key)), record.intervals.get(key))

    summary = [
        ("requests", requests_done(record)),
        ("duration", f"{number(metrics.get('duration'))} s"),
        ("requests per second", shown("request_throughput")),
        *([("goodput, requests per second", shown(GOODPUT.key))] if GOODPUT.key in metrics else []),
        ("input tokens per second", shown("input_throughput")),
        ("output tokens per second", shown("output_throughput")),
        ("total tokens per second", shown("total_token_throughput")),
        *(_sending(record) if record.is_remote else _holding(record)),
    ]
    figures = ["mean", *(f"p{p}" for p in PERCENTILES)]
    latencies = [
        [Cell(NAMES[name]), *(Cell(shown(f"{figure}_{name}_ms")) for figure in figures)] for name in LATENCIES
    ]
    title = record.name + ("" if record.complete else " (incomplete)")
    return [
        Table(title, ["", "value"], [[Cell(name), Cell(value)] for name, value in summary]),
        Table("", ["latency, ms", *figures], latencies),
        *([fidelity_table(kv["fidelity"])] if kv.get("fidelity") else []),
    ]


def _holding(record: RunRecord) -> list[tuple[str, str]]:
    kv = record.kv
    return [
        ("KV bytes per token", number(kv.get("bytes_per_token"))),
        ("effective bits per element", number(kv.get("bits_per_element"))),
        ("KV capacity, tokens", number(kv.get("capacity_tokens"))),
        ("KV peak, tokens", number(kv.get("peak_tokens"))),
        ("preemptions", number(kv.get("preemptions"))),
    ]


def _sending(record: RunRecord) -> list[tuple[str, str]]:
    """What a client knows, where a server's cache is its own affair."""
    hits, lag = record.kv.get("prefix_hit_rate"), record.metrics.get("p99_lag_ms")
    return [
        *([("prompt tokens from its prefix cache", f"{hits:.0%}")] if hits else []),
        *([("load generator late by, p99", f"{number(lag)} ms")] if lag is not None else []),
    ]


def fidelity_table(found: dict[str, Any]) -> Table:
    """By layer, how far attention through the codec is off."""
    rows = [
        [Cell(str(layer)), Cell(f"{mean:.2e}"), Cell(f"{worst:.2e}")]
        for layer, (mean, worst) in enumerate(zip(found["mean_errors"], found["worst_errors"], strict=True))
    ]
    title = f"fidelity: relative error of attention over {found['window']} tokens"
    title += f", {found['steps']} steps checked, {found['jumps']} jumps"
    return Table(title, ["layer", "mean", "worst"], rows)


def markdown(
    comparison: Comparison,
    advice: Sequence[str] = (),
    kl: Kl | None = None,
    scores: Scores | None = None,
) -> str:
    """Speed and memory in one Markdown table, a row a record; quality in another; then all remarks."""
    *speed, last = comparison_tables(comparison, kl, scores)
    tables = [last]
    if speed:
        left, right, *rest = [*speed, last]
        joined = [a + b[1:] for a, b in zip(left.rows, right.rows, strict=True)]
        tables = [Table("", left.columns + right.columns[1:], joined), *rest]
    remarks = [*comparison_notes(comparison), *advice]
    remarks += [f"**warning**: {warning}" for warning in comparison.warnings()]
    remarks = [f"- {_one_line(remark)}" for remark in remarks]
    return "\n\n".join([*map(_markdown_table, tables), "\n".join(remarks)])


def _markdown_table(table: Table) -> str:
    columns = [heading.replace("pre-\n", "pre").replace("\n", " ") for heading in table.columns]
    rows = [[str(cell) for cell in row] for row in table.rows]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    escaped = [[_one_line(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def frame(comparison: Comparison) -> "DataFrame":
    """A row a record: identity, conditions, every figure by its name in the record, and the changes."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for i, record in enumerate(comparison.records):
        row = {
            "name": comparison.names[i],
            "label": record.label,
            **{f"policy_{key}": record.policy.get(key) for key in ("key", "value", "sink", "recent")},
            "complete": record.complete,
            "model": record.model.get("name"),
            "dtype": record.model.get("dtype"),
            "gpu": record.env.get("gpu"),
            "dataset": record.workload.get("dataset") or record.workload.get("name"),
            "concurrency": record.concurrency,
            "seed": record.workload.get("seed"),
            **record.metrics,
            "runs": len(usable(comparison.runs[i])),
            **{f"{key}_ci95": half for key, half in record.intervals.items()},
            **{key: value for key, value in record.kv.items() if not isinstance(value, dict | list)},
            "baseline": comparison.names[comparison.records.index(comparison.baselines[i])],
        }
        changes = {f"{key}_change": comparison.change(i, key) for key in CHANGES}
        rows.append(row | {key: None if value is None else value - 1 for key, value in changes.items()})
    return pd.DataFrame(rows)


def csv(comparison: Comparison) -> str:
    """A line a record, with every figure: `frame` as CSV."""
    return frame(comparison).to_csv(index=False).rstrip("\n")
