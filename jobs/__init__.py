"""Jobs over the pipeline: the ``stillroom`` command and ``python -m jobs.NAME``."""

import importlib
import sys
from pathlib import Path

# A folder of the user's named ``pipeline`` or ``schemas`` may come earlier on the path: with ``python -m`` and in Ray's
# workers the working folder does. What is imported now, from where this package lies, is not looked for again.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    for _name in ("pipeline", "schemas"):
        importlib.import_module(_name)
finally:
    sys.path.pop(0)
