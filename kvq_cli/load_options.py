"""The flags of the load that a benchmark puts on an engine, and what they amount to where the model runs."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Annotated, Any

import typer

from kvq_cli import console
from kvq_cli.options import ENGINE_PANEL
from kvq_core.bench.load import Load, Ramp
from kvq_core.bench.metrics import parse_limits
from kvq_core.bench.sweep import Point
from kvq_core.bench.workload import NAMES, WARMUP_TOKENS, WorkloadSpec
from kvq_core.errors import UsageError

LOAD_PANEL = "Load"
INPUT_LEN = WorkloadSpec.input_len
LENGTH_NAMES = ("fixed", "random", "prefix")
"""Datasets whose prompts are as long as one likes."""
CONCURRENCY = 64
"""Requests in flight where neither --concurrency nor --request-rate says anything."""
MIN_OF_CELL = 4
"""Fewest requests of a sweep's cell, unless --num-prompts says otherwise."""
CPU_OUTPUT_CAP = 64
"""On a CPU, answers are cut to this many tokens unless --max-output-len says otherwise."""
CPU_WARMUP_INPUT = 32
"""On a CPU, prompts of the warm-up are cut to this many tokens: there is nothing to compile or capture."""


def _flag(
    kind: Any, names: str, help: str, *, metavar: str = "N", panel: str = LOAD_PANEL, **more: Any
) -> Any:
    flags = names.split()
    return Annotated[kind, typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=panel, **more)]


def _count(names: str, help: str, default: str, panel: str = LOAD_PANEL) -> Any:
    """A positive number that is chosen for the user; `default` says how."""
    return _flag(int | None, names, help, min=1, show_default=default, panel=panel)


def _complete_name(incomplete: str) -> list[str]:
    return [name for name in NAMES if name.startswith(incomplete)]


