"""Models with every constraint that pydantic writes into a JSON schema, as people define them for their answers."""

from __future__ import annotations

import re
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints
from typing_extensions import TypedDict

T = TypeVar("T")
Word = Annotated[str, StringConstraints(pattern="^[a-z]+$")]
ShortWord = Annotated[str, StringConstraints(pattern="^[a-z]+$", min_length=2, max_length=6)]


class Plain(BaseModel):
    name: str
    age: int
    height: float
    is_here: bool
    nothing: None


class Lengths(BaseModel):
    at_least: str = Field(min_length=2)
    at_most: str = Field(max_length=5)
    exactly: str = Field(min_length=3, max_length=3)


class Patterns(BaseModel):
    word: Word
    code: str = Field(pattern=r"^[A-Z]{3}-\d{4}$")
    either: str = Field(pattern="^(yes|no)$")
    loose: str = Field(pattern="[0-9]")


class PatternsOfALength(BaseModel):
    word: ShortWord
    number: str = Field(pattern=r"^\d+$", max_length=4)


class Bounds(BaseModel):
    over: int = Field(gt=3)
    from_: int = Field(ge=3, alias="from")
    under: int = Field(lt=300)
    to: int = Field(le=300)
    between: int = Field(gt=-5, lt=5)


class FloatBounds(BaseModel):
    over: float = Field(gt=0.5)
    from_: float = Field(ge=-1.5, le=1.5)
    under: float = Field(lt=1e6)
    finite: pydantic.FiniteFloat


class Multiples(BaseModel):
    seven: int = Field(multiple_of=7, ge=0, le=999)
    half: float = Field(multiple_of=0.5, ge=0, le=10)


class Signs(BaseModel):
    positive: pydantic.PositiveInt
    negative: pydantic.NegativeInt
    from_zero: pydantic.NonNegativeFloat
    to_zero: pydantic.NonPositiveFloat


class Decimals(BaseModel):
    price: Decimal = Field(max_digits=6, decimal_places=2, ge=0)
    rate: Decimal


class Days(BaseModel):
    day: date
    moment: datetime
    hour: time
    long: timedelta


class Moments(BaseModel):
    past: pydantic.PastDate
    future: pydantic.FutureDatetime
    aware: pydantic.AwareDatetime
    naive: pydantic.NaiveDatetime


class Ids(BaseModel):
    any: uuid.UUID
    random: pydantic.UUID4
    named: pydantic.UUID5


class Addresses(BaseModel):
    four: IPv4Address
    six: IPv6Address


class Network(BaseModel):
    network: IPv4Network


class Urls(BaseModel):
    any: pydantic.AnyUrl
    web: pydantic.HttpUrl


class Email(BaseModel):
    address: Annotated[str, Field(json_schema_extra={"format": "email"})]


class Paths(BaseModel):
    anywhere: Path
    file: pydantic.FilePath
    directory: pydantic.DirectoryPath


class Encoded(BaseModel):
    text: pydantic.Base64Str
    secret: pydantic.SecretStr
    value: pydantic.Json[list[int]]
    size: pydantic.ByteSize
    pattern: re.Pattern[str]


class Lists(BaseModel):
    any: list[Any] = Field(max_length=2)
    some: list[int] = Field(min_length=1, max_length=3)
    words: list[ShortWord] = Field(min_length=2, max_length=2)
    nested: list[Annotated[list[bool], Field(max_length=2)]] = Field(max_length=2)


class Queues(BaseModel):
    queue: deque[int] = Field(max_length=3)
    sequence: Sequence[str] = Field(max_length=2)


class Sets(BaseModel):
    tags: set[str] = Field(max_length=3)


class FrozenSets(BaseModel):
    tags: frozenset[Literal["a", "b", "c"]] = Field(min_length=1)


class Tuples(BaseModel):
    pair: tuple[bool, Literal["a", "b"]]
    many: tuple[int, ...] = Field(max_length=3)
    point: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]


