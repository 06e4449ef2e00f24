"""A page of run records: one HTML file without a network, for a screen in light or dark, and for paper."""

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from kvq_core.bench.breakeven import break_even_table
from kvq_core.bench.charts import OTHER, Axis, Dot, Series, bars, chart, marker, style
from kvq_core.bench.compare import Comparison, cell_of
from kvq_core.bench.record import RunRecord
from kvq_core.bench.report import (
    NAMES,
    REFERENCE_NOTE,
    Kl,
    Table,
    comparison_notes,
    comparison_tables,
    is_on_cpu,
    number,
)

TRADE = {"tpot": "TPOT", "ttft": "TTFT", "e2el": "E2E"}
"""Latencies that throughput is drawn against; the first is shown at first."""
MARKED = (50, 90, 99)
"""Percentiles with a marker on a distribution."""


def page(
    comparison: Comparison,
    *,
    advice: Sequence[str] = (),
    warnings: Sequence[str] = (),
    quality: Sequence[RunRecord] = (),
    kl: Kl | None = None,
) -> str:
    """The whole report; `quality` are records of `kvq eval` for a chart, `kl` looks a policy's up."""
    colors = {name: i for i, name in enumerate(dict.fromkeys(record.name for record in comparison.records))}
    title = " · ".join(dict.fromkeys(str(record.model.get("name", "?")) for record in comparison.records))
    sections = [
        _trade_off(comparison, colors),
        _per_cell("Latencies, request by request", "cdf", comparison, _distributions(colors)),
        _per_cell("The cache over time", "time", comparison, _timelines(colors)),
        _memory(comparison, colors),
        _quality(quality, colors),
        _tables(comparison, kl),
        _provenance(comparison, quality),
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>kvq: {escape(title)}</title><style>{_asset('report.css')}</style></head><body>",
            f"<header><h1>KV-cache policies on {escape(title)}</h1>",
            f'<p class="soft">{escape(_where(comparison))}</p>',
            '<div class="answer">' * bool(advice),
            *(f"<p>{escape(line[:1].upper() + line[1:])}</p>" for line in advice),
            "</div>" * bool(advice),
            f'<p class="warning">{REFERENCE_NOTE}</p>' * is_on_cpu(comparison.records),
            *(f'<p class="warning"><b>Warning:</b> {escape(line)}</p>' for line in warnings),
            f'</header><main><nav class="bar">{_legend(colors)}</nav>',
            *filter(None, sections),
            "<footer><ul>",
            *(f"<li>{escape(line)}</li>" for line in comparison_notes(comparison)),
            f'</ul></footer></main><div id="tip"></div><script>{_asset("report.js")}</script></body></html>',
        ]
    )


def _asset(name: str) -> str:
    return (files("kvq_core.bench") / "assets" / name).read_text("utf-8")


def _where(comparison: Comparison) -> str:
    """Where and when it was measured."""
    places = dict.fromkeys(
        str(r.engine.get("url") if r.is_remote else r.env.get("gpu") or r.env.get("cpu") or "CPU")
        for r in comparison.records
    )
    dates = sorted({str(record.env.get("date", ""))[:10] for record in comparison.measured} - {""})
    count = len(comparison.measured)
    span = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    return ", ".join(filter(None, [*places, span, f"{count} run{'s' * (count > 1)}"]))


def _legend(colors: dict[str, int]) -> str:
    buttons = "".join(
        f'<button data-toggle="{color}" aria-pressed="true">'
        f'<svg class="key {style(color)}" viewBox="0 0 12 12" aria-hidden="true">'
        f'<path class="fill" d="{marker(color, 6, 6)}"/></svg>{escape(name)}</button>'
        for name, color in colors.items()
    )
    return f'<div class="group"><span>policies</span>{buttons}</div>'


def _views(group: str, label: str, views: Sequence[tuple[str, str, str]]) -> str:
    """(name, button, content) of views of which one is seen; no buttons where there is but one."""
    buttons = "".join(
        f'<button data-group="{group}" data-show="{escape(name)}" aria-pressed="{str(not i).lower()}">'
        f"{escape(text)}</button>"
        for i, (name, text, _) in enumerate(views)
    )
    content = "".join(
        f'<div data-view="{group}" data-name="{escape(name)}"{" hidden" * bool(i)}>{html}</div>'
        for i, (name, _, html) in enumerate(views)
    )
    choice = f'<div class="group"><span>{label}</span>{buttons}</div>' if len(views) > 1 else ""
    return choice + content


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def _trade_off(comparison: Comparison, colors: dict[str, int]) -> str:
    """Throughput against latency: a chart a context, a line a policy, a dot a load."""
    views = [
        (name, text, f'<div class="charts">{charts}</div>')
        for name, text in TRADE.items()
        if (charts := _trade_off_charts(comparison, colors, name))
    ]
    text = (
        '<p class="soft">Up and to the left is better. Dots of a line are loads, by requests at a time.</p>'
    )
    return _section("Throughput against latency", text, _views("trade", "latency", views)) if views else ""