Repeats = Annotated[
    int,
    typer.Option(
        "--repeats",
        min=1,
        metavar="N",
        help="Measure N times (several policies or servers: in turns), and show means with their 95% "
        "intervals; every run stays in the record file.",
        rich_help_panel=LOAD_PANEL,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        "-c",
        min=1,
        metavar="N",
        help="Requests in flight: the next one is sent as soon as one ends. With --request-rate, the most "
        "that are in flight; what is due beyond them waits, and the wait counts.",
        show_default=f"{CONCURRENCY}; with --request-rate, no limit",
        rich_help_panel=LOAD_PANEL,
    ),
]
LOAD_FLAGS: dict[str, tuple[Any, Any]] = {
    "concurrency": (Concurrency, None),
    "request_rate": (
        _flag(
            float | None,
            "--request-rate",
            "Requests per second, whether earlier ones have ended or not; latencies count from when a "
            "request is due. `inf` is a closed loop, as is leaving it out.",
            metavar="R",
            show_default="a closed loop",
        ),
        None,
    ),
    "ramp_up": (
        _flag(
            str | None,
            "--ramp-up",
            "Requests per second that change from the first request to the last, not --request-rate: "
            "linear:1..10 or exponential:1..64.",
            metavar="SHAPE:FROM..TO",
            show_default=False,
        ),
        None,
    ),
    "trace_speed": (
        _flag(
            float | None,
            "--trace-speed",
            "trace: replay its arrivals this many times as fast.",
            metavar="X",
            show_default="1",
        ),
        None,
    ),
    "burstiness": (
        _flag(
            float,
            "--burstiness",
            "Intervals between arrivals follow a gamma distribution of this shape: 1 is a Poisson process, "
            "less comes in bursts, more is steadier.",
            metavar="B",
        ),
        Load.burstiness,
    ),
    "goodput": (
        _flag(
            list[str] | None,
            "--goodput",
            "Count requests that meet all of these limits, in milliseconds: ttft:500 tpot:50 e2el:20000.",
            metavar="LIMIT...",
        ),
        None,
    ),
    "duration": (
        _flag(
            float | None,
            "--duration",
            "Send nothing more after this many seconds, and wait for what is in flight.",
            metavar="SECONDS",
            show_default="until all are sent",
        ),
        None,
    ),
    "cancel_rate": (
        _flag(
            float,
            "--cancel-rate",
            "Cancel this share of the requests in the middle of their answers, as users do; which, and after "
            "how many tokens, follows from --seed.",
            metavar="SHARE",
        ),
        Load.cancel_rate,
    ),
    "num_prompts": (
        _count(
            "--num-prompts",
            "Requests to measure.",
            "2 x concurrency, on a CPU concurrency; rate x duration where both are given",
        ),
        None,
    ),
    "max_output_len": (
        _count("--max-output-len", "Cut answers to N tokens.", f"uncut; on a CPU, {CPU_OUTPUT_CAP}"),
        None,
    ),
    "warmup": (
        _count(
            "--num-warmups --warmup",
            f"Requests before the measured ones, stopped after {WARMUP_TOKENS} tokens; at least as many as "
            "are in flight, so that nothing is measured the first time that it runs.",
            "as many as are in flight",
        ),
        None,
    ),
    "dataset_name": (
        _flag(
            str | None,
            "--dataset-name",
            "sharegpt: recorded conversations, the first prompt and as many tokens as its answer has. "
            "lengths: random token ids, lengths from a file. fixed, random: random token ids, --input-len "
            "and --output-len of them. prefix: the same after one of --num-prefixes shared beginnings. "
            "jsonl: prompts from a file. trace: requests that arrive as a file's timestamps say.",
            metavar="NAME",
            autocompletion=_complete_name,
            show_default="sharegpt; fixed where --sweep has a context",
        ),
        None,
    ),
    "dataset_path": (
        Annotated[
            str | None,
            typer.Option(
                "--dataset-path",
                "--dataset",
                metavar="FILE",
                help="sharegpt: a JSON file in ShareGPT's schema, or `hub` to download the usual one. "
                "lengths: a JSON list of pairs, tokens of prompt and answer. jsonl: a line a request, with "
                "`prompt` and `output_length`. trace: a line a request, with `timestamp` in milliseconds, "
                "`input_length` or `prompt`, and `output_length`.",
                show_default="the sample that ships with kvq",
                rich_help_panel=LOAD_PANEL,
            ),
        ],
        None,
    ),
    "input_len": (
        _flag(
            int | None,
            "--input-len",
            "Tokens of a prompt (fixed), their mean (random), or those after the prefix (prefix).",
            min=1,
            show_default=str(INPUT_LEN),
        ),
        None,
    ),
    "output_len": (
        _flag(int, "--output-len", "Tokens of an answer (fixed), or their mean (random).", min=1),
        WorkloadSpec.output_len,
    ),
    "prefix_len": (
        _flag(int, "--prefix-len", "prefix: tokens that prompts share.", min=1),
        WorkloadSpec.prefix_len,
    ),
    "num_prefixes": (
        _flag(int, "--num-prefixes", "prefix: how many different ones there are.", min=1),
        WorkloadSpec.num_prefixes,
    ),
    "range_ratio": (
        _flag(
            float,
            "--range-ratio",
            "random: lengths are uniform in mean * (1 - X) to mean * (1 + X).",
            metavar="X",
        ),
        WorkloadSpec.range_ratio,
    ),
    "max_num_seqs": (
        _count(
            "--max-num-seqs",
            "Most requests that run at the same time.",
            "concurrency, where it is limited",
            ENGINE_PANEL,
        ),
        None,
    ),
}
"""Argument -> its flag and default."""


ANYWHERE = Point()


