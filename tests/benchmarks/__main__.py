"""``make bench``: ratios against a baseline of the same run; seconds alone mean little on a shared machine."""

from __future__ import annotations

from tests.benchmarks import build, nd_loss
from tests.benchmarks.timing import machine

BENCHMARKS = {"ND loss, forward and backward, B=256 K=1000 D=2048": nd_loss.run, "Cache build, one process": build.run}

if __name__ == "__main__":
    print(f"{machine()}; median (quartiles)")
    for title, benchmark in BENCHMARKS.items():
        print(title)
        benchmark()
