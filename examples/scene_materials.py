"""The procedural materials of `scenes.py`: tones as functions of the place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CARRIERS = ("noise", "stripes", "grid", "dots")
ARRANGEMENTS = ("", " in bands", " in blocks", " in blobs")
MATERIALS = (*(carrier + arrangement for carrier in CARRIERS for arrangement in ARRANGEMENTS), "clouds", "mosaic")
TILE = 64  # side of the square of random numbers that textures repeat
_PERIOD = 8.0  # of the carriers, in pixels at scale 1
_WIDE_PERIOD = 26.0  # of the arrangements
_FINE = 2.0  # the second frequency of an arrangement, relative to the first

Random = np.random.Generator
Floats = NDArray[np.floating]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


def tones(material: int, place_2P: Integers, tile: Floats, rng: Random) -> Floats:
    """The tones [P] of a material, -1 to 1, at these places (x, y), in a random direction, scale and phase."""
    scale = rng.uniform(0.8, 1.3)
    x_P, y_P = turned(place_2P, scale, rng)
    if MATERIALS[material] == "clouds":
        wide_P, middle_P, fine_P = (value_noise(x_P / period, y_P / period, tile) for period in (24, 12, 6))
        return sharpened(wide_P + 0.6 * middle_P + 0.4 * fine_P - 1, 2)
    if MATERIALS[material] == "mosaic":
        return mosaic(x_P / 11, y_P / 11, tile)
    carrier, arrangement = divmod(material, len(ARRANGEMENTS))
    wide_x_P, wide_y_P = turned(place_2P, scale * _WIDE_PERIOD, rng)
    fine_P = is_second_part(arrangement, wide_x_P, wide_y_P, tile) ^ bool(rng.integers(2))
    frequency_P = np.where(fine_P, np.float32(_FINE / _PERIOD), np.float32(1 / _PERIOD))
    return carrier_tones(carrier, x_P * frequency_P, y_P * frequency_P, tile)


def turned(place_2P: Integers, scale: float, rng: Random) -> Floats:
    """Places [2,P] divided by a scale, in a random direction and phase."""
    x, y = rng.uniform(-1, 1, 2)
    x, y = np.array([x, y]) / (np.sqrt(x * x + y * y) * scale)
    column_P, row_P = place_2P
    phase_2 = rng.uniform(0, TILE, (2, 1))
    return (np.stack([x * column_P + y * row_P, x * row_P - y * column_P]) + phase_2).astype(np.float32)


def is_second_part(arrangement: int, x_P: Floats, y_P: Floats, tile: Floats) -> Flags:
    """Where an arrangement of period 1 has its second frequency."""
    if ARRANGEMENTS[arrangement] == " in bands":
        return x_P % 1 < 0.5
    if ARRANGEMENTS[arrangement] == " in blocks":
        return (x_P % 1 < 0.5) ^ (y_P % 1 < 0.5)
    if ARRANGEMENTS[arrangement] == " in blobs":
        return value_noise(2 * x_P, 2 * y_P, tile) < 0.5
    return np.zeros(x_P.shape, bool)


def carrier_tones(carrier: int, x_P: Floats, y_P: Floats, tile: Floats) -> Floats:
    """The tones of a carrier of period 1."""
    if CARRIERS[carrier] == "noise":
        return sharpened(2 * value_noise(2 * x_P, 2 * y_P, tile) - 1, 2)
    if CARRIERS[carrier] == "stripes":
        return sharpened(triangle(x_P), 1.5)
    if CARRIERS[carrier] == "grid":
        return sharpened(np.maximum(triangle(x_P), triangle(y_P)) - 0.2, 1.5)
    column_P, row_P = cells_of(x_P, y_P)
    shift_P, other_P = at(tile, column_P, row_P), at(tile, row_P, column_P)
    x_P = x_P % 1 - 0.5 - 0.4 * (shift_P - 0.5)
    y_P = y_P % 1 - 0.5 - 0.4 * (other_P - 0.5)
    return sharpened(0.5 - 6 * (x_P * x_P + y_P * y_P), 3)


def triangle(x_P: Floats) -> Floats:
    """A triangle wave of period 1, -1 to 1."""
    return np.abs(4 * (x_P % 1) - 2) - 1


def sharpened(tone_P: Floats, gain: float) -> Floats:
    return (tone_P * np.float32(gain)).clip(-1, 1)


def cells_of(x_P: Floats, y_P: Floats) -> tuple[Integers, Integers]:
    """The columns and rows of the unit squares that have these places."""
    return np.floor(x_P).astype(np.int64), np.floor(y_P).astype(np.int64)


def at(tile: Floats, column_P: Integers, row_P: Integers) -> Floats:
    return tile[row_P % TILE, column_P % TILE]


def value_noise(x_P: Floats, y_P: Floats, tile: Floats) -> Floats:
    """Bilinear interpolation of the tile at its integer places, 0 to 1."""
    column_P, row_P = cells_of(x_P, y_P)
    x_P, y_P = x_P % 1, y_P % 1
    top_P = at(tile, column_P, row_P) * (1 - x_P) + at(tile, column_P + 1, row_P) * x_P
    bottom_P = at(tile, column_P, row_P + 1) * (1 - x_P) + at(tile, column_P + 1, row_P + 1) * x_P
    return top_P * (1 - y_P) + bottom_P * y_P


def mosaic(x_P: Floats, y_P: Floats, tile: Floats) -> Floats:
    """One tone for each cell of a Voronoi diagram with one site in each unit square."""
    column_P, row_P = cells_of(x_P, y_P)
    nearest_P, tone_P = np.full(x_P.shape, np.inf, np.float32), np.zeros(x_P.shape, np.float32)
    for step in range(9):
        near_column_P, near_row_P = column_P + step % 3 - 1, row_P + step // 3 - 1
        dx_P = near_column_P + at(tile, near_column_P, near_row_P) - x_P
        dy_P = near_row_P + at(tile, near_row_P, near_column_P) - y_P
        square_P = (dx_P * dx_P + dy_P * dy_P).astype(np.float32)
        nearer_P = square_P < nearest_P
        nearest_P = np.where(nearer_P, square_P, nearest_P)
        tone_P = np.where(nearer_P, 2 * at(tile, near_column_P + 7, near_row_P + 13) - 1, tone_P)
    return tone_P