@dataclass(frozen=True)
class LoadPlan:
    """What to replay and how; None is resolved once it is known where the model runs."""

    spec: WorkloadSpec
    load: Load
    limits: dict[str, float]
    """Of the goodput: milliseconds by latency."""
    num_prompts: int | None
    max_output_len: int | None
    warmup: int | None
    max_num_seqs: int | None
    asked: Collection[str] = ()
    """Flags of the load that a sweep may set and that were given by themselves."""
    point: Point = ANYWHERE

    def at(self, point: Point) -> "LoadPlan":
        """The plan of one cell of a sweep, which sets its concurrency and the length of its prompts."""
        for name, value in (("concurrency", point.concurrency), ("input_len", point.context)):
            if value is not None and name in self.asked:
                raise UsageError(f"--{name.replace('_', '-')} is set by --sweep", "leave one of them out")
        spec, load = self.spec, self.load
        if point.context is not None:
            if "dataset_name" in self.asked and spec.name not in LENGTH_NAMES:
                raise UsageError(
                    f"--sweep context=… sets the length of prompts, which --dataset-name {spec.name} has",
                    f"leave --dataset-name out, or use one of {', '.join(LENGTH_NAMES)}",
                )
            name = spec.name if "dataset_name" in self.asked else "fixed"
            spec = replace(spec, name=name, input_len=point.context)
        if point.concurrency is not None:
            load = replace(load, concurrency=point.concurrency)
        return replace(self, spec=spec, load=load, point=point)

    @property
    def _answers_are_short(self) -> bool:
        """Whether all of them are as long as was asked for, and that is no longer than a CPU's cap."""
        return self.spec.name in ("fixed", "prefix") and self.spec.output_len <= CPU_OUTPUT_CAP

    def resolve(self, on_cpu: bool, talk: bool = True, available: int | None = None) -> WorkloadSpec:
        """Sizes for where the model runs; says so where they are smaller than elsewhere."""
        concurrency = self.load.concurrency or CONCURRENCY
        arriving = math.ceil((self.load.request_rate or 0) * (self.load.duration or 0))
        usual = concurrency * (1 if on_cpu else 2)
        if self.point.concurrency is not None:
            usual = max(usual, MIN_OF_CELL)
        num_prompts = self.num_prompts or arriving or available or usual
        max_output_len = self.max_output_len
        talk &= on_cpu and None in (self.num_prompts, max_output_len)
        if max_output_len is None and on_cpu and not self._answers_are_short:
            max_output_len = CPU_OUTPUT_CAP
        parts = [f"{num_prompts} requests"] * (self.num_prompts is None and self.point.concurrency is None)
        parts += [f"answers cut to {max_output_len} tokens"] * (max_output_len is not None)
        if talk and parts:
            console.say(f"on a CPU: {', '.join(parts)} (--num-prompts, --max-output-len)")
        in_flight = min(concurrency, num_prompts)
        warmup = self.warmup or in_flight
        if warmup < in_flight:
            raise UsageError(
                f"--num-warmups {warmup} is less than the {in_flight} requests in flight",
                "leave it out, or warm up with at least as many: what runs first is slower",
            )
        return replace(
            self.spec,
            num_prompts=num_prompts,
            num_warmup=warmup,
            max_output_len=max_output_len,
            warmup_input_len=CPU_WARMUP_INPUT if on_cpu else None,
        )


SEVERAL = {
    "--goodput": r"\w+:\S*",
    "--slo": r"\w+:\S*",
    "--sweep": r"[a-z-]+=[\d,]*",
}
"""Flags that take several values, and what a value looks like."""


def spread_values(args: Sequence[str]) -> list[str]:
    """`--goodput ttft:500 tpot:50`, as `vllm bench serve` takes it, with the flag before every value."""
    spread: list[str] = []
    for arg in args:
        flag = spread[-2] if len(spread) > 1 else ""
        if flag in SEVERAL and re.fullmatch(SEVERAL[flag], arg):
            spread.append(flag)
        spread.append(arg)
    return spread


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
    own = ("num_prompts", "max_output_len", "warmup", "max_num_seqs")
    rate = None if values["request_rate"] == math.inf else values["request_rate"]
    ramp = None if values["ramp_up"] is None else Ramp.parse(values["ramp_up"])
    speed = values["trace_speed"]
    if values["dataset_name"] == "trace":
        speed = 1.0 if speed is None else speed
    elif speed is not None:
        raise UsageError("--trace-speed needs --dataset-name trace", "only a trace says when requests arrive")
    is_open = any(how is not None for how in (rate, ramp, speed))
    load = Load(
        concurrency=values["concurrency"] or (None if is_open else CONCURRENCY),
        request_rate=rate,
        ramp=ramp,
        trace_speed=speed,
        burstiness=values["burstiness"],
        duration=values["duration"],
        cancel_rate=values["cancel_rate"],
    )
    spec = WorkloadSpec(
        name="sharegpt" if values["dataset_name"] is None else values["dataset_name"],
        path=values["dataset_path"],
        input_len=values["input_len"] or INPUT_LEN,
        output_len=values["output_len"],
        range_ratio=values["range_ratio"],
        prefix_len=values["prefix_len"],
        num_prefixes=values["num_prefixes"],
    )
    asked = [name for name, (_, default) in LOAD_FLAGS.items() if values[name] != default]
    sizes = {name: values[name] for name in own}
    return LoadPlan(spec, load, parse_limits(values["goodput"] or ()), asked=asked, **sizes)
