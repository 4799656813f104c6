"""The roofline picture: each row's arithmetic intensity against what it reached."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import Result
from benchmarks.limits import math_limit, read_limit


def roofline(results: list[Result], device: str, folder: Path, name: str = "roofline.png") -> Path:
    """Draw the rows under the machine's limits; returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bandwidth = read_limit(device, 256 << 20) / 1e9
    peaks = {kind: math_limit(device, kind) / 1e9 for kind in ("fp32", "bf16")}
    figure, axes = plt.subplots(figsize=(8, 5))
    intensities = [r.gigaflops / r.gigabytes_per_second for r in results]
    low, high = min(intensities) / 2, max(*intensities, *(peak / bandwidth for peak in peaks.values())) * 2
    for kind, peak in peaks.items():
        knee = peak / bandwidth
        axes.plot([low, knee, high], [low * bandwidth, peak, peak], label=f"{kind} limit, {peak:.0f} GFLOP/s")
    for r, intensity in zip(results, intensities, strict=True):
        axes.plot(intensity, r.gigaflops, "o", markersize=5)
        axes.annotate(
            r.name, (intensity, r.gigaflops), fontsize=6, xytext=(4, -6), textcoords="offset points"
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte read", ylabel="GFLOP/s")
    axes.set_title(f"read limit {bandwidth:.0f} GB/s")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
