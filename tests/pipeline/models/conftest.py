"""Fixtures for tests of many networks."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers.weight_init
from torch import Tensor, nn


@pytest.fixture
def without_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initialising weights is most of the time of a constructor, and tests of structure do not need it."""

    def unchanged(tensor: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return tensor

    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, unchanged)
    monkeypatch.setattr(timm.layers.weight_init, "_trunc_normal_", unchanged)