class Point(NamedTuple):
    x: int
    y: int


class NamedTuples(BaseModel):
    point: Point


class Dicts(BaseModel):
    counts: dict[str, int] = Field(max_length=2)
    flags: Mapping[Literal["a", "b"], bool]
    nested: dict[str, dict[str, float]] = Field(max_length=1)


class DictsOfPatterns(BaseModel):
    by_word: dict[Word, int] = Field(max_length=2)


class DictsOfLengths(BaseModel):
    by_name: dict[Annotated[str, Field(min_length=2, max_length=4)], int] = Field(min_length=1, max_length=2)


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Choices(BaseModel):
    colour: Colour
    level: Level
    kind: Literal["book", "film", 3, None]
    only: Literal["always"]


class Unions(BaseModel):
    either: int | str
    maybe: Annotated[str, Field(max_length=4)] | None
    of_lists: Annotated[list[int], Field(max_length=2)] | Annotated[list[str], Field(max_length=2)]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: ShortWord


class Discriminated(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = Field(max_length=2)


class Defaults(BaseModel):
    name: str = Field("nobody", max_length=8)
    age: int | None = None
    tags: list[str] = Field(default_factory=list, max_length=2)


class Described(BaseModel):
    """A person, as a form asks for it."""

    model_config = ConfigDict(title="A person", json_schema_extra={"examples": [{"name": "Alice"}]})
    name: str = Field(title="Name", description="The whole name.", examples=["Alice"], max_length=20)
    old: str | None = Field(None, deprecated=True, max_length=3)


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=8)


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str = Field(max_length=8)


class OpenToNumbers(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    name: str = Field(max_length=8)


class Node(BaseModel):
    value: int = Field(ge=0, le=9)
    next: Node | None


class Tree(BaseModel):
    label: ShortWord
    children: list[Tree] = Field(max_length=2)


class Typed(TypedDict, total=False):
    name: Annotated[str, Field(max_length=5)]
    age: int


class WithTyped(BaseModel):
    typed: Typed


@pydantic.dataclasses.dataclass
class Span:
    begin: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(le=100)]


class WithDataclass(BaseModel):
    span: Span


class Page(BaseModel, Generic[T]):
    items: list[T] = Field(max_length=2)
    number: int = Field(ge=1)


class OfClosed(BaseModel):
    page: Page[Closed]


class Rows(RootModel[list[Closed]]):
    root: list[Closed] = Field(min_length=1, max_length=2)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    count: pydantic.StrictInt
    name: pydantic.StrictStr = Field(min_length=1, max_length=9)
    is_here: pydantic.StrictBool


class Order(BaseModel):
    """All in one, as an application has it."""

    model_config = ConfigDict(extra="forbid")
    id: uuid.UUID
    customer: Closed
    lines: list[Cat | Dog] = Field(min_length=1, max_length=2)
    total: Decimal = Field(ge=0, max_digits=7, decimal_places=2)
    currency: Annotated[str, StringConstraints(pattern="^[A-Z]{3}$")]
    placed: date
    state: Literal["open", "paid", "sent"]
    discount: Annotated[int, Field(multiple_of=5, ge=0, le=50)] | None
    notes: dict[ShortWord, Annotated[str, Field(max_length=8)]] = Field(max_length=1)


MODELS: dict[str, type[BaseModel]] = {
    model.__name__: model
    for model in (
        *(Plain, Lengths, Patterns, PatternsOfALength, Bounds, FloatBounds, Multiples, Signs, Decimals, Days, Moments),
        *(Ids, Addresses, Network, Urls, Email, Paths, Encoded, Lists, Queues, Sets, FrozenSets, Tuples, NamedTuples),
        *(Dicts, DictsOfPatterns, DictsOfLengths, Choices, Unions, Discriminated, Defaults, Described, Closed, Open),
        *(OpenToNumbers, Node, Tree, WithTyped, WithDataclass, OfClosed, Rows, Strict, Order),
    )
}
