"""PTX of what a warp does in the decode kernel (`warp_decode.py`); strings, built by scheme.

A lane has g = lane / 4 and t = lane % 4. Tensor cores take tokens as rows and query heads as columns:

- Scores, `mma.m16n8k32` on bytes: rows are 16 tokens, of which a lane brings two (row g and row g + 8), its
  quarter t of their dims; columns are the heads, of which lane g brings one, the same quarter of its dims.
  Sums don't depend on the order of dims, so a lane's plain 16-byte load of codes is its operand.
- Values, `mma.m16n8k16` on fp16: rows are dims, of which lane g brings D/8; columns are the heads; the sum
  runs over 16 tokens, of which lane t brings four. `movmatrix` turns weights from the first form into this.

T tokens of a page are a tile, copied to shared memory line by line, but for the order of 16-byte pieces in a
line of 128: no two lanes of a load meet in a bank (but of lm3's). Step i takes 16 of its tokens: lane g
scores tokens a = 16i + 2g and b = a + 1, lane t weighs tokens 16i + 4t … 16i + 4t + 3.

Queries become 15-bit integers, q = unit · (128 · high + low), so that byte products are as exact as bf16's.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton
import triton.language as tl

from kvq_kernels.codebook import LEVELS

TURBO = ("turbo", "turbo-whole")
"""The same bytes: residual signs meet the query's high bytes, or both, as fp16 has digits for."""
NIBBLE_KEYS = (*TURBO, "lm4", "lm3", "int4")
PLAIN = ("bf16", "fp16")
"""Not quantized: the model's dtype."""
FP8 = ("fp8", "e4m3")
"""The same bytes: as sm_80 unpacks them, and by the conversion of sm_89 and newer."""
KEYS = (*NIBBLE_KEYS, "int8", *FP8, *PLAIN)
VALUES = ("lm2", "lm3", "lm4", "int4", "int8", *FP8, *PLAIN)
BIASED = ("int4", "int8")

# --- levels as integers -------------------------------------------------------------------------------------

TURBO_UNIT = LEVELS[3][7] / 88
TURBO_LEVELS = tuple(round(level / TURBO_UNIT) for level in LEVELS[3])
"""3-bit levels in units of TURBO_UNIT."""
LM4_UNIT = LEVELS[4][15] / 114.5
LM4_LEVELS = tuple(round(level / LM4_UNIT + 0.5 * (level > 0) - 0.5 * (level < 0)) for level in LEVELS[4])
"""4-bit levels in units of LM4_UNIT, half a unit further from zero."""
LM2_UNIT = LEVELS[2][3] / 183
"""A 2-bit level is ±55 or ±183 times this."""
HALF_UNIT = 2.0**-24
"""The smallest fp16 number: the bits of an integer n below 1024 are the fp16 number n · HALF_UNIT."""
FINGERPRINT = hashlib.sha256(Path(__file__).read_bytes() + repr(LEVELS).encode()).hexdigest()[:16]
"""Of all that makes these strings: triton's cache of compiled kernels does not see it."""
NO_MAXIMUM = -1.0e30
"""A running maximum before anything was seen: finite, so that differences are never NaN."""
FIRST_SCALE = 2.0**60
"""Of values, before anything was seen: too large for any but zeros, so that the first step sets it."""
GROWTH = 4.0
"""The running maximum follows only where scores exceed it by this many powers of two."""
SMALLEST_QUERY = 2.0**-100
"""Queries are scaled as if their largest element were at least this: nothing is divided by zero."""
LARGE_VALUE = 2048.0
"""Weights times value scales stay below 2^GROWTH times this, which fp16 holds."""

POWERS = (2, 4, 16, 128)
"""Inputs of the kernel, so that ptxas must not know them: it would shift instead of multiplying, and the unit
that shifts has more to do than the one that multiplies."""

AS_BITS = 1.5 * 2.0**23
"""Of this plus an integer n below 2^22 in magnitude, the bits as an integer are AS_BITS_ZERO + n."""
AS_BITS_ZERO = 0x4B400000

# --- shapes -------------------------------------------------------------------------------------------------


@triton.constexpr_function
def key_words(scheme: str, dim: int) -> int:
    """Registers of one token's key that a lane reads: a quarter; of lm3 two words and their high bits."""
    if scheme in PLAIN:
        return dim // 8
    if scheme == "lm3":
        return 3
    return dim // 32 if scheme in NIBBLE_KEYS else dim // 16


