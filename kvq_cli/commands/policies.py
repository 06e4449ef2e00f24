"""`kvq policies`: what each policy costs in bytes, and what fits in a given memory."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvq_cli import console
from kvq_cli.options import (
    DEFAULTS,
    MODEL_PANEL,
    Json,
    KvMemory,
    Layers,
    MaxNumSeqs,
    PageSize,
    Recent,
    Sink,
    complete_model,
    complete_policy,
    format_size,
)
from kvq_core.errors import KvqError, UsageError
from kvq_core.policies import CODEC_NAMES, REGISTRY, Policy, get_policy

if TYPE_CHECKING:
    from kvq_core.models import ModelGeometry

DEFAULT_MEMORY = 8 << 30
FULL_BYTES = 2
"""Bytes of an unquantized element, which every ratio is quoted against."""


def policies(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="POLICY",
            help="Policies to show, as `42` or `int8:lm4`; without any, all that have a name.",
            autocompletion=complete_policy,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m",
            help="Sizes for this model, from its config alone: a hub id, a folder, `demo` or a preset, as "
            "`qwen3-30b-a3b`.",
            autocompletion=complete_model,
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    head_dim: Annotated[
        int, typer.Option(min=1, metavar="N", help="Head dim, without --model.", rich_help_panel=MODEL_PANEL)
    ] = 128,
    kv_memory: KvMemory = None,
    sink: Sink = None,
    recent: Recent = None,
    layers: Layers = None,
    page_size: PageSize = DEFAULTS.page_size,
    max_num_seqs: MaxNumSeqs = DEFAULTS.max_num_seqs,
    json: Json = False,
) -> None:  # fmt: skip
    """List the policies, with their bytes per token, bits per element and, for a model, how many tokens fit.

    kvq policies --model qwen3-30b-a3b --kv-memory 16GiB
    kvq policies 42 int8:lm4 --sink 4 --recent 128
    """
    DEFAULTS.replace(page_size=page_size)  # refuses what the engine would
    chosen = [get_policy(name) for name in names] if names else list(REGISTRY)
    chosen = [
        (policy.with_layers(layers or ()) if policy.is_quantized else policy).with_window(sink, recent)
        for policy in chosen
    ]
    if model is None and any(policy.layers for policy in chosen):
        raise UsageError(
            "what some layers cost depends on how many there are", "name the model: `--model qwen3-8b`"
        )
    if model is None:
        document: dict[str, Any] = {"head_dim": head_dim}
        rows = [_row(policy, head_dim, head_dim) for policy in chosen]
    else:
        from kvq_core.models import check_support, load_config, model_geometry

        model_config = load_config(model)
        check_support(model_config)
        geometry = model_geometry(model_config)
        memory = kv_memory or DEFAULT_MEMORY
        document = {"model": model, "kv_memory": memory, "max_num_seqs": max_num_seqs} | _facts(geometry)
        first = geometry.layers[0]
        rows = [
            _row(policy, first.key_dim, first.value_dim)
            | _capacity(geometry, policy, memory, page_size, max_num_seqs, asked_for=bool(names))
            for policy in chosen
        ]
    document["policies"] = rows
    if model is None and not names:
        document["codecs"] = [_codec(name, head_dim) for name in CODEC_NAMES]
    if json:
        console.emit_json(document)
    else:
        _show(document)


def _row(policy: Policy, key_dim: int, value_dim: int) -> dict[str, Any]:
    """One policy, per token and kv head; `problem` instead of sizes where a codec can't take the head dim."""
    from kvq_core.codecs import get_codec

    row: dict[str, Any] = {
        "policy": policy.label, "number": policy.number, "key": policy.key, "value": policy.value,
        "sink": policy.sink, "recent": policy.recent, "summary": policy.summary,
    }  # fmt: skip
    key, value = get_codec(policy.key), get_codec(policy.value)
    try:
        key.check_head_dim(key_dim)
        value.check_head_dim(value_dim)
    except KvqError as error:
        return row | {"problem": error.message}
    full = FULL_BYTES * (key_dim + value_dim)
    size = key.bytes_per_vector(key_dim) + value.bytes_per_vector(value_dim)
    row |= {
        "bytes_per_token_and_head": size,
        "bits_per_element": round(8 * size / (key_dim + value_dim), 4),
        "ratio": round(full / size, 4),
    }
    window = policy.sink + policy.recent
    if window:
        # Every token has its record, and the window's are kept beside it: L·size + window·full < L·full.
        row["saves_from_tokens"] = math.floor(window * full / (full - size)) + 1
    return row