def _trade_off_charts(comparison: Comparison, colors: dict[str, int], latency: str) -> str:
    charts = []
    contexts = sorted({record.context or 0 for record in comparison.records})
    for context in contexts:
        series = []
        for name, color in colors.items():
            dots = []
            for i in comparison.order:
                record = comparison.records[i]
                x, y = record.get(f"median_{latency}_ms"), record.get("output_throughput")
                if record.name != name or (record.context or 0) != context or x is None or not y:
                    continue
                tip = (
                    f"{comparison.names[i]}\n{number(y)} output tok/s\nmedian {NAMES[latency]} {number(x)} ms"
                )
                if not comparison.is_baseline(i) and (change := comparison.change(i, "output_throughput")):
                    tip += f"\n{change - 1:+.1%} against {comparison.baselines[i].name}"
                dots.append(
                    Dot(x, y, tip, str(record.concurrency or "") if name == next(iter(colors)) else "")
                )
            series.append(Series(color, dots))
        title = f"context {context:,}" if len(contexts) > 1 else "output tokens per second"
        across = Axis(f"median {NAMES[latency]}, ms", zero=False)
        charts.append(chart(title, across, Axis("output tok/s"), series))
    return "".join(charts)


def _per_cell(
    title: str, group: str, comparison: Comparison, draw: Callable[[Sequence[RunRecord]], str]
) -> str:
    """Charts of every cell of a sweep, of which one is seen at a time; the highest load comes first."""
    rows = [comparison.records[i] for i in comparison.order]
    views = []
    for cell, records in groupby(rows, cell_of):
        context, concurrency = cell
        text = " × ".join(
            filter(
                None, [f"{concurrency:.0f} at a time" * bool(concurrency), f"{context:,.0f}" * bool(context)]
            )
        )
        content = draw(list(records))
        if content:
            views.append(
                (f"{context:.0f}-{concurrency:.0f}", text or "all", f'<div class="charts">{content}</div>')
            )
    return _section(title, _views(group, "load × context", views[::-1])) if views else ""


def _distributions(colors: dict[str, int]) -> Callable[[Sequence[RunRecord]], str]:
    def draw(records: Sequence[RunRecord]) -> str:
        charts = []
        for latency in ("ttft", "itl"):
            series = []
            for record in records:
                values = record.quantiles.get(latency, [])
                dots = [
                    Dot(
                        value,
                        p,
                        f"{record.name}\np{p} {NAMES[latency]} {number(value)} ms" if p in MARKED else "",
                    )
                    for p, value in enumerate(values)
                ]
                series.append(Series(colors[record.name], dots))
            across = Axis(f"{NAMES[latency]}, ms", log=True)
            up = Axis("% of " + ("requests" if latency == "ttft" else "gaps") + " at most so long", top=100)
            charts.append(chart(f"{NAMES[latency]} (markers: p50, p90, p99)", across, up, series))
        return "".join(charts)

    return draw


def _timelines(colors: dict[str, int]) -> Callable[[Sequence[RunRecord]], str]:
    def draw(records: Sequence[RunRecord]) -> str:
        charts = []
        for key, title, unit in (
            ("kv_tokens", "tokens in the cache", "tokens"),
            ("waiting", "requests that wait for room", "requests"),
        ):
            series = []
            for record in records:
                line = record.timeline
                dots = [Dot(x, y) for x, y in zip(line.get("time_s", []), line.get(key, []), strict=False)]
                series.append(Series(colors[record.name], dots))
            if key == "kv_tokens" or any(dot.y for one in series for dot in one.dots):
                charts.append(chart(title, Axis("seconds from the start"), Axis(unit), series))
        return "".join(charts)

    return draw


