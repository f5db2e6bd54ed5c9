"""``make bench``: ratios against a baseline of the same run; seconds alone mean little on a shared machine.

``python -m tests.benchmarks NAME…`` runs some of them. Those of hours run only if they are named.
"""

from __future__ import annotations

import sys

from tests.benchmarks import (
    build,
    bytes_a_row,
    decoders,
    encoding_students,
    eval_view,
    event_costs,
    fan_out,
    fidelity,
    head_fidelity,
    join,
    loader,
    memory,
    nd_loss,
    nodes,
    peers,
    scale,
    step,
    stored_agreement,
    stored_steps,
    stored_views,
    token_fidelity,
    view_options,
)
from tests.benchmarks.timing import CIFAR, SHARED, machine

# Title, function, and the data without which it is skipped.
BENCHMARKS = {
    "build": ("Cache build", build.run, SHARED),
    "bytes_a_row": ("Bytes a row by encoding", bytes_a_row.run, CIFAR),
    "decoders": ("JPEG decoders", decoders.run, None),
    "eval_view": ("Eval views against timm's eval transform", eval_view.run, SHARED),
    "encoding_students": ("Students of encodings at equal bytes", encoding_students.run, CIFAR),
    "event_costs": ("Log lines, counters and metrics of a part", event_costs.run, None),
    "fan_out": ("Ray tasks over 10,000 tiny parts", fan_out.run, None),
    "fidelity": ("Fidelity of stored logits", fidelity.run, CIFAR),
    "head_fidelity": ("Fidelity of logits computed from stored embeddings", head_fidelity.run, CIFAR),
    "join": ("Teacher columns joined, B=256 K=1000", join.run, CIFAR),
    "loader": ("The loader alone against bare decode and augment", loader.run, SHARED),
    "memory": ("Memory of a cache task over shards of two sizes", memory.run, SHARED),
    "nd": ("ND loss, forward and backward, B=256 K=1000 D=2048", nd_loss.run, None),
    "nodes": ("A build over two nodes of one CPU against one", nodes.run, None),
    "peers": ("Whole loaders over the same photographs", peers.run, None),
    "scale": ("What is done once for each shard, 1,000 and 10,000 of them", scale.run, None),
    "step": ("A training step: cached against labels alone, online against its parts", step.run, SHARED),
    "stored_agreement": ("Views stored as JPEG, as a trained network sees them", stored_agreement.run, SHARED),
    "stored_steps": ("A step from stored views against one with labels alone", stored_steps.run, None),
    "stored_views": ("Stored views against decode and crop", stored_views.run, SHARED),
    "token_fidelity": ("Fidelity of stored patch tokens", token_fidelity.run, None),
    "view_options": ("Options of views", view_options.run, SHARED),
}

LONG = {"encoding_students"}

if __name__ == "__main__":
    names = sys.argv[1:] or [name for name in BENCHMARKS if name not in LONG]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise SystemExit(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    print(f"{machine()}; median (quartiles)")
    for name in names:
        title, benchmark, data = BENCHMARKS[name]
        print(title)
        if data is None or data.exists():
            benchmark()
        else:
            print(f"  skipped, {data} is absent")
