"""Every primitive of ptx.cuh and every CUDA intrinsic that kernels use, against models written from the manuals.

The models know nothing of the simulator; on a machine with a GPU the same tests hold the hardware to them, which
is what makes the simulator's word worth something. Data movement and integers bit for bit, floats to rounding.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from tests.sim import conformance

pytestmark = pytest.mark.parametrize(
    "backend",
    [
        "sim",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    ],
)

FULL = 0xFFFFFFFF
tested: set[str] = set()


def run(backend: str, name: str, out: np.ndarray, **arguments) -> np.ndarray:
    tested.add(name)
    return conformance.run(backend, name, out, **arguments)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.name.replace("cuda", "sim").encode()))


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


# ---- asynchronous copies and shared memory ----------------------------------------------------------------------


def test_grid_dependency(backend: str, rng: np.random.Generator) -> None:
    count, rounds = 64 * 32, 500
    a = words(rng, count)
    want = a
    for _ in range(rounds):
        want = want * np.uint32(1664525) + np.uint32(1013904223)
    out = run(
        backend,
        "grid_dependency",
        np.zeros(2 * count, np.uint32),
        a=a,
        n=count,
        argument=rounds,
        grid=(64, 1, 1),
    )
    np.testing.assert_array_equal(out, np.concatenate([want, want[::-1] + np.uint32(1)]))


@pytest.mark.parametrize("size", [16, 4])
def test_cp_async(backend: str, rng: np.random.Generator, size: int) -> None:
    chunks = 2 * 64 * 3
    a = words(rng, chunks, size // 4)
    valid = rng.integers(0, 2, chunks, dtype=np.int32)
    out = run(
        backend, f"cp_async_{size}", np.full_like(a, 77), a=a, b=valid, grid=(3, 1, 1), block=(64, 1, 1)
    )
    np.testing.assert_array_equal(out, a * valid[:, None].astype(np.uint32))


def test_load_streaming(backend: str, rng: np.random.Generator) -> None:
    a = words(rng, 100, 4)
    out = run(backend, "load_streaming_16", np.zeros_like(a), a=a, n=100, grid=(4, 1, 1))
    np.testing.assert_array_equal(out, a)


@pytest.mark.parametrize("threads", [128, 1024])
def test_shared_memory(backend: str, rng: np.random.Generator, threads: int) -> None:
    a = words(rng, 3, threads)
    out = run(backend, "shared_memory", np.zeros_like(a), a=a, grid=(3, 1, 1), block=(threads, 1, 1))
    np.testing.assert_array_equal(out, a[:, ::-1])


def test_named_barriers(backend: str, rng: np.random.Generator) -> None:
    a = words(rng, 20, 32)
    out = run(backend, "named_barriers", np.zeros_like(a), a=a, n=20, block=(64, 1, 1))
    np.testing.assert_array_equal(out, a[:, ::-1])


def test_indices(backend: str) -> None:
    grid, block = (3, 4, 2), (5, 3, 4)
    blocks, threads = int(np.prod(grid)), int(np.prod(block))
    out = run(backend, "indices", np.zeros((blocks, threads, 12), np.uint32), grid=grid, block=block)
    for b in range(blocks):
        for t in range(threads):
            thread = (t % 5, t // 5 % 3, t // 15)
            index = (b % 3, b // 3 % 4, b // 12)
            assert tuple(out[b, t]) == (*thread, *index, *block, *grid)


# ---- matrices: the fragment layouts, as the PTX ISA states them ---------------------------------------------------


@pytest.mark.parametrize("matrices", [4, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(backend: str, rng: np.random.Generator, matrices: int, transposed: bool) -> None:
    rows = rng.integers(0, 2**16, (32, 8), dtype=np.uint16)
    named = rng.permutation(32).astype(np.int32)
    name = f"ldmatrix_x{matrices}" + ("_trans" if transposed else "")
    out = run(backend, name, np.zeros((32, matrices), np.uint32), a=rows, b=named)
    for matrix in range(matrices):
        elements = rows[named[matrix * 8 : matrix * 8 + 8]].astype(np.uint32)
        if transposed:
            elements = elements.T
        for lane in range(32):
            low, high = elements[lane // 4, lane % 4 * 2], elements[lane // 4, lane % 4 * 2 + 1]
            assert out[lane, matrix] == low | high << 16


def places_16_bit(k: int) -> tuple[list, list]:
    """(row, column) of element i of lane l, for A (m16 x k) and B (k x n8)."""
    a, b = [], []
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        a_row, b_row = [], []
        for i in range(k // 2):
            if k == 16:
                row = group if i < 2 or 4 <= i < 6 else group + 8
                column = in_group * 2 + (i & 1) + (0 if i < 4 else 8)
            else:
                row = group if i < 2 else group + 8
                column = in_group * 2 + (i & 1)
            a_row.append((row, column))
        for i in range(k // 4):
            b_row.append((in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group))
        a.append(a_row)
        b.append(b_row)
    return a, b


def places_8_bit(k: int) -> tuple[list, list]:
    a, b = [], []
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        a_row, b_row = [], []
        for i in range(k // 2):
            if k == 32:
                row = group if i < 4 or 8 <= i < 12 else group + 8
                column = in_group * 4 + (i & 3) + (0 if i < 8 else 16)
            else:
                row = group if i < 4 else group + 8
                column = in_group * 4 + (i & 3)
            a_row.append((row, column))
        for i in range(k // 4):
            b_row.append((in_group * 4 + (i & 3) + (16 if i >= 4 else 0), group))
        a.append(a_row)
        b.append(b_row)
    return a, b


def places_of_result() -> list:
    return [
        [(lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)) for i in range(4)] for lane in range(32)
    ]


def gather(matrix: np.ndarray, places: list) -> np.ndarray:
    return np.array([[matrix[place] for place in lane] for lane in places])


def bits_16(values: np.ndarray, kind: str) -> np.ndarray:
    """Values that the type represents exactly, as its bits."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    return torch.tensor(values).to(dtype).view(torch.int16).numpy().astype(np.uint16)