def _memory(comparison: Comparison, colors: dict[str, int]) -> str:
    first = {record.name: record for record in reversed(comparison.records)}
    records = [first[name] for name in dict.fromkeys(record.name for record in comparison.records)]

    def rows(key: str, text: Callable[[RunRecord, float], str]) -> list[tuple[str, int, float, str]]:
        found = [(record, record.get(key)) for record in records]
        return [(r.name, colors[r.name], value, text(r, value)) for r, value in found if value]

    sizes = rows("bytes_per_token", lambda r, v: f"{v:,.0f} B, {number(r.get('bits_per_element'))} bits")
    capacity = rows("capacity_tokens", lambda r, v: f"{v:,.0f}")
    charts = bars("bytes a token (effective bits a number)", sizes) + bars(
        "tokens that fit into the cache", capacity
    )
    return _section("Memory", f'<div class="charts">{charts}</div>') if charts else ""


def _quality(quality: Sequence[RunRecord], colors: dict[str, int]) -> str:
    charts = ""
    for key, title, log in (
        ("kl", "KL divergence from the unquantized model, nats per token", True),
        ("ppl", "perplexity", False),
    ):
        series = []
        for record in quality:
            bits, value = record.get("bits_per_element"), record.get(key)
            if bits is None or value is None or (log and value <= 0):
                continue
            tip = f"{record.name}\n{number(bits)} bits\n{key.upper()} {number(value)}"
            dot = Dot(bits, value, tip, record.name if record.name in colors else "")
            series.append(Series(colors.get(record.name, OTHER), [dot], line=False))
        charts += chart(
            title, Axis("effective bits a number"), Axis(key.upper(), log=log, zero=False), series
        )
    if not charts:
        return ""
    work = quality[0].workload
    where = f"{quality[0].model.get('name')}, {work.get('name')}"
    note = f"Measured by kvq eval on {where}. Down and to the left is better."
    return _section(
        "Quality against bits", f'<p class="soft">{escape(note)}</p><div class="charts">{charts}</div>'
    )


def _tables(comparison: Comparison, kl: Kl | None) -> str:
    tables = comparison_tables(comparison, kl)
    even = break_even_table(comparison)
    cells = [cell_of(comparison.records[i]) for i in comparison.order]
    starts = {i for i in range(1, len(cells)) if cells[i] != cells[i - 1]}
    parts = [_table(even, set())] if even else []
    return _section("Tables", *parts, *(_table(table, starts) for table in tables))


def _table(table: Table, starts: set[int]) -> str:
    head = "".join(f"<th>{escape(column).replace(chr(10), '<br>')}</th>" for column in table.columns)
    body = ""
    for i, row in enumerate(table.rows):
        cells = ""
        for cell in row:
            tone = "" if cell.better is None else ' class="good"' if cell.better else ' class="bad"'
            change = f"<small{tone}>{escape(cell.change)}</small>" if cell.change else ""
            cells += f"<td>{escape(cell.text)}{change}</td>"
        body += f"<tr{' class=first' * (i in starts)}>{cells}</tr>"
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _provenance(comparison: Comparison, quality: Sequence[RunRecord]) -> str:
    """Command and environment, once for all records that share them."""
    groups: dict[str, tuple[RunRecord, list[str]]] = {}
    names = {
        id(run): name for name, runs in zip(comparison.names, comparison.runs, strict=True) for run in runs
    }
    for record in [*comparison.measured, *quality]:
        env = {key: value for key, value in record.env.items() if key != "date"}
        name = names.get(id(record), record.name)
        groups.setdefault(repr(sorted(env.items(), key=str)), (record, []))[1].append(name)
    parts = []
    for record, labels in groups.values():
        env = record.env
        versions = ", ".join(
            f"{name} {version}" for name, version in (env.get("versions") or {}).items() if version
        )
        facts = {
            "model": ", ".join(
                str(v) for k in ("name", "dtype", "load_format") if (v := record.model.get(k))
            ),
            "GPU": env.get("gpu"),
            "driver": env.get("driver"),
            "CPU": env.get("cpu") and f"{env['cpu']}, {env.get('cpu_count')} cores",
            "platform": env.get("platform"),
            "Python": env.get("python"),
            "versions": versions,
            "commit": env.get("git_sha")
            and str(env["git_sha"])[:10] + " and changes" * bool(env.get("git_dirty")),
            "seed": env.get("seed"),
            "date": env.get("date"),
        }
        rows = "".join(
            f"<dt>{name}</dt><dd>{escape(str(value))}</dd>"
            for name, value in facts.items()
            if value not in (None, "")
        )
        shown = ", ".join(dict.fromkeys(labels))
        parts.append(
            f"<details open><summary>{escape(shown)}</summary>"
            f"<pre>{escape(str(env.get('command', '')))}</pre>"
            f"<dl>{rows}</dl></details>"
        )
    return _section("How it was measured", *parts)
