"""The few PTX instructions that `unpack.py` uses, in numpy: its inline assembly runs on a CPU."""

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
