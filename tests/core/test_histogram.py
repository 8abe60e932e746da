"""Values are counted by their size."""

from __future__ import annotations

from mdi.core.histogram import Distribution, Histogram


def test_a_bound_belongs_to_the_values_below_it() -> None:
    histogram = Histogram((1, 8))
    assert histogram.distribution == Distribution((1, 8), (0, 0, 0), 0.0)
    for value in (0.5, 1, 1.5, 8, 9):
        histogram.add(value)
    assert histogram.distribution == Distribution((1, 8), (2, 2, 1), 20.0)
