from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest

from mdi import SamplingParams
from mdi.core.errors import InputError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -2),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 2),
        ("n", 0),
        ("n", 10_000),
        ("seed", 2**64),
        ("stop", (3,)),
        ("stop", ("x",) * 17),
        ("stop", 5),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (0,) * 65),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", dict.fromkeys(range(1025), 0)),
        ("ignore_eos", 1),
        ("presence_penalty", None),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field) as raised:
        SamplingParams(**{field: value})
    assert raised.value.field == field


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_an_explicit_temperature_switches_the_checkpoints_filters_off() -> None:
    shipped = SamplingParams(temperature=0.01, top_k=1, top_p=0.001, min_p=0.1)
    assert SamplingParams().resolved(shipped, 10).top_k == 1
    warm = SamplingParams(temperature=0.8).resolved(shipped, 10)
    assert (warm.temperature, warm.top_k, warm.top_p, warm.min_p) == (0.8, 0, 1.0, 0.1)
    assert SamplingParams(temperature=0.8, top_k=5).resolved(shipped, 10).top_k == 5


def test_resolved_settings_are_complete() -> None:
    resolved = SamplingParams().resolved(SamplingParams(), longest=10)
    assert [name for name, value in asdict(resolved).items() if value is None] == ["prompt_logprobs"]
    assert resolved.max_tokens == 10
    assert SamplingParams(seed=0, max_tokens=7).resolved(SamplingParams(), longest=10).seed == 0
    assert resolved.seed != SamplingParams().resolved(SamplingParams(), longest=10).seed


def test_settings_are_values() -> None:
    given = SamplingParams(stop=["a"], stop_token_ids=[5], logit_bias={7: 1}, temperature=0)
    assert given == SamplingParams(stop="a", stop_token_ids=(5,), logit_bias={7: 1.0}, temperature=0.0)
    assert given != SamplingParams()
    with pytest.raises(ValueError, match="frozen"):
        given.temperature = 1.0


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown field temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


def test_a_refused_value_is_shown() -> None:
    with pytest.raises(InputError, match=r"^top_p should be less than or equal to 1, got 2$"):
        SamplingParams(top_p=2)
    with pytest.raises(InputError, match=r"^seed should be less than"):
        SamplingParams(seed=10**5000)  # too long for Python to print


@pytest.mark.parametrize(("name", "loads"), [("__version__", "pydantic"), ("SamplingParams", "torch")])
def test_importing_the_package_loads_no_heavy_library(name: str, loads: str) -> None:
    script = f"import sys, mdi; mdi.{name}; sys.exit({loads!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
