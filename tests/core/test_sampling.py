from __future__ import annotations

from typing import Any

import pytest

from mdi import SamplingParams
from mdi.core.errors import InputError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 2),
        ("n", 0),
        ("n", 10_000),
        ("seed", 2**64),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", ("x",) * 17),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field) as raised:
        SamplingParams(**{field: value})
    assert raised.value.field == field


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_an_explicit_temperature_switches_the_checkpoints_filters_off() -> None:
    shipped = SamplingParams(temperature=0.01, top_k=1, top_p=0.001)
    assert SamplingParams().with_defaults(shipped).top_k == 1
    warm = SamplingParams(temperature=0.8).with_defaults(shipped)
    assert (warm.temperature, warm.top_k, warm.top_p) == (0.8, 0, 1.0)
    assert SamplingParams(temperature=0.8, top_k=5).with_defaults(shipped).top_k == 5
