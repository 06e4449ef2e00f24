"""Load a model: a hub id, a folder, a GGUF file, the demo model, or a config with random weights."""

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvq_core.demo import DEMO, WHEEL_SHA256
from kvq_core.errors import KvqError, UsageError
from kvq_core.host import available_bytes
from kvq_core.models.dummy import build_dummy, fill_dummy
from kvq_core.models.geometry import ModelGeometry, as_ids, model_geometry, rope_parameters, text_config
from kvq_core.models.key_bias import KeyBiases, find_key_biases
from kvq_core.models.probe import probe
from kvq_core.models.source import Source, quiet, resolve, translated
from kvq_core.models.support import check_support
from kvq_core.parallel.group import ALONE, Group, check_heads
from kvq_core.presets import DEMO_CONFIG, PRESETS, find_preset

_numbers = count()
"""Names models to other ranks."""
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model with kvq's attention function, ready for the engine."""

    name: str
    model: Any
    """transformers' model: in eval mode, `attn_implementation="kvq"`, without a cache of its own."""
    tokenizer: Any | None
    config: Any
    """The text config."""
    dtype: torch.dtype
    device: torch.device
    geometry: ModelGeometry
    """Of this rank's shard."""
    whole: ModelGeometry
    """Of the model; the same unless there are several ranks."""
    parameters: int
    """Of the model."""
    load_format: str
    key_biases: KeyBiases | None = None
    """Large constant parts of the keys, if there are any."""
    sha: str | None = None
    """Commit of the hub repository, or SHA-256 of the demo model's wheel."""
    group: Group = ALONE
    """The ranks that have a shard each."""
    number: int = 0
    """Its name among them."""

    def describe(self) -> dict[str, Any]:
        """What a run record says of the model."""
        geometry, layer = self.whole, self.whole.layers[0]
        return {
            "name": self.name,
            "architecture": type(self.model).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "load_format": self.load_format,
            "parameters": self.parameters,
            "layers": geometry.num_layers,
            "q_heads": geometry.num_q_heads,
            "kv_heads": layer.num_kv_heads,
            "head_dim": layer.key_dim,
            "windows": sorted({entry.window for entry in geometry.layers}),
            "biased_key_layers": len(self.key_biases.biases) if self.key_biases else 0,
            "sha": self.sha,
        }


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    load_format: str = "auto",
    need_tokenizer: bool = True,
    tp: int = 1,
) -> LoadedModel:
    """Load `name` and check that kvq can run it.

    `dtype="auto"` is float32 on a CPU and the checkpoint's on a GPU (float16 where bfloat16 is not native).
    Without `need_tokenizer` no tokenizer is looked for. A folder without one, and a preset, give None:
    such a model takes token ids. With `tp` above 1, that many processes hold a shard each, led by this one.
    Raises `KvqError` for anything that can't be loaded.
    """
    from kvq_core.parallel.launch import start_group

    if tp > 1:  # before anything is started
        resolve_device(device)
        config = load_config(name, load_format=load_format)
        check_support(config)
        geometry = model_geometry(config)
        for layer in geometry.layers:
            check_heads(f"model type {config.model_type!r}", geometry.num_q_heads, layer.num_kv_heads, tp)
    group = start_group(tp, device)
    number, kind = next(_numbers), resolve_device(device).type
    with group.together():
        group.tell("load", number, name, kind, {"dtype": dtype, "load_format": load_format})
        place = resolve_device(device) if tp == 1 else group.place(kind)
        loaded = load_shard(name, group, number, place, dtype=dtype, load_format=load_format)
    tokenizer = load_tokenizer(name, load_format=load_format) if need_tokenizer else None
    return replace(loaded, tokenizer=tokenizer)


