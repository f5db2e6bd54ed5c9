"""Warns before a training whose loss reads logits that are stored too coarsely for it, with what the build measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.cache_format import Header, Statistics
from schemas.config import LossConfig

# A student ends some tenths of a nat, or of correlation, away from its teacher; a hundredth is a few per cent of that.
_LIMIT = 0.01
_BETTER = {"topk": "int8", "int4": "int8", "int8": "fp16", "fp16": "fp32"}


def fidelity_warnings(header: Header, statistics: Statistics, losses: Sequence[LossConfig]) -> list[str]:
    """One line for each loss at whose temperature the stored logits are far from the teacher's.

    DIST reads correlations of probabilities, other losses with a temperature their KL.
    """
    if header.output("logits") is None or not statistics.fidelity_rows:
        return []
    return [text for loss in losses if loss.weight and (text := _warning(header, statistics, loss))]


def _warning(header: Header, statistics: Statistics, loss: LossConfig) -> str | None:
    temperature: float | None = getattr(loss, "temperature", None)
    if temperature is None:
        return None
    sums, unit = (
        (statistics.pearson_sum, "of correlation") if loss.name == "dist" else (statistics.kl_sum, "nats of KL")
    )
    distance, measured_at = _at(sums, temperature)
    distance /= statistics.fidelity_rows
    if distance <= _LIMIT:
        return None
    encoding = str(header.teacher["logits"])
    return (
        f"{loss.name} at T = {temperature:g}: logits in {encoding} are {distance:.2g} {unit} from the teacher's"
        f"{measured_at}, more than {_LIMIT}; cache.logits={_BETTER[encoding.partition(':')[0]]} is closer"
    )


def _at(sums: dict[str, float], temperature: float) -> tuple[float, str]:
    """The sum at a temperature, linear in log T between those of the build and constant beyond; and a word on where."""
    temperatures, values = zip(*sorted((float(key), value) for key, value in sums.items()), strict=True)
    value = float(np.interp(np.log(temperature), np.log(temperatures), values))
    nearest = min(max(temperature, temperatures[0]), temperatures[-1])
    return value, "" if nearest == temperature else f" (measured at T = {nearest:g}, the nearest)"
