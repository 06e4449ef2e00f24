"""The ring of the warp decode kernel, lane by lane: bytes arrive where they are read; banks are met once."""

import re

import numpy as np
import pytest

pytest.importorskip("triton")

from kvq_kernels import warp_ptx as ptx

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4
TILE, PAGE = 32, 64
PAIRS = [
    ("turbo", "lm2"), ("lm4", "int4"), ("int4", "int8"), ("int8", "fp8"), ("fp8", "lm2"), ("bf16", "bf16"),
]  # fmt: skip


def swizzled(offset: np.ndarray, swizzle: tuple[int, int, int]) -> np.ndarray:
    shift, mask, to = swizzle
    return offset ^ ((offset >> shift & mask) << to)


class Warp:
    """Runs the instructions of copies and loads for 32 lanes; `page` and `shared` are bytes."""

    def __init__(self, page: np.ndarray, size: int) -> None:
        self.page, self.shared = page, np.zeros(size, np.uint8)

    def run(self, assembly: str, outputs: int, *inputs: np.ndarray) -> list[np.ndarray]:
        names = {f"${outputs + i}": np.broadcast_to(x, (32,)) for i, x in enumerate(inputs)}

        def value(text: str) -> np.ndarray:
            base, _, offset = text.partition("+")
            number = names[base] if base in names else np.full(32, int(base, 0))
            return number + int(offset or 0)

        for line in assembly.strip("{}\n").split(";"):
            words = line.split()
            if not words or words[0] in (".reg", "cp.async.commit_group"):
                continue
            active = np.full(32, True)
            if words[0].startswith("@"):
                active = names[words.pop(0)[1:]]
            name, rest = words[0], " ".join(words[1:])
            vector = re.search(r"\{(.*?)\}", rest)
            operands = [x.strip(" []") for x in re.sub(r"\{.*?\},?", "", rest).split(",") if x.strip()]
            if name == "setp.ne.s32":
                names[operands[0]] = value(operands[1]) != value(operands[2])
            elif name == "setp.lt.and.s32":
                names[operands[0]] = (value(operands[1]) < value(operands[2])) & names[operands[3]]
            elif name == "xor.b32":
                names[operands[0]] = value(operands[1]) ^ value(operands[2])
            elif name.startswith("cp.async"):
                self.copy(value(operands[0])[active], value(operands[1])[active])
            elif name.startswith("ld.shared"):
                targets = [x.strip() for x in vector[1].split(",")] if vector else [operands.pop(0)]
                size = 2 if name.endswith("b16") else 4
                self.load(names, targets, value(operands[0]), size)
            elif name == "mov.b32":
                names[operands[0]] = names[vector[1].split(",")[0]] if vector else value(operands[1])
            else:
                raise AssertionError(line)
        return [names[f"${i}"] for i in range(outputs)]

    def copy(self, to: np.ndarray, source: np.ndarray) -> None:
        assert (to % 16 == 0).all() and (source % 16 == 0).all()
        for a, b in zip(to, source, strict=True):
            self.shared[a : a + 16] = self.page[b : b + 16]

    def load(self, names: dict, targets: list[str], address: np.ndarray, size: int) -> None:
        width = size * len(targets)
        assert (address % width == 0).all()
        together = min(32, 128 // width)  # lanes that the banks serve at a time
        for start in range(0, 32, together):
            lines: dict[int, set[int]] = {}
            for a in address[start : start + together]:
                for word in range(a // 4, (a + width + 3) // 4):
                    lines.setdefault(word % 32, set()).add(word)
            assert all(len(words) == 1 for words in lines.values()), "a bank is met twice"
        for i, target in enumerate(targets):
            columns = [
                self.shared[address + size * i + byte].astype(np.int64) << 8 * byte for byte in range(size)
            ]
            names[target] = sum(columns)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_ring(key: str, value: str, dim: int) -> None:
    keys, values = ptx.key_bytes(key, dim), ptx.value_bytes(value, dim)
    numbers = ptx.key_numbers(key), ptx.value_numbers(value)
    value_offset, meta_offset = PAGE * keys, PAGE * (keys + values)
    generator = np.random.default_rng(0)
    page = generator.integers(0, 256, meta_offset + 2 * PAGE * sum(numbers), dtype=np.uint8)
    warp, row = Warp(page, ptx.tile_bytes(key, value, dim, TILE)), PAGE - TILE
    sources = (
        row * keys + LANE * 16,
        value_offset + row * values + LANE * 16,
        meta_offset + row * 2 + LANE // 2 * (2 * PAGE) + LANE % 2 * 16,
    )
    targets = (
        swizzled(LANE * 16, ptx.key_swizzle(key, dim)),
        TILE * keys + swizzled(LANE * 16, ptx.value_swizzle(value, dim)),
        TILE * (keys + values) + LANE // 2 * (2 * TILE) + LANE % 2 * 16,
    )
    for step in range(TILE // 16):
        warp.run(ptx.copy(key, value, dim, step), 1, *sources, *targets, LANE, np.ones(32, int))

    def words(
        offset: int, size: int, count: int, token: np.ndarray, at: np.ndarray, jump: int
    ) -> list[np.ndarray]:
        """`count` words of each lane's token from byte `at` on; `jump` bytes on after every four."""
        begin = offset + (row + token) * size + at
        starts = [begin + 4 * (i % 4) + i // 4 * jump for i in range(count)]
        return [sum(page[s + byte].astype(np.int64) << 8 * byte for byte in range(4)) for s in starts]

    def metadata(first: int, count: int, token: np.ndarray) -> list[np.ndarray]:
        halves = page[meta_offset:].view(np.uint16).astype(np.int64)
        at = [(first + i) * PAGE + row + token for i in range(count)]
        return [halves[a] | halves[a + 1] << 16 for a in at]

    begin = TILE * (keys + values)
    key_part, value_part = 8 if keys == 32 else 16, min(16, values // 8)
    for step in range(TILE // 16):
        count = ptx.key_words(key, dim)
        loaded = warp.run(
            ptx.load_keys(key, dim, step, TILE), 2 * count + numbers[0],
            swizzled(G * 2 * keys + T * key_part, ptx.key_swizzle(key, dim)), begin + G * 4,
        )  # fmt: skip
        a = 16 * step + 2 * G
        expected = words(0, keys, count, a, T * key_part, 64) + words(0, keys, count, a + 1, T * key_part, 64)
        expected += metadata(0, numbers[0], a)
        np.testing.assert_array_equal(loaded, expected)

        count = ptx.value_words(value, dim)
        loaded = warp.run(
            ptx.load_values(value, dim, step, TILE), 4 * count + numbers[1],
            TILE * keys + swizzled(T * 4 * values + G * value_part, ptx.value_swizzle(value, dim)),
            begin + 2 * TILE * numbers[0] + G * 4,
        )  # fmt: skip
        expected = []
        for token in (0, 2, 1, 3):
            whole = words(value_offset, values, count, 16 * step + 4 * T + token, G * value_part, 128)
            expected += [x & 0xFFFF for x in whole] if values == 16 else whole
        expected += metadata(numbers[0], numbers[1], a)
        np.testing.assert_array_equal(loaded, expected)