@pytest.mark.parametrize("kind", ["bf16", "half"])
@pytest.mark.parametrize("k", [16, 8])
@pytest.mark.parametrize("data", ["normal", "integers"])
def test_mma_16_bit(backend: str, rng: np.random.Generator, kind: str, k: int, data: str) -> None:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    blocks, places_c = 5, places_of_result()
    places_a, places_b = places_16_bit(k)
    shapes = (blocks, 16, k), (blocks, k, 8), (blocks, 16, 8)
    if data == "integers":
        a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in shapes)
    else:
        a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        a, b = (torch.tensor(x).to(dtype).float().numpy() for x in (a, b))
    registers = [
        np.stack([gather(m, p) for m in x]) for x, p in ((a, places_a), (b, places_b), (c, places_c))
    ]
    out = run(
        backend,
        f"mma_m16n8k{k}_{kind}",
        np.zeros((blocks, 32, 4), np.float32),
        a=bits_16(registers[0], kind),
        b=bits_16(registers[1], kind),
        c=registers[2].astype(np.float32),
        grid=(blocks, 1, 1),
    )
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    expected = np.stack([gather(m, places_c) for m in exact])
    if data == "integers":
        np.testing.assert_array_equal(out, expected)
    else:
        size = np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(c)
        # The hardware truncates while it sums.
        bound = np.stack([gather(m, places_c) for m in size]) * 2.0**-20
        assert (np.abs(out - expected) <= bound).all()