def _capacity(
    geometry: "ModelGeometry",
    policy: Policy,
    memory: int,
    page_size: int,
    max_num_seqs: int,
    *,
    asked_for: bool,
) -> dict[str, Any]:
    """What of a model's cache fits into `memory` bytes; nothing where the policy can't take the model.

    Raises `KvqError` where not one request fits, unless only the windows of a policy that nobody asked for
    are too large.
    """
    import torch

    from kvq_core.cache.plan import check_head_dims, plan_cache

    try:
        check_head_dims(geometry, policy)
    except KvqError as error:
        return {"problem": error.message}
    try:
        plan = plan_cache(
            geometry,
            policy,
            memory,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            prefill_chunk=DEFAULTS.chunk(geometry.is_windowed),
            max_model_len=geometry.max_model_len,
            dtype=torch.bfloat16,
        )
    except KvqError as error:
        if asked_for or not (policy.sink or policy.recent):
            raise
        return {"problem": error.message}
    return {
        "bytes_per_token": plan.bytes_per_token,
        "window_bytes_per_request": plan.raw_bytes_per_request,
        "capacity_tokens": plan.capacity_tokens,
        "effective_bits_per_element": round(plan.bits_per_element, 4),
    }


def _facts(geometry: "ModelGeometry") -> dict[str, Any]:
    return {
        "num_layers": len(geometry.layers),
        "kv_heads": sorted({layer.num_kv_heads for layer in geometry.layers}),
        "head_dims": sorted({dim for layer in geometry.layers for dim in (layer.key_dim, layer.value_dim)}),
        "windowed_layers": sum(bool(layer.window) for layer in geometry.layers),
        "max_model_len": geometry.max_model_len,
    }


def _codec(name: str, head_dim: int) -> dict[str, Any]:
    from kvq_core.codecs import get_codec

    codec = get_codec(name)
    row: dict[str, Any] = {"codec": name, "rotated": codec.rotated}
    try:
        codec.check_head_dim(head_dim)
    except KvqError as error:
        return row | {"problem": error.message}
    size = codec.bytes_per_vector(head_dim)
    return row | {"bytes_per_vector": size, "bits_per_element": round(8 * size / head_dim, 4)}


def _show(document: dict[str, Any]) -> None:
    rows = document["policies"]
    windows = any(row["sink"] or row["recent"] for row in rows)
    of_model = "model" in document
    columns = ["policy", "number", "K", "V", "bytes", "bits", "ratio"]
    columns += ["saves from"] if windows else []
    columns += ["bytes/token", "capacity", "effective bits"] if of_model else ["what it is"]
    table = []
    for row in rows:
        cells = [row["policy"], _cell(row["number"]), row["key"], row["value"]]
        cells += [_cell(row.get(name)) for name in ("bytes_per_token_and_head", "bits_per_element", "ratio")]
        cells += [_cell(row.get("saves_from_tokens"))] if windows else []
        if of_model:
            names = ("bytes_per_token", "capacity_tokens", "effective_bits_per_element")
            cells += [_cell(row.get(name)) for name in names]
        else:
            cells.append(row["summary"])
        table.append(cells)
    notes = ["bytes, bits: one token of one kv head, K and V with metadata; ratio: against 2 bytes a number"]
    if windows:
        notes.append("saves from: a request shorter than this many tokens takes more memory than unquantized")
    if of_model:
        heads = "/".join(map(str, document["kv_heads"]))
        dims = "/".join(map(str, document["head_dims"]))
        title = f"{document['model']}: {document['num_layers']} layers, {heads} kv heads, head dim {dims}"
        notes.append(
            f"capacity: tokens that fit into {format_size(document['kv_memory'])} (--kv-memory)"
            + (f", windows of {document['max_num_seqs']} running requests taken off" if windows else "")
        )
    else:
        title = f"Policies, head dim {document['head_dim']}"
    notes += sorted({f"{row['policy']}: {row['problem']}" for row in rows if "problem" in row})
    console.emit_table(title, columns, table, () if "codecs" in document else tuple(notes))
    if "codecs" in document:
        codecs = [
            [row["codec"], _cell(row.get("bytes_per_vector")), _cell(row.get("bits_per_element")),
             "yes" if row["rotated"] else "no"]
            for row in document["codecs"]
        ]  # fmt: skip
        notes.append("any two codecs make a policy: --policy K:V, as int8:lm4")
        notes.append(
            "rotated codecs need a head dim with a Hadamard matrix: 64, 80, 96, 112, 128, 160, 192, 256, …"
        )
        console.emit_table("Codecs", ["codec", "bytes", "bits", "rotated"], codecs, tuple(notes))


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
