"""The flags that commands share, as annotated types; `engine_options` gives a command all the engine's.

    @engine_options()
    def run(prompt: ..., model: Model = DEFAULT_MODEL, *, config: EngineConfig) -> None: ...

The command gets one `config` in place of the flags; defaults come from `EngineConfig` alone.
"""

import inspect
import os
import re
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kvq_core.config import SERVING, EngineConfig, SamplingParams
from kvq_core.errors import UsageError
from kvq_core.policies import REGISTRY

T = TypeVar("T")

DEFAULTS = EngineConfig()
SAMPLING = SamplingParams()
DEFAULT_MODEL = "demo"

MODEL_PANEL = "Model"
CACHE_PANEL = "KV cache"
ENGINE_PANEL = "Engine"
SAMPLING_PANEL = "Sampling"
CHECK_PANEL = "Checks"
SERVER_PANEL = "Server"
OUTPUT_PANEL = "Output"

UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "float32": "float32", "fp32": "float32",
    "float64": "float64",
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes from `8GiB`, `500MB`, `8G` (= GiB) or a plain number; `UsageError` for anything else."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = match and UNITS.get(match[2].lower())
    if not match or unit is None:
        raise UsageError(
            f"`{text}` is not an amount of memory",
            "a number and a unit, as in `8GiB`, `512MiB` or `16GB` (GiB = 1024³ bytes, GB = 1000³)",
        )
    size = float(match[1]) * unit
    if not 1 <= size < float("inf"):
        raise UsageError(
            f"`{text}` is {'no memory at all' if size < 1 else 'more than any memory'}",
            "an amount above zero that a machine has, as in `512MiB`",
        )
    return int(size)


def format_size(size: float) -> str:
    """`2.50 GiB`: the largest binary unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def parse_fraction(text: str | float) -> float:
    """0.01 from `0.01` or `1%`."""
    if isinstance(text, float):
        return text
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"`{text}` is not a share", "a number as `0.01`, or `1%`")
    return value


def naming(flag: str, parse: Callable[[Any], T]) -> Callable[[Any], T]:
    """The parser of a flag's values, whose complaints name the flag."""

    def parse_value(text: Any) -> T:
        try:
            return parse(text)
        except UsageError as error:
            raise UsageError(f"{flag}: {error.message}", error.hint) from None

    return parse_value


def parse_dtype(text: str) -> str:
    """The dtype's full name, from that or an abbreviation (`bf16`); `UsageError` for anything else."""
    if text.lower() not in DTYPES:
        raise UsageError(f"unknown dtype `{text}`", f"use one of {', '.join(sorted(set(DTYPES.values())))}")
    return DTYPES[text.lower()]


def parse_device(text: str) -> str:
    """The device as it was typed; `UsageError` where it can't be one."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise UsageError(f"unknown device `{text}`", "use `auto`, `cpu`, `cuda` or `cuda:N`")
    return text


def complete_policy(incomplete: str) -> list[str]:
    """Numbers and names of policies that begin so, for the shell."""
    names = [str(name) for p in REGISTRY for name in (p.number, p.name) if name is not None]
    return [name for name in names if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Built-in models that begin so, for the shell."""
    from kvq_core.presets import PRESETS

    return [name for name in (DEFAULT_MODEL, *PRESETS) if name.startswith(incomplete)]