@pytest.mark.parametrize("kind", ["s8", "u8"])
@pytest.mark.parametrize("k", [32, 16])
def test_mma_8_bit(backend: str, rng: np.random.Generator, kind: str, k: int) -> None:
    blocks, places_c = 5, places_of_result()
    places_a, places_b = places_8_bit(k)
    low, high, dtype = (-128, 128, np.int8) if kind == "s8" else (0, 256, np.uint8)
    a = rng.integers(low, high, (blocks, 16, k))
    b = rng.integers(-128, 128, (blocks, k, 8))
    c = rng.integers(-(2**20), 2**20, (blocks, 16, 8))
    out = run(
        backend,
        f"mma_m16n8k{k}_{kind}",
        np.zeros((blocks, 32, 4), np.int32),
        a=np.stack([gather(m, places_a) for m in a]).astype(dtype),
        b=np.stack([gather(m, places_b) for m in b]).astype(np.int8),
        c=np.stack([gather(m, places_c) for m in c]).astype(np.int32),
        grid=(blocks, 1, 1),
    )
    np.testing.assert_array_equal(out, np.stack([gather(m, places_c) for m in a @ b + c]))


# ---- lanes together ---------------------------------------------------------------------------------------------

SHUFFLE_TYPES = {"u32": np.uint32, "f32": np.float32, "u64": np.uint64}


@pytest.mark.parametrize("kind", ["index", "up", "down", "xor"])
@pytest.mark.parametrize("dtype", list(SHUFFLE_TYPES))
@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffle(backend: str, rng: np.random.Generator, kind: str, dtype: str, width: int) -> None:
    warps = 6
    a = rng.integers(0, 2**31, (warps, 32)).astype(SHUFFLE_TYPES[dtype])
    # Each lane may ask for what it likes, except that a source must be a lane that takes part.
    argument = rng.integers(0, 40 if kind == "index" else 32, (warps, 32)).astype(np.int32)
    out = run(
        backend,
        f"shuffle_{kind}_{dtype}",
        np.zeros_like(a),
        a=a,
        b=argument,
        argument=width,
        grid=(2, 1, 1),
        block=(96, 1, 1),
    )
    for warp in range(warps):
        for lane in range(32):
            first, by = lane // width * width, int(argument[warp, lane])
            source = {"index": first + by % width, "up": lane - by, "down": lane + by, "xor": lane ^ by}[kind]
            inside = {
                "index": True,
                "up": source >= first,
                "down": source < first + width,
                "xor": source < first + width,  # earlier groups may be read, later ones not
            }[kind]
            assert out[warp, lane] == a[warp, source if inside else lane]


@pytest.mark.parametrize("mask", [0x0000FFFF, 0xFFFF0000])
def test_shuffle_of_half_a_warp(backend: str, rng: np.random.Generator, mask: int) -> None:
    a = words(rng, 32)
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    argument = rng.integers(0, 16, 32, dtype=np.int32)
    out = run(backend, "shuffle_index_u32", np.zeros_like(a), a=a, b=argument, argument=16, mask=mask)
    for lane in range(32):
        expected = a[lane // 16 * 16 + argument[lane]] if lane in lanes else 0
        assert out[lane] == expected


MASKS = [FULL, 0x0000FFFF, 0x80000001, 0x5A5A0FF0]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_vote(backend: str, rng: np.random.Generator, mask: int, share: float) -> None:
    a = (rng.random((3, 32)) < share).astype(np.int32) * 7
    out = run(backend, "vote", np.zeros((3, 32, 3), np.uint32), a=a, mask=mask, grid=(3, 1, 1))
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    for warp in range(3):
        ballot = sum(1 << lane for lane in lanes if a[warp, lane])
        for lane in range(32):
            expected = (ballot, ballot == mask, ballot != 0) if lane in lanes else (0, 0, 0)
            assert tuple(out[warp, lane]) == expected


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("values", [1, 3, 1000])
@pytest.mark.parametrize("dtype", ["u32", "u64"])
def test_match(backend: str, rng: np.random.Generator, mask: int, values: int, dtype: str) -> None:
    a = rng.integers(0, values, (3, 32)).astype(np.uint32 if dtype == "u32" else np.uint64)
    if dtype == "u64":
        a <<= np.uint64(32)  # the high half counts too
    out = run(backend, f"match_{dtype}", np.zeros((3, 32, 3), np.uint32), a=a, mask=mask, grid=(3, 1, 1))
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    for warp in range(3):
        agreed = len({int(a[warp, lane]) for lane in lanes}) == 1
        for lane in lanes:
            equal = sum(1 << other for other in lanes if a[warp, other] == a[warp, lane])
            assert tuple(out[warp, lane]) == (equal, mask if agreed else 0, agreed)


@pytest.mark.parametrize("mask", MASKS)
def test_reduce(backend: str, rng: np.random.Generator, mask: int) -> None:
    a = words(rng, 3, 32)
    out = run(backend, "reduce", np.zeros((3, 32, 9), np.uint32), a=a, mask=mask, grid=(3, 1, 1))
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    for warp in range(3):
        u = [int(x) for x in a[warp, lanes]]
        s = [x - 2**32 if x >= 2**31 else x for x in u]
        expected = [sum(u), min(u), max(u), sum(s), min(s), max(s)]
        expected += [np.bitwise_and.reduce(u), np.bitwise_or.reduce(u), np.bitwise_xor.reduce(u)]
        for lane in lanes:
            assert [int(x) for x in out[warp, lane]] == [int(x) % 2**32 for x in expected]


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_block_vote(backend: str, rng: np.random.Generator, share: float) -> None:
    a = (rng.random((2, 96)) < share).astype(np.int32) * 3
    out = run(backend, "block_vote", np.zeros((2, 96, 3), np.int32), a=a, grid=(2, 1, 1), block=(96, 1, 1))
    for block in range(2):
        count = int((a[block] != 0).sum())
        assert (out[block] == np.array([count, count == 96, count > 0])).all()


# ---- atomics ------------------------------------------------------------------------------------------------------

ATOMIC_TYPES = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "f32": np.float32}
APPLY = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
}
ATOMICS = [(op, dtype) for op in APPLY for dtype in ("u32", "s32", "u64")] + [("add", "f32")]


