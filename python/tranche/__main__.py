"""`python -m tranche`: what was built, what this machine has, and which op runs on which backend.

`python -m tranche --check` tells whether the install works, and what would mend it.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

import tranche
from tranche import _library
from tranche.check import findings


def build_rows() -> list[tuple[str, str]]:
    """What was built, and with what."""
    rows = [
        ("tranche", tranche.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
    ]
    try:
        _host = importlib.import_module("tranche._host")
    except ImportError:
        return [
            *rows,
            ("build", "unknown (tranche._host was built for another Python; the ops do not need it)"),
        ]
    info = _host.build_info()
    return [
        *rows,
        ("C++ compiler", info["compiler"]),
        ("CUDA compiler", info["cuda"] or "none: CUDA kernels were not built"),
        ("CPU instruction set", info["isa"]),
    ]


def _device_rows() -> list[tuple[str, str]]:
    rows = [("cpu", f"{torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory >> 30} GiB",
            )
        )
    if not torch.cuda.is_available():
        has_library = (_library.PACKAGE / "libtranche_cuda.so").exists()
        why = "torch is a CPU-only build" if torch.version.cuda is None else "no GPU was found"
        rows.append(("cuda", f"{why}; CUDA kernels are {'built' if has_library else 'not built'}"))
    return rows


def op_table() -> dict[str, dict[str, bool]]:
    """For each op, whether the dispatcher has a kernel for it on each backend."""
    names = sorted(
        name.removeprefix("tranche::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tranche::")
    )
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name: {
            "cpu": has(f"tranche::{name}", "CPU"),
            "cuda": has(f"tranche::{name}", "CUDA"),
            "sim": _library.HAS_SIMULATOR and has(f"tranche_sim::{name}", "CPU"),
        }
        for name in names
    }


def check(console: Console) -> int:
    """Print what was looked at; 1 when something is to be mended."""
    table = Table("looked at", "seen", "remedy", title="This install", title_justify="left")
    found = findings()
    for finding in found:
        table.add_row(finding.what, finding.seen, finding.remedy or "")
    console.print(table)
    return int(any(finding.remedy for finding in found))


def main() -> int:
    """Print the three tables, or the check's."""
    parser = argparse.ArgumentParser(prog="python -m tranche", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="tell whether this install works, or what would mend it"
    )
    parser.add_argument("--version", action="version", version=f"tranche {tranche.__version__}")
    arguments = parser.parse_args()
    console = Console()
    if arguments.check:
        return check(console)
    for title, rows in (("Build", build_rows()), ("Devices", _device_rows())):
        table = Table(title=title, show_header=False, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    backends = ("cpu", "cuda", "sim")
    table = Table("op", *backends, title="Ops by backend, as the dispatcher has them", title_justify="left")
    for name, kernels in op_table().items():
        table.add_row(
            f"torch.ops.tranche.{name}", *("yes" if kernels[backend] else "-" for backend in backends)
        )
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
