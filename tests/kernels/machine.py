"""A machine that runs PTX on a CPU, so that kernels in inline assembly are tested where there is no GPU.

It runs what `triton.compile` makes of a kernel, or a block of inline assembly alone: a warp at a time, all
its lanes together, in numpy. What hardware leaves open is decided against the program: asynchronous copies
arrive at the last moment, shared memory holds NaN at first, programs run in any order. Global memory is what
the tensors of a launch hold and nothing else: an address outside of them, or one that is not aligned, is an
error, and so is a branch that lanes of a warp take differently. What is run is counted.

Source: NVIDIA, Parallel Thread Execution ISA 8.7. Instructions that the kernels don't have are missing, and
those of a warpgroup (`wgmma`), which prefill over history has, and the store of many tokens by `qjl`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
WIDTHS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4

# --- programs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One line: `@guard operation operands`; operands are names, or tuples of names for vectors."""

    operation: str
    operands: tuple[Any, ...]
    guard: str = ""
    negated: bool = False


@dataclass
class Program:
    """Instructions, where each branch goes, and the shared variables with their sizes."""

    instructions: list[Instruction] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)


_STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w]+):|(?P<line>[^;]+);)")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+")


@lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """PTX of a kernel (its body is read), or a block of inline assembly."""
    text = re.sub(r"//.*|^\s*\.(?:loc|file).*|^\s*\.pragma.*", "", text, flags=re.M)
    if ".entry" in text:
        text = text[text.index("{", text.index(".entry")) :]
        depth, end = 0, 0
        while end == 0 or depth:
            brace = re.compile("[{}]").search(text, end)
            assert brace is not None
            depth, end = depth + (1 if brace[0] == "{" else -1), brace.end()
        text = text[1 : end - 1]
    program = Program()
    scopes, labels, branches, at = [0], {}, [], 0
    count = 0
    while match := _STATEMENT.match(text, at):
        at = match.end()
        if brace := match["brace"]:
            count += 1
            scopes = [*scopes, count] if brace == "{" else scopes[:-1]
        elif label := match["label"]:
            labels[scopes[-1], label] = len(program.instructions)
        else:
            line = match["line"].strip()
            if variable := re.match(r"\.shared .*?\.b8 (\w+)\[(\d+)\]", line):
                program.shared[variable[1]] = int(variable[2])
            if line.startswith("."):
                continue
            instruction = _parse_line(line)
            if instruction.operation.startswith("bra"):
                branches.append((len(program.instructions), instruction.operands[0], scopes))
            program.instructions.append(instruction)
    assert not text[at:].strip(), text[at : at + 100]
    for index, label, inside in branches:
        program.targets[index] = next(
            labels[scope, label] for scope in reversed(inside) if (scope, label) in labels
        )
    return program


def _parse_line(line: str) -> Instruction:
    guard = ""
    if line.startswith("@"):
        guard, line = line[1:].split(None, 1)
    operation, _, rest = line.partition(" ")
    operands = tuple(
        tuple(x.strip() for x in text[1:-1].split(",")) if text[0] == "{" else text.replace(" ", "")
        for text in _OPERAND.findall(rest)
    )
    return Instruction(operation.strip(), operands, guard.lstrip("!"), guard.startswith("!"))


# --- memory -------------------------------------------------------------------------------------------------


class Memory:
    """Arrays of bytes by address."""

    def __init__(self) -> None:
        self.arrays: list[tuple[int, np.ndarray]] = []

    def add(self, tensor: torch.Tensor) -> int:
        """Its elements become readable and writable; returns their address."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if all(start != known for known, _ in self.arrays):
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            array = whole.set_(storage, 0, (storage.nbytes(),), (1,)).numpy()
            self.arrays.append((start, array))
        return tensor.data_ptr()

    def locate(self, addresses: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each array that is met: itself, which of the addresses meet it, and their offsets [n, size]."""
        assert not (addresses % size).any(), f"an address is not a multiple of {size}"
        found = np.zeros(len(addresses), bool)
        for start, array in self.arrays:
            inside = (addresses >= start) & (addresses + size <= start + len(array))
            if inside.any():
                found |= inside
                yield array, inside, (addresses[inside] - start)[:, None] + np.arange(size)
        assert found.all(), f"no tensor has the address {addresses[~found][:1]}"

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """[n] -> bytes [n, size]"""
        result = np.empty((len(addresses), size), U8)
        for array, inside, places in self.locate(addresses, size):
            result[inside] = array[places]
        return result

    def store(self, addresses: np.ndarray, data: np.ndarray) -> None:
        for array, inside, places in self.locate(addresses, data.shape[1]):
            array[places] = data[inside]


