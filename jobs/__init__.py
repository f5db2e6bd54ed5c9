"""Jobs over the pipeline: the ``stillroom`` command and ``python -m jobs.NAME``."""

import importlib
import sys
from pathlib import Path

# The working folder comes first on the import path with ``python -m`` and in Ray's workers, and may contain a package
# ``pipeline`` or ``schemas`` of the user. Python does not search again for packages that are imported here.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    for _name in ("pipeline", "schemas"):
        importlib.import_module(_name)
finally:
    sys.path.pop(0)
