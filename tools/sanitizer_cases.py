"""A small call of every op in every dtype that its CUDA kernel takes, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

from tests.op_calls import CALLS
from tests.tree.cases import make_case
from tools.support_table import supported


def main() -> None:
    """Run them and wait for the last."""
    with torch.inference_mode():
        for name, call in CALLS.items():
            for dtype in call.dtypes or (torch.float32,):
                supported(torch.ops.tranche, "cuda", call, dtype)
            print(name)
        for dtype in (torch.float32, torch.bfloat16):
            make_case(dtype=dtype, nodes=20, lengths=(300, 17), page_size=16, device="cuda").run()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
