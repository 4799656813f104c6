"""The demo's picture: how many of its tokens each drafter had accepted, pass by pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tranche._extras import needed


def plot_accepted_lengths(lengths: Mapping[str, Sequence[int]], path: Path | str) -> Path:
    """Draw, for each drafter, the share of passes by the number of draft tokens that they accepted.

    Args:
        lengths: by drafter, `Statistics.accepted_lengths`.
        path: the picture's file; its ending says of which kind.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with needed("tranche.decode demo --plot", "matplotlib"):
        import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    longest = max(max((i for i, n in enumerate(counts) if n), default=0) for counts in lengths.values())
    figure, axes = plt.subplots(
        len(lengths), 1, figsize=(6, 1.3 * len(lengths) + 1), sharex=True, sharey=True, squeeze=False
    )
    for axis, (name, counts) in zip(axes[:, 0], lengths.items(), strict=True):
        total = max(1, sum(counts))
        mean = sum(i * n for i, n in enumerate(counts)) / total
        shares = [n / total for n in counts[: longest + 1]]
        axis.bar(range(len(shares)), shares)
        axis.axvline(mean, color="black", linewidth=1)
        axis.set_title(f"{name}: {mean:.2f} accepted on average", fontsize=9, loc="left")
    axes[-1, 0].set_xlabel("draft tokens that a pass accepted")
    figure.supylabel("share of passes")
    figure.tight_layout()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