@triton.constexpr_function
def value_words(scheme: str, dim: int) -> int:
    """Registers of one token's value that a lane reads: an eighth (for lm2 at 64 dims half a word); of lm3 a
    word and its high bits."""
    if scheme == "lm3":
        return 2
    bits = {"lm2": 2, "lm4": 4, "int4": 4, "int8": 8, "fp8": 8, "e4m3": 8}.get(scheme, 16)
    return max(1, dim * bits // 256)


@triton.constexpr_function
def key_bytes(scheme: str, dim: int) -> int:
    """Of one token's codes."""
    return dim * 3 // 8 if scheme == "lm3" else key_words(scheme, dim) * 16


@triton.constexpr_function
def value_bytes(scheme: str, dim: int) -> int:
    """Of one token's codes."""
    if scheme == "lm3":
        return dim * 3 // 8
    return 16 if scheme == "lm2" and dim == 64 else value_words(scheme, dim) * 32


@triton.constexpr_function
def key_swizzle(scheme: str, dim: int) -> tuple[int, int, int]:
    """(shift, mask, to): where in shared memory byte o of a tile's keys lies, see `swizzled`.

    Eight lanes that load 16 bytes each at a time (16 that load 8) must meet no bank twice: they bring two
    (four) values of g, 2 tokens apart, and all four t, 16 (8) bytes apart. Rows of lm3 lie as they are: two
    lanes meet in some.
    """
    if scheme == "lm3":
        return 0, 0, 0
    size = key_bytes(scheme, dim)
    return (size.bit_length(), 1, 6) if size > 32 else (size.bit_length() + 1, 1, 5)


@triton.constexpr_function
def value_swizzle(scheme: str, dim: int) -> tuple[int, int, int]:
    """The same of values: two, four or eight values of g, adjacent, and all four t, 4 tokens apart."""
    if scheme == "lm3":
        return 0, 0, 0
    return value_bytes(scheme, dim).bit_length() + 1, 3, 5


@triton.constexpr_function
def middle(size: int, tokens: int) -> int:
    """Bytes on in `tokens` rows of `size` bytes: what a copy adds to an address for nothing is between -2048
    and 2047."""
    return 2048 if size * tokens > 2048 else 0


@triton.constexpr_function
def tile_bytes(key: str, value: str, dim: int, tokens: int) -> int:
    """Shared memory of a tile: a multiple of 128."""
    numbers = 2 * (key_numbers(key) + value_numbers(value))
    return -(-tokens * (key_bytes(key, dim) + value_bytes(value, dim) + numbers) // 128) * 128


@triton.constexpr_function
def key_numbers(scheme: str) -> int:
    """fp16 numbers beside the codes of a key."""
    return 0 if scheme in PLAIN else 2 if scheme in (*TURBO, *BIASED) else 1


@triton.constexpr_function
def value_numbers(scheme: str) -> int:
    """The same of a value."""
    return 0 if scheme in PLAIN else 2 if scheme in ("int4", "int8") else 1


@triton.constexpr_function
def tables_held(scheme: str) -> int:
    """Registers of look-up tables and the like, see `held_constants`."""
    return {"turbo": 1, "turbo-whole": 2, "lm4": 3, "lm3": 1}.get(scheme, 0)


@triton.constexpr_function
def key_tables(scheme: str) -> list[tuple[int, ...]]:
    """Levels as `_Blocks.key_operands` looks them up, eight at a time."""
    return [LM4_LEVELS[:8], LM4_LEVELS[:7:-1]] if scheme == "lm4" else [TURBO_LEVELS]


@triton.constexpr_function
def query_registers(scheme: str, dim: int) -> tuple[int, int]:
    """Registers of the query that every step needs, and of these the ones that hold the high bytes."""
    if scheme in FP8 or scheme in PLAIN:
        return dim // 8, dim // 8
    return dim // 8 + (dim // 16 if scheme == "turbo" else 0), dim // 16


@triton.constexpr_function
def query_part(scheme: str, dim: int) -> int:
    """Elements of the query from one t to the next."""
    return dim // 4 if scheme in NIBBLE_KEYS else 8 if scheme in PLAIN else 16


@triton.constexpr_function
def types(count: int, dtype: tl.dtype) -> tuple[tl.dtype, ...]:
    return (dtype,) * count


def by_head(sums: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sums in the order of the state -> those of head 2t and of head 2t + 1, in the order of dims."""
    even, odd = ([sums[i + row + head] for row in (0, 2) for i in range(0, len(sums), 4)] for head in (0, 1))
    return even, odd


def place(i: int, dim: int, apart: bool) -> int:
    """The lane's i-th dim, counted from its first: see `_Blocks.store_sums`."""
    return i + 64 - dim // 16 if apart and i >= dim // 16 else i


_EVEN_ODD = ("0x6420", "0x7531")
"""`prmt` selectors of the even and the odd bytes of two words."""

# --- assembling ---------------------------------------------------------------------------------------------


class _Code:
    """Lines of one block, with registers by need."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts = {"r": 0, "f": 0, "p": 0, "h": 0}

    def new(self, kind: str = "r") -> str:
        self.counts[kind] += 1
        return f"{kind}{self.counts[kind]}"

    def add(self, line: str) -> None:
        self.lines.append(line + ";")

    def do(self, instruction: str, *operands: str, kind: str = "r", to: str | None = None) -> str:
        to = to or self.new(kind)
        self.add(f"{instruction} {', '.join((to, *operands))}")
        return to

    def text(self) -> str:
        types_ = {"r": ".b32", "f": ".f32", "p": ".pred", "h": ".b16"}
        declared = [f".reg {types_[k]} {k}<{n + 1}>;" for k, n in self.counts.items() if n]
        return "{\n" + "\n".join([*declared, *self.lines]) + "\n}"

    @staticmethod
    def table(numbers: Iterable[int]) -> list[str]:
        """Eight bytes as the two registers that `prmt` selects from."""
        data = bytes(n & 0xFF for n in numbers)
        assert len(data) == 8
        return [f"0x{int.from_bytes(data[i : i + 4], 'little'):08x}" for i in (0, 4)]

    @staticmethod
    def operands(first: int, count: int) -> list[str]:
        return [f"${i}" for i in range(first, first + count)]

    def mma(
        self, kinds: str, to: Sequence[str], a: Sequence[str], b: Sequence[str], c: Sequence[str]
    ) -> None:
        shape = "m16n8k16" if "f16" in kinds else "m16n8k32"
        groups = ", ".join("{" + ", ".join(group) + "}" for group in (to, a, b, c))
        self.add(f"mma.sync.aligned.{shape}.row.col.{kinds} {groups}")

    def load(self, to: Sequence[str], pointer: str, offset: int, predicate: str) -> None:
        vector = {1: "", 2: ".v2", 4: ".v4"}[len(to)]
        target = to[0] if len(to) == 1 else "{" + ", ".join(to) + "}"
        self.add(f"@{predicate} ld.global.nc.L1::no_allocate{vector}.b32 {target}, [{pointer}+{offset}]")

    def load_shared(self, to: Sequence[str], address: str) -> None:
        vector = {1: "", 2: ".v2", 4: ".v4"}[len(to)]
        target = to[0] if len(to) == 1 else "{" + ", ".join(to) + "}"
        self.add(f"ld.shared{vector}.b32 {target}, [{address}]")

    def load_numbers(self, to: Sequence[str], address: str, step: int, tokens: int) -> None:
        """fp16 metadata of tokens a and b of a step, each kind `tokens` numbers further on."""
        for i, register in enumerate(to):
            self.load_shared([register], f"{address}+{32 * step + 2 * tokens * i}")

    def place(self, address: str, offset: int, swizzle: tuple[int, int, int]) -> str:
        """`offset` bytes on from `address` as `swizzled` lays them; the two have no bit in common.

        As all is exclusive or, the place of a sum is that of one part, moved by that of the other.
        """
        shift, mask, to = swizzle
        if not mask:
            return f"{address}+{offset}"
        offset ^= (offset >> shift & mask) << to
        low = offset & 0x60
        if low:
            address = self.do("xor.b32", address, str(low))
        return f"{address}+{offset - low}"

    def guard(self, operand: str) -> str:
        predicate = self.new("p")
        self.add(f"setp.ne.s32 {predicate}, {operand}, 0")
        return predicate

    def butterflies(self, x: list[str], bits: Iterable[int]) -> list[str]:
        """The Walsh-Hadamard transform over numbers whose indices differ in one of `bits`, not normalised."""
        for bit in bits:
            for i in range(len(x)):
                if not i & bit:
                    a, b = x[i], x[i + bit]
                    x[i] = self.do("add.f32", a, b, kind="f")
                    x[i + bit] = self.do("sub.f32", a, b, kind="f")
        return x

    def butterflies_of_lanes(self, x: list[str], lane: str, bits: Iterable[int]) -> list[str]:
        """The same over lanes."""
        for bit in bits:
            sign, predicate = self.new("f"), self.new("p")
            self.add(f"setp.eq.s32 {predicate}, {self.do('and.b32', lane, str(bit))}, 0")
            self.add(f"selp.f32 {sign}, {self.float(1.0)}, {self.float(-1.0)}, {predicate}")
            for i, own in enumerate(x):
                other = self.do("shfl.sync.bfly.b32", own, str(bit), "0x1f", "0xffffffff", kind="f")
                x[i] = self.do("fma.rn.f32", own, sign, other, kind="f")
        return x

    def unpack_query(self, words: Sequence[str], dtype: str, zero: str) -> list[str]:
        """Pairs of `dtype` in words -> float32 numbers."""
        x: list[str] = []
        for word in words:
            if dtype == "bf16":
                x += [self.do("prmt.b32", word, zero, two, kind="f") for two in ("0x1044", "0x3244")]
            else:
                low, high = self.new("h"), self.new("h")
                self.add(f"mov.b32 {{{low}, {high}}}, {self.do('xor.b32', word, zero)}")
                x += [self.do("cvt.f32.f16", half, kind="f") for half in (low, high)]
        return x

    def rotate_query(self, words: Sequence[str], t: str, dtype: str, zero: str) -> list[str]:
        """The Walsh-Hadamard transform of a head's quarters in four lanes, pairs of `dtype` in words ->
        float32 numbers in the same order, not normalised.

        A product of matrices transforms over t and over the bits 1 and 4 of a number's index in the lane: its
        rows are the heads, twice, for bit 2, its columns 2t and 2t + 1 what lane t shall have, without and
        with bit 1. It takes 8 numbers of a lane, twice, for bit 4. Additions transform over the other bits.
        """
        one = {"bf16": 0x3F803F80, "fp16": 0x3C003C00}[dtype]
        lane = self.do("mov.u32", "%laneid")
        common = self.do("popc.b32", self.do("and.b32", self.do("shr.u32", lane, "3"), t))
        negative = self.do("and.b32", self.do("mul.lo.u32", common, "0x80008000"), "0x80008000")
        odd = self.do("and.b32", self.do("shl.b32", lane, "29"), "0x80000000")
        plus = self.do("xor.b32", self.do("lop3.b32", negative, odd, zero, "0x96"), f"0x{one:08x}")
        minus = self.do("xor.b32", plus, "0x80008000")
        nothing = self.do("mov.f32", self.float(0.0), kind="f")
        kind = "f16" if dtype == "fp16" else dtype
        x: list[str] = []
        for i in range(0, len(words), 4):
            for second in (plus, minus):
                sums = [self.new("f") for _ in range(4)]
                self.mma(f"f32.{kind}.{kind}.f32", sums, words[i : i + 4], (plus, second), [nothing] * 4)
                x += sums
        return self.butterflies(x, (2, *(8 << i for i in range(len(x).bit_length() - 4))))

    def reduce(self, instruction: str, x: str, lanes: Iterable[int], kind: str) -> str:
        for lane in lanes:
            other = self.do("shfl.sync.bfly.b32", x, str(lane), "0x1f", "0xffffffff", kind=kind)
            x = self.do(instruction, x, other, kind=kind)
        return x

    @staticmethod
    def float(x: float) -> str:
        return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"

    def pack_bytes(self, values: Sequence[str]) -> str:
        low = self.do("prmt.b32", values[0], values[1], "0x0040")
        high = self.do("prmt.b32", values[2], values[3], "0x0040")
        return self.do("prmt.b32", low, high, "0x5410")

    def key_operands(self, scheme: str, words: Sequence[str], held: Sequence[str]) -> list[tuple[str, str]]:
        """A token's words -> what its row brings to the products of 32 dims, one or two to each; `held`: see
        `held_constants`.

        For lm4 the two add up to the level in units, less one half. Where a selector's highest bit is set,
        `prmt` gives the sign of the byte: a look-up of the levels below zero gives -1 in place of the others,
        and one of those above, with all bits flipped and so in descending order, gives 0.
        """
        if scheme == "int8":
            return [(words[i], words[i + 1]) for i in range(0, len(words), 2)]
        if scheme == "int4":
            return [
                (
                    self.do("and.b32", word, "0x0f0f0f0f"),
                    self.do("and.b32", self.do("shr.u32", word, "4"), "0x0f0f0f0f"),
                )
                for word in words
            ]
        result = []
        if scheme == "lm3":
            for i, word in enumerate(words[:2]):
                for index in self.nibbles_of_lm3(word, words[2], i):
                    result.append(self.look_up((held[0], self.table(TURBO_LEVELS)[1]), index))
            return result
        tables = [(first, self.table(x)[1]) for first, x in zip(held, key_tables(scheme), strict=False)]
        for word in words:
            if scheme in TURBO:
                word = self.do("and.b32", word, "0x77777777")
            upper = self.do("shr.u32", word, "16")
            result.append(self.look_up(tables[0], word, upper))
            if scheme == "lm4":  # ~x is -x - 1
                flipped = (self.do("mad.lo.s32", x, held[2], held[2]) for x in (word, upper))
                result.append(self.look_up(tables[1], *flipped))
        return result

    def e4m3_pairs(self, scheme: str, word: str) -> list[str]:
        """Four bytes -> two pairs of fp16 numbers: values, or, where bits are only moved, a 256th of them."""
        if scheme == "e4m3":
            halves = [self.new("h"), self.new("h")]
            self.add(f"mov.b32 {{{halves[0]}, {halves[1]}}}, {word}")
            return [self.do("cvt.rn.f16x2.e4m3x2", half) for half in halves]
        pairs = []
        for selector in ("0x1404", "0x3424"):  # two bytes into the high halves of a zero
            x = self.do("prmt.b32", word, "0", selector)
            shifted = self.do("and.b32", self.do("shr.u32", x, "1"), "0x3f803f80")
            pairs.append(self.do("lop3.b32", x, "0x80008000", shifted, "0xea"))  # (x & signs) | shifted
        return pairs

    def nibbles_of_lm3(self, word: str, highs: str, half: int) -> list[str]:
        """16 codes: their low two bits, and their high bits in a half of `highs` -> those of even dims and
        those of odd ones, a nibble each."""
        spread = self.do("shr.u32", highs, "16") if half else self.do("and.b32", highs, "0xffff")
        for distance, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)):
            shifted = self.do("shl.b32", spread, str(distance))
            spread = self.do("lop3.b32", spread, shifted, f"0x{mask:08x}", "0xa8")  # (x | y) & mask
        nibbles = []
        for parity in range(2):
            low = self.do("and.b32", self.do("shr.u32", word, "2") if parity else word, "0x33333333")
            high = self.do("shl.b32", spread, str(2 - parity))
            nibbles.append(self.do("lop3.b32", high, "0x44444444", low, "0xea"))  # (x & mask) | y
        return nibbles

    def look_up(self, table: Sequence[str], index: str, upper: str = "") -> tuple[str, str]:
        """What the lower four nibbles of `index` select from eight bytes, and what the upper four do, which
        may come as the lower ones of `upper`."""
        upper = upper or self.do("shr.u32", index, "16")
        return self.do("prmt.b32", *table, index), self.do("prmt.b32", *table, upper)

    def magnitudes(self, word: str) -> tuple[str, str]:
        """Eight codes of 4-bit levels, of which the lower eight are negative -> twice their magnitudes in
        units of LM4_UNIT, as bytes: of the first four codes and of the others."""
        upper = self.do("and.b32", word, "0x88888888")
        sevens = self.do("sub.s32", upper, self.do("shr.u32", upper, "3"))  # where the highest bit is set
        index = self.do("lop3.b32", word, sevens, "0x77777777", "0x82")  # ~(word ^ sevens) & mask
        return self.look_up(self.table(round(2 * level / LM4_UNIT) for level in LEVELS[4][8:]), index)

    def signed_pairs(
        self, x: str, y: str, magnitudes: Iterable[Sequence[str]], powers: Sequence[str], sign_bit: int
    ) -> list[str]:
        """Eight codes of a and of b, and of four at a time their magnitudes as bytes -> eight pairs (a, b) of
        fp16 numbers, negative where a code's sign bit is 0."""
        pairs = []
        for selector, both in zip(("0x5410", "0x7632"), magnitudes, strict=True):
            zipped = self.do("prmt.b32", x, y, selector)
            if sign_bit == 2:
                zipped = self.do("mul.lo.u32", zipped, powers[0])
            by8 = self.do("mul.lo.u32", self.do("mul.lo.u32", zipped, powers[3]), powers[0])
            by12, by4 = (self.do("mul.lo.u32", word, powers[2]) for word in (by8, zipped))
            bytes_ = [self.do("prmt.b32", *both, s) for s in ("0x5140", "0x7362")]  # a0 b0 a1 b1
            for i, sign in enumerate((by12, by8, by4, zipped)):
                pair = self.do("prmt.b32", bytes_[i // 2], "0", ("0x4140", "0x4342")[i % 2])
                pairs.append(self.do("lop3.b32", sign, "0x80008000", pair, "0xae"))  # (~x & signs) | pair
        return pairs

    def value_operands(
        self, scheme: str, dim: int, a: Sequence[str], b: Sequence[str], powers: Sequence[str]
    ) -> list[str]:
        """Words of tokens a and b -> for each of the lane's D/8 dims an fp16 pair (a, b); see `weigh`."""
        pairs: list[str] = []
        if scheme == "lm2":
            halves = [("0x5410",), ("0x5410", "0x7632")][dim // 128]
            for selector in halves:
                zipped = self.do("prmt.b32", a[0], b[0], selector)
                by1, by2, by4, by7 = (self.do("mul.lo.u32", zipped, power) for power in powers)
                by3, by5 = (self.do("mul.lo.u32", x, powers[0]) for x in (by2, by4))
                by6 = self.do("mul.lo.u32", by4, powers[1])
                shifted = [zipped, by1, by2, by3, by4, by5, by6, by7]
                for word in reversed(shifted):
                    pairs.append(self.do("lop3.b32", word, "0x80808080", "0x00370037", "0xea"))
            return pairs
        if scheme == "lm3":
            table = self.table(round(abs(level) / TURBO_UNIT) for level in LEVELS[3])
            of_parity = []
            for x, y in zip(*(self.nibbles_of_lm3(low, high, 0) for low, high in (a, b)), strict=True):
                both = zip(self.look_up(table, x), self.look_up(table, y), strict=True)
                of_parity.append(self.signed_pairs(x, y, both, powers, 2))
            return [pair for two in zip(*of_parity, strict=True) for pair in two]
        if scheme == "lm4":
            for x, y in zip(a, b, strict=True):
                both = zip(self.magnitudes(x), self.magnitudes(y), strict=True)
                pairs += self.signed_pairs(x, y, both, powers, 3)
            return pairs
        if scheme == "int4":
            for x, y in zip(a, b, strict=True):
                for selector in ("0x5410", "0x7632"):
                    zipped = self.do("prmt.b32", x, y, selector)
                    upper = self.do("shr.u32", zipped, "8")
                    pairs += [
                        self.do("and.b32", word, mask)
                        for word in (zipped, upper)
                        for mask in ("0x000f000f", "0x00f000f0")
                    ]
            return pairs
        if scheme in PLAIN:
            return [
                self.do("prmt.b32", x, y, s) for x, y in zip(a, b, strict=True) for s in ("0x5410", "0x7632")
            ]
        for x, y in zip(a, b, strict=True):
            for selector in ("0x5140", "0x7362"):
                zipped = self.do("prmt.b32", x, y, selector)  # a0 b0 a1 b1
                if scheme in FP8:
                    pairs += self.e4m3_pairs(scheme, zipped)
                else:
                    pairs += [self.do("prmt.b32", zipped, "0", s) for s in ("0x4140", "0x4342")]
        return pairs

    def ex2(self, x: str) -> str:
        return self.do("ex2.approx.ftz.f32", x, kind="f")


@triton.constexpr_function
def constraints(outputs: str, inputs: str) -> str:
    """LLVM's constraint string; outputs are written before all inputs are read."""
    return ",".join([*("=&" + c for c in outputs), *inputs])


@triton.constexpr_function
def step_state(dim: int) -> int:
    """Numbers that a step hands on: m, l and bias of two heads, the values' scale, and the sums."""
    return 7 + dim // 4


@triton.constexpr_function
def share_words(dim: int) -> int:
    """Numbers of a lane that a warp leaves for those that merge, of one head: m, l and its sums, and no more
    than to make whole pieces of 16 bytes."""
    return -(-(2 + dim // 8) // 4) * 4


@triton.constexpr_function
def ring_bytes(key: str, value: str, dim: int, tokens: int, team: int) -> int:
    """Shared memory of a warp: of a tile, and of its share if there are others."""
    share = 2 * 32 * 4 * share_words(dim) if team > 1 else 0
    return max(tile_bytes(key, value, dim, tokens), share)


class _Blocks:
    """One method for each block of the kernel: operands are outputs, then inputs.

    Methods, because triton lets a `constexpr_function` call its like and classes, but no plain function.
    """

    @staticmethod
    def shared_memory() -> str:
        """The shared address of what the program has allocated, which must be one piece. The input is
        unused."""
        return "mov.u32 $0, global_smem;"

    @staticmethod
    def address() -> str:
        """A 64-bit address and a number of bytes, not negative -> their sum. As a product, or LLVM would
        take constants out of the number, and ptxas add them anew for each copy."""
        return "mad.wide.u32 $0, $2, 1, $1;"

    @staticmethod
    def copy(key: str, value: str, dim: int, tokens: int, first: int, steps: int) -> str:
        """Start copying steps of a tile from the page to the ring: a group of copies, or an empty one.

        Inputs: for keys, values and numbers the 64-bit address to read from, at the lane's first 16 bytes of
        the tile (of keys and values `middle` on), and the shared one to write to; the lane; and whether to
        copy. One output, for form's sake.
        """
        code = _Code()
        sources, targets, (lane, wanted) = code.operands(1, 3), code.operands(4, 3), code.operands(7, 2)
        numbers = key_numbers(key) + value_numbers(value)
        sizes = key_bytes(key, dim), value_bytes(value, dim)
        swizzles = key_swizzle(key, dim), value_swizzle(value, dim)
        everything = code.guard(wanted)

        def some(lanes: int) -> str:
            if lanes == 32:
                return everything
            predicate = code.new("p")
            code.add(f"setp.lt.and.s32 {predicate}, {lane}, {lanes}, {everything}")
            return predicate

        def copy(predicate: str, to: str, source: str, offset: int) -> None:
            code.add(f"@{predicate} cp.async.cg.shared.global [{to}], [{source}+{offset}], 16")

        for step in range(first, first + steps):
            for source, target, size, swizzle in zip(sources, targets, sizes, swizzles, strict=False):
                for at in range(16 * step * size, 16 * (step + 1) * size, 512):
                    predicate = some(min(32, (16 * (step + 1) * size - at) // 16))
                    copy(predicate, code.place(target, at, swizzle), source, at - middle(size, tokens))
            if numbers:
                copy(some(2 * numbers), f"{targets[2]}+{32 * step}", sources[2], 32 * step)
        code.add("cp.async.commit_group")
        code.add("mov.b32 $0, 0")
        return code.text()

    @staticmethod
    def wait(groups: int) -> str:
        """Until no more than `groups` copies of this lane are on their way, for all lanes. The input is
        unused; one output, for form's sake."""
        code = _Code()
        code.add(f"cp.async.wait_group {groups}")
        code.add("bar.warp.sync 0xffffffff")
        code.add("mov.b32 $0, 0")
        return code.text()

    @staticmethod
    def all_read() -> str:
        """Until all lanes have read what they asked for. The input is unused; one output, for form's sake."""
        return "{\nbar.warp.sync 0xffffffff;\nmov.b32 $0, 0;\n}"

    @staticmethod
    def load_keys(scheme: str, dim: int, step: int, tokens: int) -> str:
        """Outputs: words of tokens a and b of a step, and a register of each metadata, tokens a and b.

        Inputs: shared addresses of the tile's keys, of their high bits, and of their metadata, at the lane's
        part.
        """
        code, words, numbers = _Code(), key_words(scheme, dim), key_numbers(scheme)
        outputs = code.operands(0, 2 * words + numbers)
        keys, high, metadata = code.operands(2 * words + numbers, 3)
        for token in range(2):
            if scheme == "lm3":
                offset = (16 * step + token) * key_bytes(scheme, dim)
                code.load_shared(outputs[3 * token : 3 * token + 2], f"{keys}+{offset}")
                code.load_shared(outputs[3 * token + 2 : 3 * token + 3], f"{high}+{offset}")
                continue
            for word in range(0, words, 4):
                to = outputs[token * words + word : token * words + min(word + 4, words)]
                offset = (16 * step + token) * key_bytes(scheme, dim) + word * 16
                code.load_shared(to, code.place(keys, offset, key_swizzle(scheme, dim)))
        code.load_numbers(outputs[2 * words :], metadata, step, tokens)
        return code.text()

    @staticmethod
    def load_values(scheme: str, dim: int, step: int, tokens: int) -> str:
        """The same for values: words of the four tokens the lane weighs in a step, metadata of a and b."""
        code, words, numbers = _Code(), value_words(scheme, dim), value_numbers(scheme)
        outputs = code.operands(0, 4 * words + numbers)
        values, high, metadata = code.operands(4 * words + numbers, 3)
        row, swizzle = value_bytes(scheme, dim), value_swizzle(scheme, dim)
        for i, token in enumerate((0, 2, 1, 3)):
            to, offset = outputs[i * words : (i + 1) * words], (16 * step + token) * row
            if scheme == "lm3":
                half = code.new("h")
                code.load_shared(to[:1], f"{values}+{offset}")
                code.add(f"ld.shared.b16 {half}, [{high}+{offset}]")
                code.add(f"mov.b32 {to[1]}, {{{half}, {half}}}")
                continue
            if row == 16:
                half = code.new("h")
                code.add(f"ld.shared.b16 {half}, [{code.place(values, offset, swizzle)}]")
                code.add(f"mov.b32 {to[0]}, {{{half}, {half}}}")
            for word in range(0, words if row > 16 else 0, 4):  # two runs of 64 dims where there are 8 words
                part = to[word : min(word + 4, words)]
                code.load_shared(part, code.place(values, offset + word * 32, swizzle))
        code.load_numbers(outputs[4 * words :], metadata, step, tokens)
        return code.text()

    @staticmethod
    def zero_after_copies() -> str:
        """0, which is not known before the copies have started. Inputs: a number, and the shared address
        where it has been stored.

        ptxas sees nobody wait for copies, and would prepare the query first: whoever needs this zero is
        later.
        """
        code = _Code()
        code.add("bar.warp.sync 0xffffffff")
        code.load_shared(["$0"], "$2")
        code.add("xor.b32 $0, $0, $1")
        return code.text()

    @staticmethod
    def load_query(scheme: str, dim: int) -> str:
        """The lane's quarter of the query of head g, as it lies: dim / 8 words; zeros where there is no head.

        Inputs: the head's 64-bit address at the lane's part, and whether it exists.
        """
        code, count = _Code(), dim // 8
        outputs = code.operands(0, count)
        pointer, exists = code.operands(count, 2)
        predicate = code.guard(exists)
        for chunk in range(count // 4):  # 8 elements, 16 bytes
            words = outputs[4 * chunk : 4 * chunk + 4]
            for word in words:
                code.add(f"mov.b32 {word}, 0")
            start = chunk * 16  # nibbles: the t-th quarter
            if scheme in PLAIN:
                start = chunk * 64
            elif scheme not in NIBBLE_KEYS:  # the t-th quarter of every 64
                start = chunk // 2 * 128 + chunk % 2 * 16
            code.load(words, pointer, start, predicate)
        return code.text()

    @staticmethod
    def prepare_query(scheme: str, dim: int, rotated: bool, dtype: str) -> str:
        """Words of head g -> the registers of `query_registers`, and of heads 2t, 2t + 1: unit, Σ high, Σ q.

        unit · (128 high + low) is q (for fp8 keys unit · fp16); Σ q is in units of `unit`. Inputs: the words,
        t, 8t, and `zero_after_copies`. NaN and infinity make unit NaN. Unquantized keys meet the query as it
        is.
        """
        code, count = _Code(), dim // 4
        registers, _ = query_registers(scheme, dim)
        outputs = code.operands(0, registers + 6)
        words = code.operands(registers + 6, dim // 8)
        t, source, zero = code.operands(registers + 6 + dim // 8, 3)
        if scheme in PLAIN:
            for output, value in zip(outputs, (*words, *("0x3f800000",) * 2, *("0",) * 4), strict=True):
                code.add(f"mov.b32 {output}, {value}")
            return code.text()
        x = code.rotate_query(words, t, dtype, zero) if rotated else code.unpack_query(words, dtype, zero)
        largest = code.do("abs.f32", x[0], kind="f")
        for value in x[1:]:
            largest = code.do("max.NaN.f32", largest, code.do("abs.f32", value, kind="f"), kind="f")
        largest = code.reduce("max.NaN.f32", largest, (1, 2), "f")
        spoiled = code.do("mul.f32", largest, code.float(0.0), kind="f")
        largest = code.do("max.f32", largest, code.float(SMALLEST_QUERY), kind="f")
        norm = dim**-0.5 if rotated else 1.0
        if scheme in FP8:
            unit = code.do("and.b32", largest, "0x7f800000", kind="f")  # a power of two: fp16 stays exact
            inverse = code.do("rcp.approx.f32", unit, kind="f")
            scaled = [code.do("mul.f32", value, inverse, kind="f") for value in x]
            for i in range(0, count, 2):
                code.add(f"cvt.rn.f16x2.f32 {outputs[i // 2]}, {scaled[i + 1]}, {scaled[i]}")
            sum_high, sum_all = code.do("mov.b32", "0"), code.do("mov.b32", "0")
        else:
            unit = code.do("mul.f32", largest, code.float(1 / (127 * 128)), kind="f")
            inverse = code.do("div.full.f32", code.float(127 * 128), largest, kind="f")
            parts: tuple[list[str], list[str]] = ([], [])
            for value in x:
                # the bits of AS_BITS + n are n's but for the highest ten, and only low bytes are kept
                number = code.do("fma.rn.f32", value, inverse, code.float(AS_BITS))
                high = code.do("shr.s32", code.do("add.s32", number, "64"), "7")
                parts[0].append(high)
                parts[1].append(code.do("mad.lo.s32", high, "-128", number))
            packed = [[code.pack_bytes(part[i : i + 4]) for i in range(0, count, 4)] for part in parts]
            sums = []
            for part in packed:
                total = code.do("mov.b32", "0")
                for word in part:
                    total = code.do("dp4a.s32.s32", word, "0x01010101", total)
                sums.append(code.reduce("add.s32", total, (1, 2), "r"))
            sum_high = sums[0]
            sum_all = code.do("mad.lo.s32", sums[0], "128", sums[1])
            even_odd = [
                [
                    code.do("prmt.b32", part[i], part[i + 1], s)
                    for i in range(0, len(part), 2)
                    for s in _EVEN_ODD
                ]
                for part in packed
            ]
            if scheme == "int4":
                packed = even_odd
            if scheme == "lm3":  # of 16 dims the even ones, then the odd ones
                packed = [
                    [part[i + j] for i in range(0, len(part), 4) for j in (0, 2, 1, 3)] for part in even_odd
                ]
            registers_ = packed[0] + packed[1]
            if scheme == "turbo":
                registers_ += even_odd[0][0::2] + even_odd[0][1::2]
            for output, register in zip(outputs, registers_, strict=False):
                code.add(f"mov.b32 {output}, {register}")
            assert len(registers_) == registers
        unit = code.do("fma.rn.f32", unit, code.float(norm), spoiled, kind="f")
        target = registers
        for value in (unit, sum_high, sum_all):
            for head in range(2):
                lane = code.do("add.s32", source, str(4 * head))
                code.do("shfl.sync.idx.b32", value, lane, "0x1f", "0xffffffff", to=outputs[target])
                target += 1
        return code.text()

    @staticmethod
    def scores(scheme: str, dim: int) -> str:
        """One step's scores. Outputs: for tokens a, b and heads 2t, 2t + 1: a0, a1, b0, b1: integers
        Σ q·code in units of `unit`; for turbo then the bits of as many AS_BITS + R, where R is Σ q·(sign of
        the residual), or half as much where that is 64 Σ high·sign. For fp8 and unquantized keys floats.

        Inputs: words of tokens a and b, the query's registers, those of `held_constants`, `POWERS`, and for
        turbo AS_BITS_ZERO + Σ q of both heads, or AS_BITS_ZERO - 64 Σ high, for lm4 half of Σ q. (No powers
        for fp8 and unquantized keys.)
        """
        code, words = _Code(), key_words(scheme, dim)
        registers, high = query_registers(scheme, dim)
        count = 8 if scheme in TURBO else 4
        outputs = code.operands(0, count)
        a, b = code.operands(count, words), code.operands(count + words, words)
        query = code.operands(count + 2 * words, registers)
        held = code.operands(count + 2 * words + registers, tables_held(scheme))
        powers = code.operands(count + 2 * words + registers + len(held), len(POWERS))
        starts = code.operands(count + 2 * words + registers + len(held) + len(powers), 2)
        if scheme in FP8 or scheme in PLAIN:
            sums = [code.do("mov.f32", code.float(0.0), kind="f") for _ in range(4)]
            for i in range(registers // 2):
                if scheme in FP8:
                    rows = [code.e4m3_pairs(scheme, w[i]) for w in (a, b)]
                else:
                    rows = [w[2 * i : 2 * i + 2] for w in (a, b)]
                operand = [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]
                kind = "bf16" if scheme == "bf16" else "f16"
                code.mma(f"f32.{kind}.{kind}.f32", sums, operand, query[2 * i : 2 * i + 2], sums)
            for output, total in zip(outputs, sums, strict=True):
                code.add(f"mov.f32 {output}, {total}")
            return code.text()
        coded = [code.key_operands(scheme, w, held) for w in (a, b)]
        kinds = "s32.s8.s8.s32" if held else "s32.u8.s8.s32"
        highs, lows = ([code.do("mov.b32", "0") for _ in range(4)] for _ in range(2))
        if scheme == "lm4":
            lows = [code.do("mov.b32", starts[i % 2]) for i in range(4)]
        for i, (row_a, row_b) in enumerate(zip(*coded, strict=True)):
            operand = [row_a[0], row_b[0], row_a[1], row_b[1]]
            at = i * high // len(coded[0]) // 2 * 2
            for sums, part in ((highs, query[:high]), (lows, query[high : 2 * high])):
                code.mma(kinds, sums, operand, part[at : at + 2], sums)
        for output, x, y in zip(outputs, highs, lows, strict=False):
            code.add(f"mad.lo.s32 {output}, {x}, {powers[3]}, {y}")
        if scheme == "turbo":
            residual = query[2 * high :]
            sums = [code.do("mov.b32", "0") for _ in range(4)]
            for mask, part in (("0x08080808", residual[:words]), ("0x80808080", residual[words:])):
                for i in range(0, words, 2):
                    masked = [code.do("and.b32", w[j], mask) for j in (i, i + 1) for w in (a, b)]
                    code.mma("s32.u8.s8.s32", sums, masked, part[i : i + 2], sums)
                if mask == "0x08080808":  # 16 times these, and all that was not added, before the others
                    sums = [code.do("mad.lo.s32", x, powers[2], starts[i % 2]) for i, x in enumerate(sums)]
            for output, x in zip(outputs[4:], sums, strict=True):
                code.add(f"mov.b32 {output}, {x}")
        if scheme == "turbo-whole":
            highs, lows = ([code.do("mov.b32", "0") for _ in range(4)] for _ in range(2))
            for i in range(words):
                # 1 where the sign is negative, a nibble's highest bit 0; else the sign of that 1: nothing
                rows = []
                for word in (a[i], b[i]):
                    upper = code.do("shr.u32", word, "16")
                    rows.append([code.do("prmt.b32", held[1], held[1], half) for half in (word, upper)])
                operand = [rows[0][0], rows[1][0], rows[0][1], rows[1][1]]
                for sums, part in ((highs, query[:high]), (lows, query[high:])):
                    code.mma("s32.u8.s8.s32", sums, operand, part[2 * i : 2 * i + 2], sums)
            for i, (output, x, y) in enumerate(zip(outputs[4:], highs, lows, strict=True)):
                total = code.do("mad.lo.s32", y, "-2", starts[i % 2])
                code.add(f"mad.lo.s32 {output}, {x}, -256, {total}")
        return code.text()

    @staticmethod
    def weigh(scheme: str, dim: int) -> str:
        """One step's softmax and values. Outputs and last inputs: the state, as in `step_state`.

        Inputs before it: scores a0, a1, b0, b1 (-inf where unseen), what makes those of heads 2t and 2t + 1
        powers of two; value scales of tokens a and b, their biases, and the words of the four tokens the lane
        weighs: 0, 2, 1, 3 of them. Sums are in units of 1 / (the values' scale). After the state `POWERS`.
        """
        code, words, state = _Code(), value_words(scheme, dim), step_state(dim)
        outputs = code.operands(0, state)
        scores_, units = code.operands(state, 4), code.operands(state + 4, 2)
        scales, biases = code.operands(state + 6, 2), code.operands(state + 8, 2)
        tokens = [code.operands(state + 10 + i * words, words) for i in range(4)]
        for output, value in zip(outputs, code.operands(state + 10 + 4 * words, state), strict=True):
            code.add(f"mov.f32 {output}, {value}")
        powers = code.operands(2 * state + 10 + 4 * words, len(POWERS))
        m, l, bias, value_scale, sums = outputs[0:2], outputs[2:4], outputs[4:6], outputs[6], outputs[7:]
        scaled_values = scheme not in PLAIN

        exponents, scaled = [code.new("f") for _ in range(4)], [code.new("f") for _ in range(2)]

        def prepare() -> None:
            for i, (exponent, score) in enumerate(zip(exponents, scores_, strict=True)):
                minus = code.do("neg.f32", m[i % 2], kind="f")
                code.add(f"fma.rn.f32 {exponent}, {score}, {units[i % 2]}, {minus}")
            if scaled_values:
                for to, scale in zip(scaled, scales, strict=True):
                    code.add(f"mul.f32 {to}, {scale}, {value_scale}")

        # rarely: a larger maximum, or larger values
        prepare()
        top = code.do("max.f32", exponents[0], exponents[1], kind="f")
        top = code.do("max.f32", top, code.do("max.f32", exponents[2], exponents[3], kind="f"), kind="f")
        wanted, any_wanted = code.new("p"), code.new("p")
        code.add(f"setp.gt.f32 {wanted}, {top}, {code.float(GROWTH)}")
        size = ""
        if scaled_values:
            size = code.do("max.f32", scaled[0], scaled[1], kind="f")
            code.add(f"setp.gt.or.f32 {wanted}, {size}, {code.float(LARGE_VALUE)}, {wanted}")
        code.add(f"vote.sync.any.pred {any_wanted}, {wanted}, 0xffffffff")
        code.add(f"@!{any_wanted} bra.uni GO_ON")
        shrink = code.do("mov.f32", code.float(1.0), kind="f")
        if scaled_values:
            size = code.reduce("max.f32", size, (4, 8, 16), "f")
            large = code.new("p")
            code.add(f"setp.gt.f32 {large}, {size}, {code.float(LARGE_VALUE)}")
            power = code.do("and.b32", size, "0x7f800000")
            inverse = code.do("sub.s32", "0x82800000", power)  # 2^7 / power
            code.add(f"selp.f32 {shrink}, {inverse}, {code.float(1.0)}, {large}")
            code.add(f"mul.f32 {value_scale}, {value_scale}, {shrink}")
        for head in range(2):
            both = [code.do("mul.f32", scores_[i], units[head], kind="f") for i in (head, head + 2)]
            top = code.reduce("max.f32", code.do("max.f32", *both, kind="f"), (4, 8, 16), "f")
            new = code.do("max.f32", m[head], top, kind="f")
            alpha = code.ex2(code.do("sub.f32", m[head], new, kind="f"))
            code.add(f"mov.f32 {m[head]}, {new}")
            for x in (l[head], bias[head]):
                code.add(f"mul.f32 {x}, {x}, {alpha}")
            factor = code.do("mul.f32", alpha, shrink, kind="f")
            for x in sums[head::2]:
                code.add(f"mul.f32 {x}, {x}, {factor}")
        prepare()
        code.lines.append("GO_ON:")

        columns = []
        for token in range(2):
            weights = []
            for head in range(2):
                p = code.ex2(exponents[2 * token + head])
                code.add(f"add.f32 {l[head]}, {l[head]}, {p}")
                if scheme in BIASED:
                    code.add(f"fma.rn.f32 {bias[head]}, {p}, {biases[token]}, {bias[head]}")
                weights.append(code.do("mul.f32", p, scaled[token], kind="f") if scaled_values else p)
            half = "bf16" if scheme == "bf16" else "f16"
            packed = code.do(f"cvt.rn.{half}x2.f32", weights[1], weights[0])
            columns.append(code.do("movmatrix.sync.aligned.m8n8.trans.b16", packed))
        first, second = (code.value_operands(scheme, dim, tokens[i], tokens[i + 1], powers) for i in (0, 2))
        tiles = dim // 16
        kind = "f32.bf16.bf16.f32" if scheme == "bf16" else "f32.f16.f16.f32"
        for i in range(tiles):
            operand = [first[i], first[tiles + i], second[i], second[tiles + i]]
            code.mma(kind, sums[4 * i : 4 * i + 4], operand, columns, sums[4 * i : 4 * i + 4])
        return code.text()

    @staticmethod
    def mask(scheme: str, dim: int) -> str:
        """Where a step has tokens that are not seen: their scores become -inf, their values zero.

        Inputs: a number below zero where the tile has any, the same for all lanes; the step's first token;
        the bounds of those that are seen; 2g and 4t; scores a0, a1, b0, b1, and what `load_values` gave.
        Outputs: the same scores and values. Rows that hold no token may hold anything, and 0 · NaN is NaN.
        """
        code, words, numbers = _Code(), value_words(scheme, dim), value_numbers(scheme)
        count = 4 + 4 * words + numbers
        outputs = code.operands(0, count)
        inside, start, low, high, row, column = code.operands(count, 6)
        for i, (output, value) in enumerate(zip(outputs, code.operands(count + 6, count), strict=True)):
            code.add(f"mov.{'f32' if i < 4 else 'b32'} {output}, {value}")
        code.add(f"setp.ge.s32 {code.new('p')}, {inside}, 0")
        code.add("@p1 bra.uni SEEN")

        def seen(token: str) -> str:
            above, both = code.new("p"), code.new("p")
            code.add(f"setp.ge.s32 {above}, {token}, {low}")
            code.add(f"setp.lt.and.s32 {both}, {token}, {high}, {above}")
            return both

        first = code.do("add.s32", start, row)
        for i, token in enumerate((first, code.do("add.s32", first, "1"))):
            for score in outputs[2 * i : 2 * i + 2]:
                code.add(f"selp.f32 {score}, {score}, 0fFF800000, {seen(token)}")
        if not numbers or scheme == "e4m3":
            first = code.do("add.s32", start, column)
            for i, offset in enumerate((0, 2, 1, 3)):
                predicate = seen(code.do("add.s32", first, str(offset)))
                for word in outputs[4 + i * words : 4 + (i + 1) * words]:
                    code.add(f"selp.b32 {word}, {word}, 0, {predicate}")
        if numbers:
            first = code.do("add.s32", start, row)
            halves = [code.new(), code.new()]
            for half, token, bits in zip(halves, ("0", "1"), ("0xffff", "0xffff0000"), strict=True):
                code.add(f"selp.b32 {half}, {bits}, 0, {seen(code.do('add.s32', first, token))}")
            kept = code.do("or.b32", *halves)
            for number in outputs[4 + 4 * words :]:
                code.add(f"and.b32 {number}, {number}, {kept}")
        code.lines.append("SEEN:")
        return code.text()

    @staticmethod
    def leave_share(dim: int) -> str:
        """m, l and sums of both heads -> shared memory, in pieces of 16 bytes. Inputs: the lane's shared
        address, 16 bytes from the next one's; m, m, l, l; and the sums in the order of the state. One output,
        for form's sake."""
        code, words = _Code(), share_words(dim)
        m, l, sums = code.operands(2, 2), code.operands(4, 2), code.operands(6, dim // 4)
        for head, values in enumerate(by_head(sums)):
            numbers = [m[head], l[head], *values]
            numbers += [code.float(0.0)] * (words - len(numbers))
            for i in range(0, words, 4):
                group = ", ".join(numbers[i : i + 4])
                code.add(f"st.shared.v4.f32 [$1+{128 * (words * head + i)}], {{{group}}}")
        code.add("mov.b32 $0, 0")
        return code.text()

    @staticmethod
    def load_share(dim: int) -> str:
        """What `leave_share` has left of one head: m, l, sums in the order of dims. Input: the shared address
        of the lane and the head."""
        code, words = _Code(), share_words(dim)
        count = 2 + dim // 8
        values = [*code.operands(0, count), *(code.new("f") for _ in range(words - count))]
        for i in range(0, words, 4):
            group = ", ".join(values[i : i + 4])
            code.add(f"ld.shared.v4.f32 {{{group}}}, [${count}+{128 * i}]")
        return code.text()

    @staticmethod
    def load_maximum() -> str:
        """m of what `leave_share` has left. Input: the shared address of the lane and the head."""
        return "{\n.reg .f32 f<4>;\nld.shared.v4.f32 {$0, f1, f2, f3}, [$1];\n}"

    @staticmethod
    def meet(team: int) -> str:
        """Until all warps of a team have left their shares; all but its first two then end. Inputs: the
        team's number and the warp's in it; one output, for form's sake."""
        code = _Code()
        code.add(f"bar.sync $1, {32 * team}")
        code.add(f"setp.gt.s32 {code.new('p')}, $2, 1")
        code.add("@p1 exit")
        code.add("mov.b32 $0, 0")
        return code.text()

    @staticmethod
    def store_sums(dim: int, heads: int, apart: bool) -> str:
        """Sums of one or two heads -> memory. Inputs: for each head the 64-bit address at the lane's first
        dim, then whether each exists, then the sums: of two heads in the order of the state, of one in the
        order of dims. The second half of the lane's dims follows the first, or lies `apart`, 64 further on.
        One output, for form's sake."""
        code = _Code()
        pointers, exist = code.operands(1, heads), code.operands(1 + heads, heads)
        sums = code.operands(1 + 2 * heads, heads * dim // 8)
        of_heads = by_head(sums) if heads == 2 else (sums,)
        for pointer, exists, values in zip(pointers, exist, of_heads, strict=True):
            predicate = code.guard(exists)
            for i in range(0, len(values), 4):
                group = ", ".join(values[i : i + 4])
                code.add(f"@{predicate} st.global.v4.f32 [{pointer}+{4 * place(i, dim, apart)}], {{{group}}}")
        code.add("mov.b32 $0, 0")
        return code.text()

    @staticmethod
    def store_output(dim: int, heads: int, apart: bool, rotated: bool, dtype: str) -> str:
        """The same as `store_sums` in `dtype`, after √D · H where `rotated`; the first input is the lane.

        Without a branch between two heads the one's exchanges hide behind the other's.
        """
        code = _Code()
        lane, pointers = "$1", code.operands(2, heads)
        exist = [code.guard(x) for x in code.operands(2 + heads, heads)]
        sums = code.operands(2 + 2 * heads, heads * dim // 8)
        of_heads = by_head(sums) if heads == 2 else (sums,)

        def store(chosen: Iterable[int]) -> None:
            for head in chosen:
                values = of_heads[head]
                if rotated:
                    values = code.butterflies(
                        list(values), (1 << i for i in range(len(values).bit_length() - 1))
                    )
                    values = code.butterflies_of_lanes(values, lane, (4, 8, 16))
                pairs = [
                    code.do(f"cvt.rn.{'bf' if dtype == 'bf16' else 'f'}16x2.f32", values[i + 1], values[i])
                    for i in range(0, len(values), 2)
                ]
                for i in range(0, len(pairs), 4):
                    group, at = ", ".join(pairs[i : i + 4]), 2 * place(2 * i, dim, apart)
                    code.add(f"@{exist[head]} st.global.v4.b32 [{pointers[head]}+{at}], {{{group}}}")

        if heads == 2:
            two = code.new("p")
            code.add(f"vote.sync.any.pred {two}, {exist[1]}, 0xffffffff")
            code.add(f"@!{two} bra.uni ONE")
            store((0, 1))
            code.add("bra.uni STORED")
            code.lines.append("ONE:")
        store((0,))
        if heads == 2:
            code.lines.append("STORED:")
        code.add("mov.b32 $0, 0")
        return code.text()

    @staticmethod
    def warp() -> str:
        """The number of the warp in its program; the input is unused. By an exchange, so that ptxas knows it
        for the same in all lanes."""
        code = _Code()
        number = code.do("shr.u32", code.do("mov.u32", "%tid.x"), "5")
        code.add(f"shfl.sync.idx.b32 $0, {number}, 0, 0x1f, 0xffffffff")
        return code.text()

    @staticmethod
    def held_constants(scheme: str) -> str:
        """Lower halves of look-up tables, which `prmt` takes from a register alone; then four ones for
        turbo-whole, -1 for lm4. The input is unused.

        ptxas must not know them for constants, or it moves them anew each time: 1, the number of lanes that
        equal this one, is added on the way.
        """
        code = _Code()
        one = code.do("popc.b32", code.do("mov.u32", "%lanemask_eq"))
        numbers = [int(code.table(levels)[0], 16) for levels in key_tables(scheme)]
        numbers += {"turbo-whole": [0x01010101], "lm4": [-1]}.get(scheme, [])
        for i, number in enumerate(numbers):
            code.add(f"add.s32 ${i}, {one}, {number - 1}")
        return code.text()

    @staticmethod
    def half_to_float(upper: bool) -> str:
        """One of the two fp16 numbers of a register."""
        code = _Code()
        code.new("h"), code.new("h")
        code.add("mov.b32 {h1, h2}, $1")
        code.add(f"cvt.f32.f16 $0, h{1 + upper}")
        return code.text()

    @staticmethod
    def sum_over_groups() -> str:
        """The sum of a number over the 8 lanes that share t."""
        code = _Code()
        total = code.reduce("add.f32", "$1", (4, 8, 16), "f")
        code.add(f"mov.f32 $0, {total}")
        return code.text()


@triton.constexpr_function
def shared_memory() -> str:
    return _Blocks().shared_memory()


@triton.constexpr_function
def address() -> str:
    return _Blocks().address()


@triton.constexpr_function
def copy(key: str, value: str, dim: int, tokens: int, first: int, steps: int) -> str:
    return _Blocks().copy(key, value, dim, tokens, first, steps)


@triton.constexpr_function
def wait(groups: int) -> str:
    return _Blocks().wait(groups)


@triton.constexpr_function
def all_read() -> str:
    return _Blocks().all_read()


@triton.constexpr_function
def load_keys(scheme: str, dim: int, step: int, tokens: int) -> str:
    return _Blocks().load_keys(scheme, dim, step, tokens)


@triton.constexpr_function
def load_values(scheme: str, dim: int, step: int, tokens: int) -> str:
    return _Blocks().load_values(scheme, dim, step, tokens)


@triton.constexpr_function
def zero_after_copies() -> str:
    return _Blocks().zero_after_copies()


@triton.constexpr_function
def load_query(scheme: str, dim: int) -> str:
    return _Blocks().load_query(scheme, dim)


@triton.constexpr_function
def prepare_query(scheme: str, dim: int, rotated: bool, dtype: str) -> str:
    return _Blocks().prepare_query(scheme, dim, rotated, dtype)


@triton.constexpr_function
def scores(scheme: str, dim: int) -> str:
    return _Blocks().scores(scheme, dim)


@triton.constexpr_function
def weigh(scheme: str, dim: int) -> str:
    return _Blocks().weigh(scheme, dim)


@triton.constexpr_function
def mask(scheme: str, dim: int) -> str:
    return _Blocks().mask(scheme, dim)


@triton.constexpr_function
def leave_share(dim: int) -> str:
    return _Blocks().leave_share(dim)


@triton.constexpr_function
def load_share(dim: int) -> str:
    return _Blocks().load_share(dim)


@triton.constexpr_function
def load_maximum() -> str:
    return _Blocks().load_maximum()


@triton.constexpr_function
def meet(team: int) -> str:
    return _Blocks().meet(team)


@triton.constexpr_function
def store_sums(dim: int, heads: int, apart: bool) -> str:
    return _Blocks().store_sums(dim, heads, apart)


@triton.constexpr_function
def store_output(dim: int, heads: int, apart: bool, rotated: bool, dtype: str) -> str:
    return _Blocks().store_output(dim, heads, apart, rotated, dtype)


@triton.constexpr_function
def warp() -> str:
    return _Blocks().warp()


@triton.constexpr_function
def held_constants(scheme: str) -> str:
    return _Blocks().held_constants(scheme)


@triton.constexpr_function
def half_to_float(upper: bool) -> str:
    return _Blocks().half_to_float(upper)


@triton.constexpr_function
def sum_over_groups() -> str:
    return _Blocks().sum_over_groups()