def load_shard(
    name: str, group: Group, number: int, place: torch.device, *, dtype: str, load_format: str
) -> LoadedModel:
    """What this rank of a group keeps of a model; on every rank at the same time. Without the tokenizer."""
    from kvq_core.parallel.shard import check_seen, find_shards

    config = load_config(name, load_format=load_format)
    model_class = check_support(config)
    planned = model_geometry(config)
    kind = resolve_dtype(dtype, config, place)
    _register_attention()
    experts = _experts_implementation(model_class, kind)
    with quiet(), translated(name):
        if load_format == "dummy":
            model = build_dummy(config, dtype=kind, device=place, **experts)
            shards = find_shards(model, planned, group)
            parameters = sum(p.numel() for p in model.parameters())
            if place.type == "cpu":
                _check_fits(name, parameters * kind.itemsize // group.size)
            fill_dummy(model, place, shards.cut)
        else:
            with group.in_turn():
                model = _from_pretrained(resolve(name), config, kind, place, experts, group)
                shards = find_shards(model, planned, group)
                parameters = sum(p.numel() for p in model.parameters())
                shards.cut_parameters(model)
                model.to(place)
    shards.install(model)
    model.eval().requires_grad_(False)
    _freeze_rope(model)
    geometry = probe(model, planned)
    check_seen(model, planned, geometry, group)
    key_biases = find_key_biases(model, geometry)
    model.set_attn_implementation("kvq")
    model.config.use_cache = False
    stops = as_ids(getattr(model.generation_config, "eos_token_id", None)) or geometry.eos_token_ids
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=None,
        config=text_config(model.config),
        dtype=kind,
        device=place,
        geometry=replace(geometry, eos_token_ids=stops),
        whole=geometry if group.size == 1 else planned,
        parameters=parameters,
        load_format=load_format,
        key_biases=key_biases,
        sha=WHEEL_SHA256
        if name == DEMO and load_format != "dummy"
        else getattr(config, "_commit_hash", None),
        group=group,
        number=number,
    )


def _check_fits(name: str, size: int) -> None:
    """Refuse weights larger than the free memory: the system would end the process without a word."""
    free = available_bytes()
    if size > free:
        raise KvqError(
            f"the weights of {name!r} take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free",
            "use a smaller model or `--dtype bfloat16`, or close what else uses the memory",
        )


def load_config(name: str, *, load_format: str = "auto") -> Any:
    """The transformers config of a model, without its weights; presets by name, too."""
    from transformers import AutoConfig

    preset = find_preset(name)
    if preset is not None and (load_format == "dummy" or name in PRESETS) and not Path(name).exists():
        return AutoConfig.for_model(**preset.config)
    if name == DEMO:
        return AutoConfig.for_model(**DEMO_CONFIG)
    source = resolve(name)
    with quiet(), translated(name):
        return AutoConfig.from_pretrained(source.path, **source.arguments)


def load_tokenizer(name: str, *, load_format: str = "auto") -> Any | None:
    """The tokenizer, or None where the model has none (a preset, a folder with weights alone)."""
    from transformers import AutoTokenizer

    if load_format == "dummy" and (name == DEMO or find_preset(name) is not None):
        return None
    source = resolve(name)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if (
        source.local
        and source.gguf_file is None
        and not any((Path(source.path) / f).is_file() for f in files)
    ):
        return None
    with quiet(), translated(name):
        return AutoTokenizer.from_pretrained(source.path, **source.arguments)


def resolve_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:N`; raises `KvqError` where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError(f"unknown device {device!r}", "use `auto`, `cpu`, `cuda` or `cuda:N`")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise KvqError(
            f"device {device!r} was asked for, but torch finds no GPU",
            "`kvq doctor` shows what torch sees; `--device cpu` uses the reference backend",
        )
    if index and int(index) >= torch.cuda.device_count():
        raise KvqError(f"there is no device {device!r}", f"this machine has {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", int(index or torch.cuda.current_device()))


def resolve_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype {dtype!r}", f"use auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    stated = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    stated = DTYPES.get(str(stated).removeprefix("torch."), torch.bfloat16)
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    if stated == torch.float16 or not native:
        return torch.float16
    return torch.bfloat16


def _from_pretrained(
    source: Source,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    experts: dict[str, Any],
    group: Group,
) -> nn.Module:
    """The whole model: on the device, or, where the device is to have a shard, on the host."""
    from transformers import AutoModelForCausalLM

    if source.gguf_file is None:  # a GGUF file's config is read anew, with what loading it needs
        experts = {**experts, "config": config}
    if device.type == "cuda" and group.size == 1:
        experts = {**experts, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, attn_implementation="kvq", **experts, **source.arguments
    )


def _experts_implementation(model_class: type, dtype: torch.dtype) -> dict[str, Any]:
    """Experts as grouped GEMMs, where the model class lets us choose; torch has none in float64."""
    can_set = getattr(model_class, "_can_set_experts_implementation", None)
    if can_set is None or not can_set():
        return {}
    return {"experts_implementation": "eager" if dtype == torch.float64 else "grouped_mm"}


def _register_attention() -> None:
    from kvq_core.attention import register  # here, because its cache needs this package's geometry

    register()


def _freeze_rope(model: nn.Module) -> None:
    """Keep the frequencies of `dynamic` and `longrope` at those of short contexts.

    `max_model_len` stays where they hold; transformers would compare the positions of every batch with that
    limit on the host, which no CUDA graph can contain.
    """
    if not any(
        rope.get("rope_type") in ("dynamic", "longrope")
        for rope in rope_parameters(text_config(model.config))
    ):
        return
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = "frozen"  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "frozen")  # type: ignore[assignment]
