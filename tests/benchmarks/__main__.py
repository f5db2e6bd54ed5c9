"""``make bench``: ratios against a baseline of the same run; seconds alone mean little on a shared machine.

``python -m tests.benchmarks NAME…`` runs some of them.
"""

from __future__ import annotations

import sys

from tests.benchmarks import (
    build,
    bytes_a_row,
    decoders,
    eval_view,
    event_costs,
    fan_out,
    fidelity,
    join,
    loader,
    memory,
    nd_loss,
    nodes,
    scale,
    step,
    view_options,
)
from tests.benchmarks.timing import machine

BENCHMARKS = {
    "build": ("Cache build", build.run),
    "bytes_a_row": ("Bytes a row by encoding", bytes_a_row.run),
    "decoders": ("JPEG decoders", decoders.run),
    "eval_view": ("Eval views against timm's eval transform", eval_view.run),
    "event_costs": ("Log lines, counters and metrics of a part", event_costs.run),
    "fan_out": ("Ray tasks over 10,000 tiny parts", fan_out.run),
    "fidelity": ("Fidelity of stored logits", fidelity.run),
    "join": ("Teacher columns joined, B=256 K=1000", join.run),
    "loader": ("The loader alone against bare decode and augment", loader.run),
    "memory": ("Memory of a cache task over shards of two sizes", memory.run),
    "nd": ("ND loss, forward and backward, B=256 K=1000 D=2048", nd_loss.run),
    "nodes": ("A build over two nodes of one CPU against one", nodes.run),
    "scale": ("What is done once for each shard, 1,000 and 10,000 of them", scale.run),
    "step": ("A training step: cached against labels alone, online against its parts", step.run),
    "view_options": ("Options of views", view_options.run),
}

if __name__ == "__main__":
    names = sys.argv[1:] or [*BENCHMARKS]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise SystemExit(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    print(f"{machine()}; median (quartiles)")
    for name in names:
        title, benchmark = BENCHMARKS[name]
        print(title)
        benchmark()
