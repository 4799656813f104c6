"""Calls one primitive of csrc/sim/conformance.cu on a backend."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from tests.sim.simulator import load, runtime


class Params(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("n", ctypes.c_int32),
        ("argument", ctypes.c_int32),
        ("mask", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
    ]


@functools.cache
def library(backend: str) -> ctypes.CDLL:
    found = load(f"tranche_conformance_{backend}")
    found.tranche_conformance.restype = ctypes.c_char_p
    found.tranche_conformance_names.restype = ctypes.c_char_p
    return found


def names(backend: str) -> list[str]:
    return library(backend).tranche_conformance_names().decode().split()


def tensor(array: np.ndarray | None, device: str) -> torch.Tensor:
    """The bytes of an array, 16-byte aligned, on a device."""
    data = b"" if array is None else np.ascontiguousarray(array).tobytes()
    return torch.frombuffer(bytearray(data) or bytearray(16), dtype=torch.uint8).clone().to(device)


def run(
    backend: str,
    name: str,
    out: np.ndarray,
    *,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    c: np.ndarray | None = None,
    n: int = 0,
    argument: int = 0,
    mask: int = 0xFFFFFFFF,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
) -> np.ndarray:
    """Runs the primitive and returns what `out` has become. Raises what the launch reports."""
    device = "cuda" if backend == "cuda" else "cpu"
    tensors = [tensor(x, device) for x in (a, b, c, out)]
    params = Params(
        *[t.data_ptr() for t in tensors],
        n,
        argument,
        mask,
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*block),
    )
    call = functools.partial(library(backend).tranche_conformance, name.encode(), ctypes.byref(params))
    if backend == "sim":
        with runtime().buffers(*tensors):
            error = call()
    else:
        torch.cuda.synchronize()
        error = call()
    if error:
        raise RuntimeError(error.decode())
    return np.frombuffer(tensors[3].cpu().numpy().tobytes(), dtype=out.dtype).reshape(out.shape)
