from __future__ import annotations

import math
import re
from dataclasses import fields, replace

import pytest

from loracompose.composers import COMPOSERS
from tests.laws import ROWS

NO_NUMBERS = ["abc", "2", True, [1], 1j]
NO_COUNTS = [*NO_NUMBERS, 2.5, 2.0, -1, math.nan]
NOT_FINITE = [*NO_NUMBERS, math.nan, math.inf, -math.inf, 10**400]


def fields_of(*kinds: str):
    return [(name, f.name) for name, composer in COMPOSERS.items() for f in fields(composer) if f.type in kinds]


def make(name: str, **values: object):
    return replace(ROWS[name].settings[0], **values)


@pytest.mark.parametrize(("name", "field"), fields_of("int", "int | None"))
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_a_count_that_is_none_is_refused_by_composer_field_and_value(name: str, field: str, value: object):
    composer = COMPOSERS[name]
    with pytest.raises(ValueError, match=f"{composer.__name__}: {field} must be an integer") as refusal:
        make(name, **{field: value})
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(("name", "field"), fields_of("float", "float | None"))
@pytest.mark.parametrize("value", NOT_FINITE, ids=lambda value: repr(value)[:8])
def test_a_number_that_is_none_or_not_finite_is_refused_by_composer_field_and_value(
    name: str, field: str, value: object
):
    composer = COMPOSERS[name]
    with pytest.raises(ValueError, match=f"{composer.__name__}: {field} must be") as refusal:
        make(name, **{field: value})
    assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(("name", "field"), fields_of("int", "float"))
def test_only_a_field_that_says_so_may_be_none(name: str, field: str):
    with pytest.raises(ValueError, match=f"{field} must be"):
        make(name, **{field: None})


@pytest.mark.parametrize("weight", ["abc", math.nan, None], ids=repr)
def test_a_fitted_weight_that_is_no_finite_number_is_refused(weight: object):
    with pytest.raises(ValueError, match=re.escape(f"learned weight of 'ab' must be a finite number, got {weight!r}")):
        COMPOSERS["lorahub"](learned={"ab": weight})


def test_every_kind_of_number_is_among_the_fields_tested():
    tested = {pair for kinds in (("int", "int | None"), ("float", "float | None")) for pair in fields_of(*kinds)}
    assert {
        ("smora", "active"),
        ("lego", "k"),
        ("linear", "rank"),
        ("ties", "density"),
        ("knots", "tolerance"),
        ("arrow", "top_k"),
    } < tested
    assert {f.type for composer in COMPOSERS.values() for f in fields(composer)} & {"int", "float"} == {"int", "float"}
