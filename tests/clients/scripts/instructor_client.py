"""Instructor: a pydantic model with constraints."""

from __future__ import annotations

from typing import Annotated, Any

import instructor
import openai
from cases import ASKED, case, run
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

client = openai.OpenAI(base_url=f"{ASKED['url']}/v1", api_key=ASKED["key"], max_retries=0, timeout=120)


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, StringConstraints(min_length=1, max_length=12, pattern="^[A-Z][a-z]+$")]
    age: Annotated[int, Field(multiple_of=5, ge=0, le=150)]


@case
def schema() -> Any:
    """`response_format` has the schema."""
    asking = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    messages = ASKED["messages_for_schema"]
    return asking.create(model=ASKED["model"], response_model=Person, messages=messages, max_retries=0).model_dump()


run()