# Model

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m",
        help="A Hugging Face hub id, a folder, a .gguf file, `demo` (SmolLM2-135M, fetched once), or, with "
        "--load-format dummy, a preset such as `qwen3-30b-a3b`.",
        autocompletion=complete_model,
        rich_help_panel=MODEL_PANEL,
    ),
]  # fmt: skip
BenchModel = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help="As for `kvq run`; where servers are measured, the tokenizer: a hub id, a folder or `demo`.",
        autocompletion=complete_model,
        show_default="demo; where servers are measured, the name of their model",
        rich_help_panel=MODEL_PANEL,
    ),
]  # fmt: skip
ChatModel = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help="As for `kvq run`; with --url, the server's name for it.",
        autocompletion=complete_model,
        show_default="demo; with --url, the server's first",
        rich_help_panel=MODEL_PANEL,
    ),
]  # fmt: skip
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",  # named, because typer 0.27 takes a metavar that is the same word for the name
        help="Type of weights and activations, and of the cache under policy 0: auto, bfloat16, float16, "
        "float32, float64. `auto` takes the checkpoint's on a GPU, float32 on a CPU.",
        parser=parse_dtype,
        metavar="DTYPE",
        rich_help_panel=MODEL_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="auto (a GPU if there is one), cpu, cuda or cuda:N.",
        parser=parse_device,
        metavar="DEVICE",
        rich_help_panel=MODEL_PANEL,
    ),
]
Tp = Annotated[
    int,
    typer.Option(
        "--tp",
        min=1,
        metavar="N",
        help="Split the model and its KV cache over N GPUs (tensor parallelism); the other processes are "
        "started here, or by torchrun for several machines. With --device cpu, N processes.",
        rich_help_panel=MODEL_PANEL,
    ),
]
LoadFormat = Annotated[
    str,
    typer.Option(
        help="auto: the checkpoint's weights. dummy: random weights, which measures speed and memory of any "
        "config without a checkpoint.",
        metavar="FORMAT",
        rich_help_panel=MODEL_PANEL,
    ),
]

# KV cache

Policy = Annotated[
    str,
    typer.Option(
        "--policy", "--quant-policy", "-p",
        help="What happens to keys and values: 0 (none), 8 (int8), 4 (int4), 16 (fp8), 42 (turbo), or a pair "
        "K:V of codecs such as int8:lm4. `kvq policies` lists them with their sizes.",
        autocompletion=complete_policy,
        rich_help_panel=CACHE_PANEL,
    ),
]  # fmt: skip
Policies = Annotated[
    str,
    typer.Option(
        "--policies", "--quant-policies",
        help="Policies to measure one after another, separated by commas; the first is the baseline.",
        rich_help_panel=CACHE_PANEL,
    ),
]  # fmt: skip
Sink = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Keep the first N tokens of every request unquantized. 4 is usually enough.",
        show_default="the policy's own, 0",
        rich_help_panel=CACHE_PANEL,
    ),
]
Recent = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Keep the last N tokens of every request unquantized. 128 brings policy 42 close to int8's "
        "quality; it costs memory for every running request.",
        show_default="the policy's own, 0",
        rich_help_panel=CACHE_PANEL,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        help="Codecs of some layers in place of the policy's, as `0,1,-2,-1=8` or `4-9=int8:lm3`; several "
        "times for more. `kvq eval --sensitivity` proposes them.",
        metavar="LAYERS=POLICY",
        show_default="the policy's, for all layers",
        rich_help_panel=CACHE_PANEL,
    ),
]
KeyBias = Annotated[
    str,
    typer.Option(
        help="auto: where a model's keys have a large constant part (Qwen2), it stays out of the cache, "
        "so that few bits are enough. off: quantize keys as they are.",
        metavar="auto|off",
        rich_help_panel=CACHE_PANEL,
    ),
]
KvMemory = Annotated[
    int | None,
    typer.Option(
        help="Memory for the KV cache of each GPU, as `8GiB` or `512MiB`. The same for every "
        "policy makes them comparable.",
        parser=naming("--kv-memory", parse_size),
        metavar="SIZE",
        show_default="sized from free memory",
        rich_help_panel=CACHE_PANEL,
    ),
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option(
        "--gpu-memory-utilization", "--cache-max-entry-count",
        help="Share of the device's memory that weights, activations and KV cache may use together; ignored "
        "with --kv-memory. LMDeploy's name: --cache-max-entry-count.",
        metavar="X",
        rich_help_panel=CACHE_PANEL,
    ),
]  # fmt: skip
PageSize = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", help="Tokens a page of the cache, a multiple of 16.", rich_help_panel=CACHE_PANEL
    ),
]

# Engine

