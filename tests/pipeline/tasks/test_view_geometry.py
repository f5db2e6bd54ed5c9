"""Positions of a view in its original, against fractions and loops."""

from __future__ import annotations

from fractions import Fraction
from math import floor

from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.view_geometry import num_visible, source_positions, visible_size

LENGTH, LIMIT = st.integers(1, 3000), st.integers(1, 2000)


@given(LIMIT, st.data(), LENGTH, st.integers(1, 300))
def test_a_pixel_shows_what_contains_its_centre(limit: int, data: st.DataObject, length: int, num: int) -> None:
    start = data.draw(st.integers(0, limit - 1))
    expected = [start + floor((x + Fraction(1, 2)) * length / num) for x in range(num)]
    inside = [at for at in expected if at < limit] or [limit - 1]
    assert source_positions(start, length, num, limit).tolist() == inside
    assert num_visible(start, length, num, limit) == len(inside)


def test_boxes_inside_an_image_are_visible_as_a_whole() -> None:
    assert visible_size((3, 4, 17, 6), (10, 20), (10, 20)) == (10, 20)
    assert visible_size((0, 0, 40, 20), (10, 20), (10, 20)) == (5, 10)
    # 1.5 of 2 pixels: the centre of the second one lies inside, at 3 of 4.
    assert visible_size((0, 0, 4, 1), (1, 2), (1, 3)) == (1, 1)
    assert visible_size((0, 0, 4, 1), (1, 2), (1, 4)) == (1, 2)
