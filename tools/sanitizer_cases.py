"""Small calls of every CUDA kernel, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from tests.tree.cases import make_case, random_parents
from tranche.limits import MATH_KINDS, limit_math, limit_read
from tranche.tree import Tree


def main() -> None:
    """Run them and wait for the last."""
    limit_read(torch.ones(4096, dtype=torch.int64, device="cuda"))
    for kind in MATH_KINDS:
        limit_math(torch.empty(0, device="cuda"), kind, 1)
    for nodes in (1, 33, 300):
        Tree.from_parent(random_parents(2, nodes).cuda())
    for dtype in (torch.float32, torch.bfloat16):
        for exact in (False, True):
            make_case(
                dtype=dtype, nodes=20, lengths=(300, 17), page_size=16, exact=exact, device="cuda"
            ).run()
    make_case(dtype=torch.float16, head_dim=80, cache_dtype=torch.float8_e4m3fn, device="cuda").run()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