MaxNumSeqs = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", help="Most requests that run at the same time.", rich_help_panel=ENGINE_PANEL
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        show_default=f"{DEFAULTS.chunk(windowed=False)}; for models with sliding windows "
        f"{DEFAULTS.chunk(windowed=True)}; with --prefix-caching {SERVING.chunk(windowed=False)}",
        help="Prompts are read in chunks of this many tokens, fewer far into a long one. "
        "A chunk sees itself unquantized.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--prefix-caching/--no-prefix-caching",
        help="Keep what was computed of prompts, in whole chunks (--prefill-chunk), for prompts that begin "
        "alike. Tokens are the same, and its pages are given up when they are needed.",
        rich_help_panel=CACHE_PANEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Most tokens of a prompt and its answer together.",
        show_default="the model's own",
        rich_help_panel=ENGINE_PANEL,
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="Don't capture CUDA graphs: slower, starts faster, the same tokens.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
Fidelity = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Have this share of decode steps, as 0.01, attend to unquantized keys and values too, and "
        "report by layer how far the codec's are off; a jump is a warning. 0: off, and costs nothing.",
        parser=naming("--fidelity", parse_fraction),
        rich_help_panel=ENGINE_PANEL,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", rich_help_panel=ENGINE_PANEL)]

# Sampling

MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        "-n",
        min=1,
        metavar="N",
        help="Most tokens to generate.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "-t", min=0, metavar="N", help="0 is greedy.", rich_help_panel=SAMPLING_PANEL
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Sample from the K likeliest tokens; 0: all.", rich_help_panel=SAMPLING_PANEL
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        help="Sample from the likeliest tokens that together reach this probability.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text. May be repeated.", rich_help_panel=SAMPLING_PANEL),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos",
        help="Go on to --max-new-tokens whatever the model says.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="System message, which tells the model how to answer.",
        rich_help_panel=SAMPLING_PANEL,
    ),
]

# Servers

ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Environment variable with the server's API key.",
        show_default="no key",
        rich_help_panel=SERVER_PANEL,
    ),
]

# Output

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT_PANEL)
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Write the record(s) to this JSON file.", rich_help_panel=OUTPUT_PANEL
    ),
]

ENGINE_FLAGS: dict[str, Any] = {
    "policy": Policy,
    "sink": Sink,
    "recent": Recent,
    "layers": Layers,
    "key_bias": KeyBias,
    "kv_memory": KvMemory,
    "gpu_memory_utilization": GpuMemoryUtilization,
    "page_size": PageSize,
    "dtype": Dtype,
    "device": Device,
    "load_format": LoadFormat,
    "tp": Tp,
    "max_num_seqs": MaxNumSeqs,
    "prefill_chunk": PrefillChunk,
    "prefix_caching": PrefixCaching,
    "max_model_len": MaxModelLen,
    "enforce_eager": EnforceEager,
    "fidelity": Fidelity,
    "seed": Seed,
}
"""Field of `EngineConfig` -> its flag."""


def engine_options(
    without: Collection[str] = (), defaults: EngineConfig = DEFAULTS
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command every engine flag but those in `without`; it receives one `config: EngineConfig`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        flags = {name: flag for name, flag in ENGINE_FLAGS.items() if name not in without}

        @wraps(command)
        def with_config(**values: Any) -> Any:
            config = EngineConfig(**{name: values.pop(name) for name in flags})
            return command(config=config, **values)

        kind = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.signature(command)
        parameters = [p.replace(kind=kind) for p in signature.parameters.values() if p.name != "config"]
        parameters += [
            inspect.Parameter(name, kind, default=_flag_default(name, defaults), annotation=flag)
            for name, flag in flags.items()
        ]
        with_config.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_config.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_config

    return decorate


def name_the_flag(error: UsageError, command: str) -> UsageError:
    """The same complaint, about the flag that was typed instead of the field it became, and with a hint."""
    word, _, complaint = error.message.partition(" ")
    field = word.removesuffix(":")
    flagged = field in ENGINE_FLAGS or field in SamplingParams.__dataclass_fields__
    message = f"--{word.replace('_', '-')} {complaint}" if flagged else error.message
    return UsageError(message, error.hint or f"`{command} --help` shows every option")


def _flag_default(name: str, defaults: EngineConfig) -> Any:
    value = getattr(defaults, name)
    return str(value) if name == "policy" else value


def sampling_params(**values: Any) -> SamplingParams:
    """`SamplingParams` from the flags; a `stop` of None is no stop text."""
    return SamplingParams(**values | {"stop": tuple(values.get("stop") or ())})


def api_key_from(variable: str | None) -> str | None:
    """The API key in an environment variable; None where none is named."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(
            f"--api-key-env: there is nothing in the environment variable {variable}",
            f"`export {variable}=…`; the option takes the variable's name, not the key",
        )
    return key
