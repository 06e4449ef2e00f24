"""Which part of every weight a rank keeps, by the plan that transformers has for the model (`tp_plan`).

Column-wise layers keep some of their outputs, row-wise ones the inputs that belong to them, and the ranks'
partial sums are added (Megatron-LM, Shoeybi et al., 2019, section 3). Experts are split in their intermediate
dim like any MLP, all of them on every rank: the routing stays whole, and so does the load. Embeddings and the
output layer are replicated: reading the latter twice takes no longer than gathering the logits would, and
only the leader samples.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvq_core.errors import KvqError, UsageError
from kvq_core.models.geometry import ModelGeometry, text_config
from kvq_core.parallel.group import Group, all_reduce_, check_heads

COLUMNS, ROWS, PACKED, EXPERTS = "colwise", "rowwise", "packed_colwise", "moe_tp_experts"
SPLIT = (COLUMNS, ROWS, PACKED)
WHOLE = (
    "replicated_with_grad_allreduce",
    "replicate",
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    "embedding_rowwise",
    "embedding_colwise",
)
"""Styles of what every rank keeps whole: pairs of the latter would gather between them what they split."""
KEYS_AND_VALUES = ("k_proj", "v_proj")

Cut = Callable[[Tensor], Tensor]


@dataclass
class Shards:
    """What one rank keeps: `cut` a parameter, then `install` the sums."""

    cuts: dict[str, Cut] = field(default_factory=dict)
    """Full name of a parameter -> a copy of its part."""
    sums: list[str] = field(default_factory=list)
    """Modules whose outputs are partial sums."""

    def cut(self, name: str, parameter: Tensor) -> Tensor:
        """This rank's part of a parameter; the parameter itself where it is kept whole."""
        return self.cuts[name](parameter) if name in self.cuts else parameter

    def cut_parameters(self, model: nn.Module) -> None:
        """Replace the parameters of a whole model, one by one, by copies of the parts."""
        for name in self.cuts:
            module, leaf = _owner(model, name)
            part = self.cut(name, getattr(module, leaf).detach())
            setattr(module, leaf, nn.Parameter(part, requires_grad=False))

    def install(self, model: nn.Module) -> None:
        """Have partial sums added, and linear layers know their new sizes."""
        for name in self.sums:
            model.get_submodule(name).register_forward_hook(_sum)
        for name in {name.rpartition(".")[0] for name in self.cuts}:
            module = model.get_submodule(name)
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape


def _sum(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    output = output.contiguous()
    all_reduce_(output)
    return output


def find_shards(model: nn.Module, geometry: ModelGeometry, group: Group) -> Shards:
    """The shards of `group.rank`, for a model whose parameters are whole, or on `meta`.

    Raises `UsageError` where heads or sizes don't divide, `KvqError` where the model has no plan for it.
    """
    shards = Shards()
    if group.size == 1:
        return shards
    config: Any = model.config
    name = f"model type {text_config(config).model_type!r}"
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    for layer in geometry.layers:
        check_heads(name, geometry.num_q_heads, layer.num_kv_heads, group.size)
    for module_name, module in model.named_modules():
        style = _style(plan, module_name)
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{leaf}"
            own = _style(plan, full) or (style if style != EXPERTS else None)
            if own is None or own in WHOLE:
                continue
            if own not in SPLIT:
                raise _refusal(name, f"its `tp_plan` in transformers asks for {own!r} of {full}")
            heads = _kv_heads(model, module_name, geometry)
            shards.cuts[full] = _cut(full, parameter.shape, leaf, own, heads, group)
        if style == EXPERTS or (style == ROWS and isinstance(module, nn.Linear)):
            shards.sums.append(module_name)
    split = {_layer_of(model, name) for name in shards.sums if _layer_of(model, name) is not None}
    if len(split) < geometry.num_layers:
        why = "has none for this model" if not plan else "keeps its attention whole"
        raise _refusal(name, f"its attention can't be split over ranks: the `tp_plan` of transformers {why}")
    return shards


def check_seen(model: nn.Module, planned: ModelGeometry, seen: ModelGeometry, group: Group) -> None:
    """Refuse a model whose layers have other heads than their share of what the config states."""
    if group.size == 1:
        return
    wanted = [max(1, layer.num_kv_heads // group.size) for layer in planned.layers]
    if (
        seen.num_q_heads * group.size != planned.num_q_heads
        or [s.num_kv_heads for s in seen.layers] != wanted
    ):
        raise _refusal(
            f"model type {model.config.model_type!r}",  # type: ignore[union-attr]
            "its attention can't be split over ranks: it has other heads than its config states",
        )


def _refusal(name: str, why: str) -> KvqError:
    return KvqError(f"{name} does not run with --tp: {why}", "run it on one GPU, with --tp 1")


def _style(plan: dict[str, str], name: str) -> str | None:
    """The rule for a module or parameter; `*` in a rule stands for a number."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _layer_of(model: nn.Module, name: str) -> int | None:
    """The layer whose attention the module `name` is part of."""
    owner = model.get_submodule(name.rpartition(".")[0])
    index = getattr(owner, "layer_idx", None)
    return index if isinstance(index, int) else None


def _kv_heads(model: nn.Module, name: str, geometry: ModelGeometry) -> int | None:
    """How many heads the outputs of the module `name` are, if they are keys or values."""
    layer = _layer_of(model, name) if name.rpartition(".")[2] in KEYS_AND_VALUES else None
    return None if layer is None else geometry.layers[layer].num_kv_heads


def _cut(name: str, shape: torch.Size, leaf: str, style: str, kv_heads: int | None, group: Group) -> Cut:
    """How a parameter of this shape is cut."""
    rank, size = group.rank, group.size
    if style == ROWS and leaf == "bias":
        return lambda x: x if rank == 0 else torch.zeros_like(x)  # it is added once
    dim = len(shape) - 1 if style == ROWS else max(0, len(shape) - 2)
    length = shape[dim]
    if kv_heads is not None and kv_heads < size:  # several ranks have the same head
        of_head, head = length // kv_heads, rank * kv_heads // size
        return lambda x: x.narrow(dim, head * of_head, of_head).clone()
    parts = 2 if style == PACKED else 1
    if length % (parts * size):
        raise UsageError(
            f"--tp {size} does not divide {name}, which is {length // parts} wide", "choose a --tp that does"
        )
    own = length // parts // size
    return lambda x: torch.cat([part.narrow(dim, rank * own, own) for part in x.chunk(parts, dim)], dim)
