"""Runs commands under Python's audit hooks and records code from pickles, started programs and written files.

``python -m tests.security.audited CONFIG RUN SHARD PICKLE``: a build and a training, a verification, an evaluation and
an export; then, as a control, a pickle and a command. Prints both lists as JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs import distill
from jobs.cache_ops import verify
from jobs.run_ops import evaluate
from pipeline.storage.config_files import load_config
from pipeline.student.export.exporters import export_run

_CODE = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"}
_FILES = {"os.mkdir", "os.rename", "os.symlink", "os.link", "os.remove", "os.chmod", "shutil.unpack_archive"}
# Any other value is an open folder: the removal of a temporary folder empties it from inside.
_NO_FOLDER = -1
_events: list[str] = []


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event in _CODE or event.startswith("tarfile."):
        _events.append(f"{event} {args}")
    elif event in _FILES and not (event == "os.remove" and args[1] != _NO_FOLDER):
        _events.append(f"{event}: {Path(os.fsdecode(args[0])).absolute()}")
    elif event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
        _events.append(f"open: {Path(args[0]).absolute()}")


def _take_events() -> list[str]:
    events = list(_events)
    _events.clear()
    return events


def main(config: str, run: str, shard: str, pickled: str) -> None:
    sys.addaudithook(_note)
    distill.main(config, ["train.epochs=1"])
    cache = load_config(config).cache
    assert cache is not None
    assert verify(cache.url, shards=None, threads=2, config=None, num_rows=8, allow_pixel_drift=0).ok
    evaluate(run, shard)
    export_run(run, f"{run}/student.safetensors", format=None, checkpoint_name="last", with_normalization=False)
    commands = _take_events()
    pickle.loads(Path(pickled).read_bytes())
    subprocess.run(["true"], check=True)
    print(json.dumps({"commands": commands, "control": _take_events()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
