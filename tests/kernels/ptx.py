"""The few PTX instructions that inline assembly uses, in numpy: it runs on a CPU."""

import ctypes
import re

import numpy as np
import torch

_TRUTH = (0xF0, 0xCC, 0xAA)


def run(assembly: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """Inputs are uint32 arrays of one shape; outputs too, as many as come before the inputs' numbers."""
    numbers = {int(n) for n in re.findall(r"\$(\d+)", assembly)}
    outputs = max(numbers) + 1 - len(inputs)
    registers = {f"${outputs + i}": x.astype(np.uint32) for i, x in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        return np.full(inputs[0].shape, int(name, 0), np.uint32)

    for line in assembly.strip("{}\n").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if operands.startswith("{"):
            halves, source = operands[1:].split("},")
            for i, to in enumerate(halves.split(",")):
                registers[to.strip()] = value(source.strip()) >> np.uint32(16 * i) & np.uint32(0xFFFF)
        elif operation and operation != ".reg":
            to, *sources = (operand.strip() for operand in operands.split(","))
            registers[to] = _execute(operation, *(value(source) for source in sources))
    return [registers[f"${i}"] for i in range(outputs)]


def _execute(operation: str, *x: np.ndarray) -> np.ndarray:
    name = operation.split(".")[0]
    if operation.endswith("f16x2"):
        a, *rest = (half.view(np.float16).astype(np.float64) for half in map(np.ascontiguousarray, x))
        scaled = a * rest[0] if name in ("fma", "mul") else a
        result = scaled + rest[-1] if name in ("fma", "add") else scaled
        return result.astype(np.float16).view(np.uint32)
    if name == "cvt":
        assert operation == "cvt.rn.f16x2.e4m3x2"
        codes = torch.from_numpy(x[0].astype(np.uint16).view(np.uint8)).view(torch.float8_e4m3fn)
        return codes.half().numpy().view(np.uint32)
    if name == "prmt":
        both = x[0].astype(np.uint64) | x[1].astype(np.uint64) << np.uint64(32)
        result = np.zeros_like(x[0])
        for i in range(4):
            nibble = x[2] >> np.uint32(4 * i) & np.uint32(15)
            assert (nibble < 8).all(), "the high bit asks for a byte's sign"
            byte = both >> (nibble * np.uint32(8)).astype(np.uint64) & np.uint64(255)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result
    if name == "lop3":
        result = np.zeros_like(x[0])
        for row in range(8):
            if int(x[3].flat[0]) >> row & 1:
                terms = [y if row >> 2 - i & 1 else ~y for i, y in enumerate(x[:3])]
                result |= terms[0] & terms[1] & terms[2]
        return result
    return {
        "mov": lambda a: a,
        "and": np.bitwise_and,
        "sub": np.subtract,
        "shl": np.left_shift,
        "shr": np.right_shift,
    }[name](*x)


def run_warp(assembly: str, outputs: int, *inputs: np.ndarray) -> list[np.ndarray]:
    """What merges in `warp_decode.py`, for 32 lanes: memory is the process's own, by 64-bit address.

    Registers are uint32, whatever they hold; predicates are bool.
    """
    names = {f"${outputs + i}": np.ascontiguousarray(x) for i, x in enumerate(inputs)}

    def value(text: str) -> np.ndarray:
        if text in names:
            return names[text]
        return np.full(32, int(text.replace("0f", "0x"), 0), np.uint32)

    def number(text: str) -> np.ndarray:
        return value(text).view(np.float32)

    for line in assembly.strip("{}\n").split(";"):
        line = line.split(":")[-1].strip()
        if "bra.uni" in line:  # what is skipped stores nothing, or the same again
            continue
        active = np.full(32, True)
        if line.startswith("@"):
            guard, line = line.split(" ", 1)
            active = names[guard[1:]]
        name, _, rest = line.partition(" ")
        if name in ("", ".reg") or name.startswith("vote"):
            continue
        vector = re.search(r"\{(.*?)\}", rest)
        words = [x.strip() for x in vector[1].split(",")] if vector else []
        to, *x = [y.strip(" []") for y in re.sub(r"\{.*?\}", "", rest).split(",") if y.strip()]
        if "global" in name:
            base, _, offset = (x[0] if x else to).partition("+")
            addresses = (value(base).astype(np.int64) + int(offset or 0))[active]
            assert (addresses % (4 * len(words)) == 0).all(), "a vector that is not aligned"
            for i, word in enumerate(words):
                lanes = [ctypes.c_uint32.from_address(int(a) + 4 * i) for a in addresses]
                if name.startswith("ld"):
                    names[word] = np.array([lane.value for lane in lanes], np.uint32)
                else:
                    for lane, content in zip(lanes, value(word)[active], strict=True):
                        lane.value = int(content)
        elif name.startswith("shfl.sync.bfly"):
            names[to] = value(x[0])[np.arange(32) ^ int(x[1])]
        elif name.startswith("setp"):
            a, b = value(x[0]), value(x[1])
            names[to] = a == b if ".eq." in name else a != b
        elif name.startswith("selp"):
            names[to] = np.where(names[x[2]], value(x[0]), value(x[1]))
        elif name.startswith("cvt.rn"):
            halves = [_rounded(number(y), name.split(".")[2]) for y in x]
            names[to] = halves[0] << np.uint32(16) | halves[1]
        elif name.endswith(".f32"):
            a, b, *c = map(number, x)
            operation = name.split(".")[0]
            result = {"add": a + b, "sub": a - b, "fma": a * b + (c[0] if c else 0)}[operation]
            names[to] = result.astype(np.float32).view(np.uint32)
        elif name == "and.b32":
            names[to] = value(x[0]) & value(x[1])
        elif name == "mov.b32":
            names[to] = value(x[0])
        else:
            raise AssertionError(line)
    return [names[f"${i}"] for i in range(outputs)]


def _rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """Nearest fp16 or bf16 numbers, ties to even, as 16 bits."""
    if kind == "f16x2":
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = x.view(np.uint32)
    return bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