# --- one warp -----------------------------------------------------------------------------------------------


class Warp:
    """Registers of the lanes of one warp, and what they are made to do.

    Registers are unsigned integers of their width, predicates bool; all have one number a lane.
    """

    def __init__(
        self,
        program: Program,
        names: dict[str, np.ndarray],
        memory: Memory,
        shared: np.ndarray,
        lanes: int = 32,
    ) -> None:
        self.program, self.names, self.memory, self.shared = program, names, memory, shared
        self.lanes = lanes
        self.counts: Counter[str] = Counter()
        """Instructions by name, and "conflicts": loads from shared memory that met a bank twice."""
        self.everyone = np.full(lanes, True)
        self.copies: list[list[tuple[np.ndarray, np.ndarray, int]]] = [[]]
        """Groups of asynchronous copies (to, from, bytes) on their way; the last one is not committed."""

    def run(self) -> Iterator[str]:
        """To the end; yields wherever other warps have to come."""
        at, instructions = 0, self.program.instructions
        while at < len(instructions):
            line = instructions[at]
            active = self.everyone
            if line.guard:
                active = self.names[line.guard] ^ line.negated
            name = line.operation
            if name.startswith("bra") or name in ("ret", "exit"):
                assert active.all() or not active.any(), f"lanes part at {line}"
                if active.all():
                    if name in ("ret", "exit"):
                        break
                    at = self.program.targets[at]
                    continue
            elif name.startswith(("bar.sync", "barrier.sync")):
                number, *threads = (int(self.value(x, "u32")[0]) for x in line.operands)
                yield number, threads[0] // 32 if threads else None
            elif active.any():
                self.counts[name] += 1
                self.execute(line, active)
            at += 1
        self.arrive(0)

    def execute(self, line: Instruction, active: np.ndarray) -> None:
        name = line.operation
        head = name.split(".")[0]
        if special := getattr(self, "_" + head, None):
            special(line, active)
            return
        assert head in _ARITHMETIC or head in ("setp", "cvt"), f"the machine does not know {name}"
        to, *sources = line.operands
        kind = _type(name)
        values = [self.value(x, _source_type(name, i, kind)) for i, x in enumerate(sources)]
        if head == "setp" and kind == "f16x2":  # a predicate for each half
            for i, half in enumerate(to.split("|")):
                halves = [x.view(np.float16)[i::2] for x in values]
                self.assign(half, compute(name, halves), active)
            return
        self.assign(to, compute(name, values), active)

    def value(self, name: Any, kind: str) -> np.ndarray:
        """The operand as numbers of a type such as s32 or f16x2 (pred: bool)."""
        if isinstance(name, tuple):  # halves, to make a whole of
            parts = [self.value(x, f"b{int(kind[1:]) // len(name)}") for x in name]
            return np.stack(parts, -1).view(WIDTHS[kind[1:]])[:, 0]
        if name in self.names:
            raw = self.names[name]
        elif name in self.program.shared or name == "global_smem":
            raw = np.full(self.lanes, self.shared_address(name), U32)
        elif name.startswith("%"):  # LLVM reads what was never set where it keeps nothing of it
            raw = np.full(self.lanes, -1 if kind != "pred" else 1).astype(bool if kind == "pred" else U64)
        else:
            negated, name = name.startswith("!"), name.lstrip("!")
            if negated:
                return ~self.names[name]
            raw = _immediate(name, kind, self.lanes)
        if kind == "pred":
            return raw
        bits = 32 if "x2" in kind else int(kind[1:])
        width = WIDTHS[str(bits)]
        if raw.dtype != width:
            raw = raw.astype(width)
        if kind[0] == "f" and bits == 32 and "x2" not in kind:
            return raw.view(np.float32)
        return raw.view(np.dtype(f"i{bits // 8}")) if kind[0] == "s" else raw

    def assign(self, to: Any, value: np.ndarray, active: np.ndarray) -> None:
        if isinstance(to, tuple):  # a whole, to be halved
            halves = np.ascontiguousarray(value).view(np.dtype(f"u{value.dtype.itemsize // len(to)}"))
            for i, name in enumerate(to):
                self.assign(name, halves.reshape(self.lanes, -1)[:, i].copy(), active)
            return
        if to == "_":
            return
        if to.startswith("%rd") and value.dtype.itemsize < 8:
            value = value.astype(np.int64)
        if value.dtype != bool and value.dtype.kind != "u":
            value = np.ascontiguousarray(value).view(np.dtype(f"u{value.dtype.itemsize}"))
        if not active.all():
            old = self.names.get(to, np.zeros(self.lanes, value.dtype))
            value = np.where(active, value, old.astype(value.dtype))
        self.names[to] = value

    # what reads or writes more than registers, or other lanes'

    def address(self, text: str) -> np.ndarray:
        base, _, offset = text.strip("[]").partition("+")
        number = int(offset or "0", 0)
        if base in self.names:
            return self.names[base].astype(np.int64) + number
        return np.full(self.lanes, self.shared_address(base) + number)

    def shared_address(self, name: str) -> int:
        start = 0
        for other, size in self.program.shared.items():
            if other == name:
                return start
            start += -(-size // 128) * 128
        assert name == "global_smem", name  # what triton allocates, after what is declared
        return start

    def _ld(self, line: Instruction, active: np.ndarray) -> None:
        to, source = line.operands
        names = to if isinstance(to, tuple) else (to,)
        width = WIDTHS[_type(line.operation)[1:]]
        if ".param" in line.operation:
            self.assign(to, self.value(source.strip("[]"), _type(line.operation)), active)
            return
        size = np.dtype(width).itemsize
        addresses = self.address(source)[active]
        if ".shared" in line.operation:
            places = addresses[:, None] + np.arange(size * len(names))
            assert not (addresses % (size * len(names))).any() and places.max() < len(self.shared), line
            self.counts["conflicts"] += _meets_a_bank_twice(addresses, size * len(names))
            data = self.shared[places]
        else:
            data = self.memory.load(addresses, size * len(names))
        for i, name in enumerate(names):
            column = np.zeros(self.lanes, width)
            column[active] = np.ascontiguousarray(data[:, size * i : size * (i + 1)]).view(width)[:, 0]
            self.assign(name, column, active)

    def _st(self, line: Instruction, active: np.ndarray) -> None:
        target, source = line.operands
        names = source if isinstance(source, tuple) else (source,)
        kind = _type(line.operation)
        columns = [self.value(name, "b" + kind[1:])[active] for name in names]
        data = np.ascontiguousarray(np.stack(columns, -1)).view(U8)
        addresses = self.address(target)[active]
        if ".shared" in line.operation:
            assert not (addresses % data.shape[1]).any() and addresses.max() < len(self.shared), line
            self.shared[addresses[:, None] + np.arange(data.shape[1])] = data
        else:
            self.memory.store(addresses, data)

    def _cp(self, line: Instruction, active: np.ndarray) -> None:
        if "commit_group" in line.operation:
            self.copies.append([])
        elif "wait_group" in line.operation:
            self.arrive(int(line.operands[0]))
        else:
            to, source, size = line.operands
            self.copies[-1].append((self.address(to)[active], self.address(source)[active], int(size)))

    def arrive(self, left: int) -> None:
        """All groups of copies but the last `left` are there."""
        while len(self.copies) - 1 > left:
            for to, source, size in self.copies.pop(0):
                assert not (to % size).any()
                self.shared[to[:, None] + np.arange(size)] = self.memory.load(source, size)

    def _atom(self, line: Instruction, active: np.ndarray) -> None:
        assert line.operation == "atom.global.inc.u32", line
        to, at, most = line.operands
        limits, result = self.value(most, "u32"), np.zeros(self.lanes, U32)
        for lane in np.flatnonzero(active):
            address = self.address(at)[lane : lane + 1]
            old = self.memory.load(address, 4).view(U32)[0, 0]
            new = 0 if old >= limits[lane] else old + 1
            self.memory.store(address, np.array([[new]], U32).view(U8))
            result[lane] = old
        self.assign(to, result, active)

    def _shfl(self, line: Instruction, active: np.ndarray) -> None:
        to, x, by, clamp, *_ = line.operands
        to = to.split("|")[0]
        assert active.all() and clamp in ("0x1f", "31"), line
        number = self.value(by, "u32").astype(np.int64)
        lane = {"bfly": LANES ^ number, "idx": number & 31}[line.operation.split(".")[2]]
        self.assign(to, self.value(x, "b32")[lane], active)

    def _vote(self, line: Instruction, active: np.ndarray) -> None:
        to, x, _ = line.operands
        assert line.operation == "vote.sync.any.pred" and active.all(), line
        self.assign(to, np.full(self.lanes, self.value(x, "pred").any()), active)

    def _movmatrix(self, line: Instruction, active: np.ndarray) -> None:
        to, x = line.operands
        matrix = self.value(x, "b32").view(U16).reshape(8, 8).T
        self.assign(to, np.ascontiguousarray(matrix).view(U32).reshape(32), active)

    def _ldmatrix(self, line: Instruction, active: np.ndarray) -> None:
        to, source = line.operands
        addresses = self.address(source)
        assert active.all() and not (addresses % 16).any()
        for i, name in enumerate(to):
            rows = self.shared[addresses[8 * i : 8 * i + 8, None] + np.arange(16)].view(U16)
            matrix = rows.T if ".trans" in line.operation else rows
            self.assign(name, np.ascontiguousarray(matrix).view(U32).reshape(32), active)

    def _stmatrix(self, line: Instruction, active: np.ndarray) -> None:
        target, source = line.operands
        addresses = self.address(target)
        assert active.all() and not (addresses % 16).any()
        for i, name in enumerate(source):
            matrix = self.value(name, "b32").view(U16).reshape(8, 8)
            rows = np.ascontiguousarray(matrix.T if ".trans" in line.operation else matrix).view(U8)
            self.shared[addresses[8 * i : 8 * i + 8, None] + np.arange(16)] = rows

    def _mma(self, line: Instruction, active: np.ndarray) -> None:
        """Fragments as in the ISA's figures: a lane brings rows g and g + 8 of A, column g of B."""
        assert active.all()
        to, a, b, c = line.operands
        kinds = line.operation.split(".")[-4:]
        a_rows, a_kind, b_kind = [self.value(x, "b32") for x in a], kinds[1], kinds[2]
        b_rows = [self.value(x, "b32") for x in b]
        each = 4 if a_kind[1:] == "8" else 2
        depth = 8 * each
        left, right = np.zeros((16, depth)), np.zeros((depth, 8))
        for i, words in enumerate(a_rows):
            numbers = _numbers(words, a_kind).reshape(32, each)
            for j in range(each):
                left[G + 8 * (i % 2), each * T + j + depth // 2 * (i // 2)] = numbers[:, j]
        for i, words in enumerate(b_rows):
            numbers = _numbers(words, b_kind).reshape(32, each)
            for j in range(each):
                right[each * T + j + depth // 2 * i, G] = numbers[:, j]
        with np.errstate(invalid="ignore"):
            product = left @ right
        for i, (name, old) in enumerate(zip(to, c, strict=True)):
            part = product[G + 8 * (i // 2), 2 * T + i % 2]
            if kinds[0] == "f32":
                self.assign(name, (self.value(old, "f32") + part).astype(np.float32), active)
            else:
                self.assign(name, (self.value(old, "s32") + part.astype(np.int64)).astype(np.int32), active)

    def _nothing(self, line: Instruction, active: np.ndarray) -> None:
        """Lanes run together, and programs one after the other."""

    _bar = _fence = _griddepcontrol = _membar = _nothing


def _meets_a_bank_twice(addresses: np.ndarray, size: int) -> bool:
    """32 banks hold words of 4 bytes in turn; as many lanes are served together as ask for 128 bytes."""
    together = min(32, 128 // size)
    for start in range(0, len(addresses), together):
        words = {w for a in addresses[start : start + together] for w in range(a // 4, (a + size + 3) // 4)}
        if len({word % 32 for word in words}) < len(words):
            return True
    return False


def _numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """Elements of registers [32] as float64, lowest first."""
    if kind == "bf16":
        return (words.view(U16).astype(U32) << U32(16)).view(np.float32).astype(np.float64)
    return words.view({"f16": np.float16, "s8": np.int8, "u8": np.uint8}[kind]).astype(np.float64)


# --- arithmetic ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _type(operation: str) -> str:
    """What it works on: the last part of its name that is a type."""
    parts = [
        x for x in operation.split(".") if re.fullmatch(r"[bsuf](8|16|32|64)(x2)?|pred|bf16(x2)?|e4m3x2", x)
    ]
    return parts[-1] if parts else "b32"


@lru_cache(maxsize=1024)
def _source_type(operation: str, index: int, kind: str) -> str:
    """The type of source operand `index`."""
    head, *_ = operation.split(".")
    if head == "cvt":
        return {"bf16": "b16", "f16": "b16", "e4m3x2": "b16"}.get(kind, kind)
    if (head == "selp" and index == 2) or (head == "setp" and index == 2):
        return "pred"
    if (head in ("shl", "shr", "bfe") and index > 0) or head in ("prmt", "lop3", "popc"):
        return "u32"
    if ".wide" in operation and index == 2:
        return kind[0] + "64"
    return kind


def _immediate(text: str, kind: str, lanes: int) -> np.ndarray:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.full(lanes, int(text[2:], 16), U32)
    if kind == "pred":
        return np.full(lanes, bool(int(text, 0)))
    bits = 32 if "x2" in kind or not kind[1:].isdigit() else int(kind[1:])
    return np.full(lanes, int(text.rstrip("U"), 0) & (1 << bits) - 1, WIDTHS[str(bits)])


def compute(operation: str, x: Sequence[np.ndarray]) -> np.ndarray:
    """What an instruction makes of its sources."""
    head, *modifiers = operation.split(".")
    with np.errstate(all="ignore"):
        if head == "setp":
            return _compare(modifiers, x)
        if head == "cvt":
            return _convert(modifiers, x)
        if operation.endswith(".f16x2"):
            return _halves(head, x)
        result = _ARITHMETIC[head](modifiers, *x)
        if ".sat" in operation:
            result = np.clip(result, 0.0, 1.0).astype(np.float32)
        return result


def _compare(modifiers: list[str], x: Sequence[np.ndarray]) -> np.ndarray:
    compare = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "equ": np.equal, "neu": lambda a, b: ~(a == b), "gtu": lambda a, b: ~(a <= b),
        "ltu": lambda a, b: ~(a >= b), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
        "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    }[modifiers[0]]  # fmt: skip
    result = compare(x[0], x[1])
    if modifiers[0] == "ne" and x[0].dtype == np.float32:
        result &= ~(np.isnan(x[0]) | np.isnan(x[1]))
    if len(x) == 3:
        result = {"and": np.logical_and, "or": np.logical_or}[modifiers[1]](result, x[2])
    return result


def _convert(modifiers: list[str], x: Sequence[np.ndarray]) -> np.ndarray:
    to, source = [m for m in modifiers if re.fullmatch(r"[bsuf]\d+(x2)?|bf16(x2)?|e4m3x2", m)]
    if source == "e4m3x2":
        codes = torch.from_numpy(np.ascontiguousarray(x[0].astype(U16)).view(U8)).view(torch.float8_e4m3fn)
        return codes.half().numpy().view(U32)
    numbers = x[0]
    if source == "f16":
        numbers = numbers.view(np.float16)
    elif source == "bf16":
        numbers = (numbers.astype(U32) << U32(16)).view(np.float32)
    if to == "e4m3x2":
        high, low = (torch.from_numpy(np.clip(y, -448, 448)).to(torch.float8_e4m3fn) for y in x)
        return torch.stack((low, high), -1).view(torch.uint8).numpy().view(U16)[:, 0]
    if to in ("f16x2", "bf16x2"):
        high, low = (_rounded(y, to[:-2]) for y in x)
        return high.astype(U32) << U32(16) | low
    if to in ("f16", "bf16"):
        return _rounded(numbers.astype(np.float32), to)
    if to == "f32":
        return numbers.astype(np.float32)
    if source.startswith("f"):
        rounded = np.rint(numbers) if "rni" in modifiers else np.trunc(numbers)
        kind = np.dtype(("i" if to[0] == "s" else "u") + str(int(to[1:]) // 8))
        limits = np.iinfo(kind)
        return np.clip(np.nan_to_num(rounded.astype(np.float64)), limits.min, limits.max).astype(kind)
    return numbers.astype(np.dtype(("i" if to[0] == "s" else "u") + str(int(to[1:]) // 8)))


def _rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """Nearest fp16 or bf16 numbers, ties to even, as 16 bits."""
    numbers = torch.from_numpy(np.ascontiguousarray(x)).to(torch.float16 if kind == "f16" else torch.bfloat16)
    return numbers.view(torch.int16).numpy().view(U16)


def _halves(head: str, x: Sequence[np.ndarray]) -> np.ndarray:
    """Arithmetic on pairs of fp16 numbers, rounded once."""
    a, *rest = (np.ascontiguousarray(y).view(np.float16).astype(np.float64) for y in x)
    result = {
        "fma": lambda: a * rest[0] + rest[-1], "mul": lambda: a * rest[0], "add": lambda: a + rest[0],
        "sub": lambda: a - rest[0],
    }[head]()  # fmt: skip
    return result.astype(np.float16).view(U32)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    data = np.stack((a, b), -1).view(U8).reshape(len(a), 8)
    result = np.empty((len(a), 4), U8)
    for i in range(4):
        nibble = (selector >> U32(4 * i) & U32(15)).astype(np.int64)
        byte = np.take_along_axis(data, (nibble & 7)[:, None], 1)[:, 0]
        result[:, i] = np.where(nibble & 8, np.where(byte & 128, U8(255), U8(0)), byte)
    return result.view(U32)[:, 0]


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for row in range(8):
        if int(table[0]) >> row & 1:
            terms = [y if row >> 2 - i & 1 else ~y for i, y in enumerate((a, b, c))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def _multiply(modifiers: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if "wide" in modifiers:
        return a.astype(np.dtype(f"{a.dtype.kind}8")) * b.astype(np.dtype(f"{b.dtype.kind}8"))
    if "hi" in modifiers:
        wide = a.astype(np.dtype(f"{a.dtype.kind}8")) * b.astype(np.dtype(f"{b.dtype.kind}8"))
        return (wide >> 32).astype(a.dtype)
    return a * b


def _largest(modifiers: list[str], *x: np.ndarray) -> np.ndarray:
    pick: Callable[..., np.ndarray] = np.maximum if "NaN" in modifiers or x[0].dtype.kind != "f" else np.fmax
    return pick(*x)


def _smallest(modifiers: list[str], *x: np.ndarray) -> np.ndarray:
    pick: Callable[..., np.ndarray] = np.minimum if "NaN" in modifiers or x[0].dtype.kind != "f" else np.fmin
    return pick(*x)


def _divide(modifiers: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return (quotient * np.sign(a).astype(np.int64) * np.sign(b).astype(np.int64)).astype(a.dtype)


def _shift_right(modifiers: list[str], a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(by < bits, moved, a.dtype.type(0))


def _shift_left(modifiers: list[str], a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def _extract(modifiers: list[str], a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    moved = a.astype(np.int64) >> start.astype(np.int64)
    kept = moved & (1 << length.astype(np.int64)) - 1
    if a.dtype.kind == "i":
        sign = 1 << length.astype(np.int64) - 1
        kept = (kept ^ sign) - sign
    return kept.astype(a.dtype)


def _fused(modifiers: list[str], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _power(modifiers: list[str], a: np.ndarray) -> np.ndarray:
    return np.exp2(a.astype(np.float64)).astype(np.float32)


def _dot(modifiers: list[str], a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    products = a.view(np.int8).reshape(-1, 4).astype(np.int32) * b.view(np.int8).reshape(-1, 4)
    return c + products.sum(1, dtype=np.int32)


_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda m, a: a,
    "not": lambda m, a: ~a,
    "neg": lambda m, a: -a,
    "abs": lambda m, a: np.abs(a),
    "add": lambda m, a, b: a + b,
    "sub": lambda m, a, b: a - b,
    "mul": _multiply,
    "mad": lambda m, a, b, c: _multiply(m, a, b) + c,
    "fma": _fused,
    "div": _divide,
    "rem": lambda m, a, b: a - _divide(m, a, b) * b,
    "rcp": lambda m, a: (1.0 / a.astype(np.float64)).astype(np.float32),
    "sqrt": lambda m, a: np.sqrt(a),
    "rsqrt": lambda m, a: (1.0 / np.sqrt(a.astype(np.float64))).astype(np.float32),
    "ex2": _power,
    "lg2": lambda m, a: np.log2(a),
    "tanh": lambda m, a: np.tanh(a),
    "copysign": lambda m, a, b: np.copysign(b, a),
    "min": _smallest,
    "max": _largest,
    "and": lambda m, a, b: a & b,
    "or": lambda m, a, b: a | b,
    "xor": lambda m, a, b: a ^ b,
    "shl": _shift_left,
    "shr": _shift_right,
    "bfe": _extract,
    "popc": lambda m, a: np.array([int(y).bit_count() for y in a], U32),
    "prmt": lambda m, a, b, c: _permute(a, b, c),
    "lop3": lambda m, a, b, c, table: _lop3(a, b, c, table),
    "selp": lambda m, a, b, c: np.where(c, a, b),
    "dp4a": _dot,
}


# --- launching ----------------------------------------------------------------------------------------------


def run_block(assembly: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """A block of inline assembly: inputs of any one shape -> outputs of that shape, as unsigned integers."""
    shape = inputs[0].shape
    outputs = 1 + max(int(n) for n in re.findall(r"\$(\d+)", assembly)) - len(inputs)
    names = {f"${outputs + i}": np.ascontiguousarray(x).ravel() for i, x in enumerate(inputs)}
    warp = Warp(parse(assembly), names, Memory(), np.zeros(0, U8), inputs[0].size)
    for _ in warp.run():
        raise AssertionError("there are no other warps to wait for")
    return [warp.names[f"${i}"].reshape(shape) for i in range(outputs)]


def run_kernel(
    ptx: str, grid: tuple[int, ...], arguments: Sequence[Any], warps: int, shared_bytes: int, seed: int = 0
) -> Counter[str]:
    """Launch a kernel: arguments are tensors, ints and floats, in the order of the PTX's parameters.

    Programs run in a random order, and so do, from barrier to barrier, their warps; they have `shared_bytes`
    beside what they declare.
    Returns the sum of all warps' `counts`.
    """
    program, memory = parse(ptx), Memory()
    values: dict[str, np.ndarray] = {}
    for index, (kind, name) in enumerate(re.findall(r"\.param \.(\w+) .*?(\w+_param_\d+)", ptx)):
        argument = arguments[index] if index < len(arguments) else 0
        if isinstance(argument, torch.Tensor):
            argument = memory.add(argument)
        bits = int(np.float32(argument).view(U32)) if kind == "f32" else argument & (1 << int(kind[1:])) - 1
        values[name] = np.full(32, bits, WIDTHS[kind[1:]])
    size = shared_bytes + sum(-(-n // 128) * 128 for n in program.shared.values())
    x, y, z = (*grid, 1, 1)[:3]
    counts: Counter[str] = Counter()
    generator = np.random.default_rng(seed)
    for index in generator.permutation(x * y * z).tolist():
        place, shared = (index % x, index // x % y, index // x // y), np.full(size, 0xFF, U8)
        members = [Warp(program, values | _special(i, warps, place), memory, shared) for i in range(warps)]
        runs = [warp.run() for warp in members]
        ready, waiting = list(range(warps)), {}
        while ready:
            at = {i: next(runs[i], None) for i in generator.permutation(ready).tolist()}
            waiting |= {i: barrier for i, barrier in at.items() if barrier}
            arrived = Counter(waiting.values())
            full = [x for x in arrived if arrived[x] == (x[1] or warps)]
            ready = [i for i, barrier in waiting.items() if barrier in full]
            waiting = {i: barrier for i, barrier in waiting.items() if barrier not in full}
        assert not waiting, f"warps wait for others, each at a barrier and for so many: {waiting}"
        for warp in members:
            counts += warp.counts
    return counts


def _special(warp: int, warps: int, place: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Registers that tell lanes apart."""
    same = {f"%ctaid.{axis}": n for axis, n in zip("xyz", place, strict=True)} | {"%ntid.x": 32 * warps}
    return {name: np.full(32, n, U32) for name, n in same.items()} | {
        "%tid.x": (LANES + 32 * warp).astype(U32),
        "%laneid": LANES.astype(U32),
        "%lanemask_eq": (1 << LANES).astype(U32),
    }
