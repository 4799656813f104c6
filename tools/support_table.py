"""Writes the table of what runs where into README.md, by trying: `python -m tools.support_table [--check]`.

Every op is called once on each backend and dtype; the simulator stands for the GPU, whose kernels it runs.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

from tests.op_calls import CALLS, FLOAT8, Call
from tranche.__main__ import op_table

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- support table -->\n).*?(<!-- end of support table -->)", re.DOTALL)
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    FLOAT8: "fp8 caches",
}


def supported(ops: Any, device: str, call: Call, dtype: torch.dtype) -> bool:
    """Whether the op takes the dtype; what it refuses, it refuses with ValueError."""
    try:
        call.run(ops, device, dtype)
    except ValueError:
        return False
    return True


def cell(namespace: str, name: str) -> str:
    """The dtypes of one op in one namespace."""
    call = CALLS[name]
    ops = getattr(torch.ops, namespace)
    if not call.dtypes:
        return "yes" if supported(ops, "cpu", call, torch.float32) else "-"
    return ", ".join(NAMES[d] for d in call.dtypes if supported(ops, "cpu", call, d)) or "-"


def table() -> str:
    """The table, in Markdown: ops of one family that take the same share a line."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    with torch.inference_mode():
        for name, family in families().items():
            rows.setdefault((family, cell("tranche", name), cell("tranche_sim", name)), []).append(name)
    lines = ["| ops of `torch.ops.tranche` | CPU | CUDA |", "| --- | --- | --- |"]
    for (_, cpu, cuda), names in sorted(rows.items()):
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {cpu} | {cuda} |")
    return "\n".join(lines) + "\n"


def families() -> dict[str, str]:
    """The family of each op. pconv's are named after torch's convolutions."""
    return {name: "pconv" if "conv2d" in name else name.partition("_")[0] for name in op_table()}


def main() -> int:
    before = README.read_text()
    after = BLOCK.sub(lambda match: match[1] + table() + match[2], before)
    if "--check" in sys.argv[1:]:
        return int(after != before)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