def run_atomic(
    backend: str, op: str, dtype: str, a: np.ndarray, cells: np.ndarray, start: np.ndarray
) -> tuple:
    kind, n = ATOMIC_TYPES[dtype], len(a)
    out = np.concatenate([start, np.zeros(n)]).astype(kind)
    out = run(
        backend,
        f"atomic_{op}_{dtype}",
        out,
        a=a.astype(kind),
        b=cells.astype(np.int32),
        n=n,
        argument=len(start),
        grid=((n + 63) // 64, 1, 1),
        block=(64, 1, 1),
    )
    return [x.item() for x in out[: len(start)]], [x.item() for x in out[len(start) :]]


@pytest.mark.parametrize(("op", "dtype"), ATOMICS)
def test_atomic(backend: str, rng: np.random.Generator, op: str, dtype: str) -> None:
    a, cells, start = rng.integers(1, 1000, 150), rng.integers(0, 4, 150), rng.integers(1, 1000, 4)
    final, old = run_atomic(backend, op, dtype, a, cells, start)
    for cell in range(4):
        mine = [i for i in range(150) if cells[i] == cell]
        expected = start[cell].item()
        for i in mine:
            expected = APPLY[op](expected, a[i].item())
        assert final[cell] == expected
        # In some order, each saw what its predecessor left: the values seen, with the last one, are a chain.
        left = [APPLY[op](old[i], a[i].item()) for i in mine]
        assert sorted([start[cell].item(), *left]) == sorted([expected, *(old[i] for i in mine)])


@pytest.mark.parametrize("dtype", ["u32", "s32", "u64"])
def test_atomic_exchange(backend: str, rng: np.random.Generator, dtype: str) -> None:
    a, cells = rng.permutation(1000)[:150] + 1, rng.integers(0, 4, 150)
    final, old = run_atomic(backend, "exchange", dtype, a, cells, np.zeros(4))
    for cell in range(4):
        values = sorted([0, *(a[i].item() for i in range(150) if cells[i] == cell)])
        seen = sorted([final[cell], *(old[i] for i in range(150) if cells[i] == cell)])
        assert values == seen


@pytest.mark.parametrize("dtype", ["u32", "s32", "u64"])
def test_atomic_compare_exchange(backend: str, rng: np.random.Generator, dtype: str) -> None:
    a, cells = rng.permutation(1000)[:150] + 1, rng.integers(0, 4, 150)
    final, old = run_atomic(backend, "compare_exchange", dtype, a, cells, np.array([0, 0, 0, 7]))
    assert final[3] == 7
    for cell in range(3):
        winners = [a[i].item() for i in range(150) if cells[i] == cell and old[i] == 0]
        assert winners == [final[cell]]
        assert all(old[i] in (0, final[cell]) for i in range(150) if cells[i] == cell)


@pytest.mark.parametrize("op", ["increment", "decrement"])
def test_atomic_wrapping(backend: str, op: str) -> None:
    start, limit, n = 5, 8, 100
    final, old = run_atomic(backend, op, "u32", np.full(n, limit), np.zeros(n), np.array([start]))
    state, seen = start, []
    for _ in range(n):
        seen.append(state)
        if op == "increment":
            state = 0 if state >= limit else state + 1
        else:
            state = limit if state == 0 or state > limit else state - 1
    assert final == [state]
    assert sorted(old) == sorted(seen)


# ---- element by element -------------------------------------------------------------------------------------------


def run_map(backend: str, name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    n = len(a)
    return run(
        backend,
        name,
        np.zeros(n, np.uint32),
        a=a,
        b=b,
        c=c,
        n=n,
        grid=((n + 127) // 128, 1, 1),
        block=(128, 1, 1),
    )


def signed(x: int, bits: int = 32) -> int:
    return x - 2**bits if x >= 2 ** (bits - 1) else x


def byte_perm(a: int, b: int, selector: int) -> int:
    data, result = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        s = selector >> 4 * i & 15
        byte = data[s & 7]
        if s & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * i
    return result


def dp4a(a: int, b: int, c: int, sign: bool) -> int:
    total = c
    for i in range(4):
        x, y = a >> 8 * i & 255, b >> 8 * i & 255
        total += signed(x, 8) * signed(y, 8) if sign else x * y
    return total


INTEGER_MAPS = {
    "popc": lambda a, b, c: a.bit_count(),
    "popcll": lambda a, b, c: (b << 32 | a).bit_count(),
    "ffs": lambda a, b, c: (a & -a).bit_length(),
    "ffsll": lambda a, b, c: ((b << 32 | a) & -(b << 32 | a)).bit_length(),
    "clz": lambda a, b, c: 32 - a.bit_length(),
    "clzll": lambda a, b, c: 64 - (b << 32 | a).bit_length(),
    "brev": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "byte_perm": byte_perm,
    "funnel_l": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "funnel_r": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "umulhi": lambda a, b, c: a * b >> 32,
    "mulhi": lambda a, b, c: signed(a) * signed(b) >> 32,
    "dp4a_s": lambda a, b, c: dp4a(a, b, c, True),
    "dp4a_u": lambda a, b, c: dp4a(a, b, c, False),
    "min_s": lambda a, b, c: min(signed(a), signed(b)),
    "max_u": lambda a, b, c: max(a, b),
}


@pytest.mark.parametrize("name", list(INTEGER_MAPS))
def test_integer_map(backend: str, rng: np.random.Generator, name: str) -> None:
    a, b, c = words(rng, 3, 600) >> rng.integers(0, 32, (3, 600), dtype=np.uint32)
    a[:3], b[:3] = (0, 1, 2**32 - 1), (0, 2**31, 2**32 - 1)
    out = run_map(backend, name, a, b, c)
    expected = [INTEGER_MAPS[name](int(x), int(y), int(z)) % 2**32 for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(out, np.array(expected, np.uint32))


def floats(rng: np.random.Generator, n: int) -> np.ndarray:
    """Of all sizes, with the special ones in front."""
    x = (words(rng, n)).view(np.float32)
    x = np.where(np.isfinite(x), x, 1.5).astype(np.float32)
    x[: n // 2] = rng.standard_normal(n // 2) * np.exp2(rng.integers(-20, 20, n // 2))
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        3e9,
        -3e9,
        65504,
        65519,
        65520,
    ]
    special += [448, 464, 465, 1e-8, 6e-8, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 1e-40, -1e-42, 3.4e38]
    x[: len(special)] = special
    return x


def same_floats(out: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, but any NaN is as good as another."""
    expected = expected.astype(np.float32)
    assert (np.isnan(out) == np.isnan(expected)).all()
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(out[number].view(np.uint32), expected[number].view(np.uint32))


@pytest.mark.parametrize(
    "name", ["min_f", "max_f", "saturate", "to_int_rn", "to_int_rz", "to_int_rd", "to_int_ru"]
)
def test_float_map(backend: str, rng: np.random.Generator, name: str) -> None:
    a, b = floats(rng, 800), rng.permutation(floats(rng, 800))
    keep = ~((a == 0) & (b == 0))  # which of two zeros is the smaller is nobody's business
    a, b = a[keep], b[keep]
    out = run_map(backend, name, a, b, b)
    if name in ("min_f", "max_f"):
        same_floats(out.view(np.float32), (np.fmin if name == "min_f" else np.fmax)(a, b))
    elif name == "saturate":
        result = out.view(np.float32)
        np.testing.assert_array_equal(result, np.where(np.isnan(a), 0, np.clip(a, 0, 1)))
    else:
        rounding = {"rn": np.rint, "rz": np.trunc, "rd": np.floor, "ru": np.ceil}[name[-2:]]
        expected = np.clip(rounding(np.nan_to_num(a.astype(np.float64), nan=0.0)), -(2**31), 2**31 - 1)
        np.testing.assert_array_equal(out.view(np.int32), expected.astype(np.int64))


def test_fma(backend: str, rng: np.random.Generator) -> None:
    a, b, c = (rng.standard_normal(2000).astype(np.float32) for _ in range(3))
    c[:1000] = -(a[:1000] * b[:1000])  # what is left is the product's rounding error
    out = run_map(backend, "fma", a, b, c).view(np.float32)
    # The product is exact in double; adding to it rounds once there and once to float, so allow the half ulp.
    exact = a.astype(np.float64) * b + c
    assert (np.abs(out - exact) <= np.abs(exact) * 2.0**-24 * 1.0001).all()


def test_exp2_approx(backend: str, rng: np.random.Generator) -> None:
    a = np.concatenate([rng.uniform(-125, 127, 5000), [0.0, -0.0, 1, -1, 10]]).astype(np.float32)
    out = run_map(backend, "exp2_approx", a, a, a).view(np.float32)
    exact = np.exp2(a.astype(np.float64))
    assert (np.abs(out - exact) <= exact * 2.0**-22).all()
    np.testing.assert_array_equal(out[-5:], [1, 1, 2, 0.5, 1024])
    a = np.array([-np.inf, np.inf, np.nan, -127, -140, -1000, 128, 1000, 1e-40], np.float32)
    out = run_map(backend, "exp2_approx", a, a, a).view(np.float32)
    same_floats(out, np.array([0, np.inf, np.nan, 0, 0, 0, np.inf, np.inf, 1], np.float32))


def test_log2_approx(backend: str, rng: np.random.Generator) -> None:
    a = np.exp2(rng.uniform(-125, 127, 5000)).astype(np.float32)
    a[:1000] = rng.uniform(0.5, 2, 1000)
    out = run_map(backend, "log2_approx", a, a, a).view(np.float32)
    exact = np.log2(a.astype(np.float64))
    assert (np.abs(out - exact) <= 2.0**-21 + np.abs(exact) * 2.0**-22).all()
    a = np.array([0, -0.0, np.inf, -1, np.nan, 1e-40, 1, 8], np.float32)
    out = run_map(backend, "log2_approx", a, a, a).view(np.float32)
    same_floats(out, np.array([-np.inf, -np.inf, np.inf, np.nan, np.nan, -np.inf, 0, 3], np.float32))


def test_reciprocal_approx(backend: str, rng: np.random.Generator) -> None:
    a = np.exp2(rng.uniform(-125, 125, 5000)).astype(np.float32)
    a[::2] *= -1
    out = run_map(backend, "reciprocal_approx", a, a, a).view(np.float32)
    exact = 1 / a.astype(np.float64)
    assert (np.abs(out - exact) <= np.abs(exact) * 2.0**-23).all()
    a = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 1, -4], np.float32)
    out = run_map(backend, "reciprocal_approx", a, a, a).view(np.float32)
    same_floats(out, np.array([np.inf, -np.inf, 0, -0.0, np.nan, np.inf, 1, -0.25], np.float32))


def test_mul(backend: str, rng: np.random.Generator) -> None:
    a, b = floats(rng, 3000), rng.permutation(floats(rng, 3000))
    with np.errstate(all="ignore"):
        same_floats(run_map(backend, "mul", a, b, a).view(np.float32), a * b)


def test_opaque(backend: str, rng: np.random.Generator) -> None:
    a = words(rng, 3000)
    np.testing.assert_array_equal(run_map(backend, "opaque", a, a, a), a)


TORCH_16 = {"half": torch.float16, "bf16": torch.bfloat16}


def rounded(x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The bits after rounding to a 16-bit type, and which are NaN."""
    y = torch.tensor(x).to(dtype)
    return y.view(torch.int16).numpy().astype(np.uint16), y.isnan().numpy()


@pytest.mark.parametrize("kind", list(TORCH_16))
def test_pack(backend: str, rng: np.random.Generator, kind: str) -> None:
    a, b = floats(rng, 3000), rng.permutation(floats(rng, 3000))
    out = run_map(backend, f"pack_{kind}", a, b, a)
    for half, source in ((out & 0xFFFF, a), (out >> 16, b)):
        expected, nan = rounded(source, TORCH_16[kind])
        np.testing.assert_array_equal(half[~nan], expected[~nan])
        assert (half[nan] == 0x7FFF).all()


@pytest.mark.parametrize("kind", list(TORCH_16))
def test_from_float(backend: str, rng: np.random.Generator, kind: str) -> None:
    a = floats(rng, 5000)
    out = run_map(backend, f"float_to_{kind}", a, a, a)
    expected, nan = rounded(a, TORCH_16[kind])
    np.testing.assert_array_equal(out[~nan], expected[~nan])
    assert (out[nan] == 0x7FFF).all()


@pytest.mark.parametrize("kind", list(TORCH_16))
def test_to_float(backend: str, kind: str) -> None:
    a = np.arange(2**16, dtype=np.uint32)
    out = run_map(backend, f"{kind}_to_float", a, a, a).view(np.float32)
    bits = torch.from_numpy(a.astype(np.uint16).view(np.int16))
    same_floats(out, bits.view(TORCH_16[kind]).float().numpy())


def test_e4m3(backend: str, rng: np.random.Generator) -> None:
    a = np.arange(256, dtype=np.uint32)
    out = run_map(backend, "e4m3_to_float", a, a, a).view(np.float32)
    values = torch.from_numpy(a.astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    same_floats(out, values)
    x = np.concatenate([floats(rng, 3000), rng.uniform(-500, 500, 3000), rng.uniform(-0.05, 0.05, 3000)])
    x = x.astype(np.float32)
    out = run_map(backend, "float_to_e4m3", x, x, x)
    nan = np.isnan(x)
    assert ((out[nan] & 0x7F) == 0x7F).all()
    expected = torch.tensor(np.clip(x[~nan], -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(out[~nan], expected)


# ---- nothing forgotten --------------------------------------------------------------------------------------------


def test_every_primitive_was_tested(backend: str, request: pytest.FixtureRequest) -> None:
    """Runs last in this file; meaningful when the whole file has run."""
    missing = set(conformance.names(backend)) - tested
    if missing and (request.config.option.keyword or "::" in " ".join(request.config.args)):
        pytest.skip("only a part of the file was asked for")
    assert not missing
