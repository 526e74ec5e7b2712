"""What `explain` says of data that pydantic refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.errors import UsageError
from service.validation import explain


class Inner(BaseModel):
    """A table inside a list."""

    model_config = ConfigDict(extra="forbid")

    colour: str


class Outer(BaseModel):
    """A table."""

    model_config = ConfigDict(extra="forbid")

    count: int = Field(1, le=8)
    shape: str = "round"
    inner: tuple[Inner, ...] | None = None

    @field_validator("shape")
    @classmethod
    def _shape_is_known(cls, shape: str) -> str:
        if shape != "round":
            raise UsageError(f"Unknown shape '{shape}'.", hint="Choose round.")
        return shape


@pytest.mark.parametrize(
    ("data", "sentences"),
    [
        ({"count": 9}, ["field 'count' is 9: input should be less than or equal to 8."]),
        ({"cuont": 9}, ["unknown field 'cuont'. Did you mean 'count'? Known: count, shape, inner."]),
        ({"inner": [{}]}, ["field 'inner.0.colour' is missing."]),
        (
            {"inner": [{"colour": "red", "color": "red"}]},
            ["unknown field 'inner.0.color'. Did you mean 'colour'? Known: colour."],
        ),
        ({"shape": "odd"}, ["Unknown shape 'odd'. Choose round."]),
    ],
)
def test_explanation_names_field_value_and_what_was_expected(data: dict[str, Any], sentences: list[str]) -> None:
    """Of tables in lists too; an error of our own validators is told as it is."""
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)

    assert explain(caught.value, Outer) == sentences


def test_explanation_of_several_errors_has_a_sentence_for_each() -> None:
    """Those of our own validators included: none ends the validation before the others are found."""
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"count": 9, "shape": "odd", "cuont": 1})

    assert len(explain(caught.value, Outer)) == 3
