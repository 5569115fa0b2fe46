"""Fields of requests: numbers in bounds, texts in sizes, and what is done with names that mean nothing here.

Every number has a range, so that none of them can make the server allocate or loop for ever.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from kogia.serve.errors import ApiError

MOST_COMPLETIONS = 8
MOST_TOKENS = 2**20
MOST_STOPS = 16
MOST_STOP_CHARS = 1000
MOST_BIASES = 1024
MOST_LOGPROBS = 20
MOST_MESSAGES = 10_000
MOST_TOOLS = 128
MOST_PROMPTS = 256
MOST_FIELDS = 200
"""Of one object, those without a meaning here among them."""


def items(most: int, least: int = 0) -> Any:
    """How many a list may have. The first wrong one ends it: a body of a million wrong ones is one error, not a million
    that are put together while all other clients wait."""
    return Field(min_length=least, max_length=most, fail_fast=True)


def _not_more_biases(given: Any) -> Any:
    """Before they are looked at, for the same reason."""
    if isinstance(given, dict) and len(given) > MOST_BIASES:
        raise ValueError(f"must have at most {MOST_BIASES} tokens, not {len(given)}")
    return given


Real = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Name = Annotated[Text, Field(max_length=256)]
Token = Annotated[Whole, Field(ge=0, lt=2**31)]
Count = Annotated[Whole, Field(ge=1, le=MOST_TOKENS)]
Seed = Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)]
Stop = Annotated[Text, Field(min_length=1, max_length=MOST_STOP_CHARS)]
Stops = Annotated[list[Stop], items(MOST_STOPS)]
TokenIds = Annotated[list[Token], items(MOST_TOKENS)]
Biases = Annotated[
    dict[str, Annotated[Real, Field(ge=-1000, le=1000)]],
    Field(max_length=MOST_BIASES),
    BeforeValidator(_not_more_biases),
]
Penalty = Annotated[Real, Field(ge=-2, le=2)]
Share = Annotated[Real, Field(ge=0, le=1)]
Metadata = Annotated[dict[Name, Annotated[Text, Field(max_length=512)] | None], Field(max_length=16)]
"""What clients attach to requests, within OpenAI's bounds."""
Forgotten = Annotated[Any, BeforeValidator(lambda given: given not in (None, False, []))]


def _not_more_fields(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MOST_FIELDS:
        raise ValueError(f"must have at most {MOST_FIELDS} fields, not {len(given)}")
    return given


class Part(BaseModel):
    """Any object of a body. Of fields that it does not know it keeps the names: values are forgotten at once."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Forgotten] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]
    _check_fields = model_validator(mode="before")(_not_more_fields)

    @property
    def unknown(self) -> list[str]:
        """Names with a value (null, false and an empty list are none) and no meaning here; those of inner objects stand
        behind a dot: "stream_options.pace"."""
        names = [name for name, has_value in (self.model_extra or {}).items() if has_value]
        sent = self.model_fields_set
        for field, value in vars(self).items():
            if field in sent:  # of some fifty, most are not
                inner = value if isinstance(value, list) else (value,)
                names += [f"{field}.{name}" for part in inner for name in getattr(part, "unknown", ())]
        return list(dict.fromkeys(names))

    @property
    def known(self) -> dict[str, Any]:
        """The fields that have a meaning here, as JSON has them."""
        return self.model_dump(by_alias=True, include=set(type(self).model_fields))


class Body(Part):
    """What is posted to a route."""

    instead: ClassVar[Mapping[str, str]] = {}
    """Fields that would change what is asked for and that nothing here obeys, with what to do."""

    def passed_over(self) -> list[str]:
        """The names without a meaning here. Raises 400 for one that must have one."""
        names = self.unknown
        name = next((name for name in names if name in self.instead), None)
        if name is not None:
            raise ApiError(f"{name}: {self.instead[name]}", param=name)
        return names

    def has(self, name: str) -> bool:
        """Whether the client has given a value."""
        return name in self.model_fields_set and getattr(self, name) is not None


def given(body: Body, *names: str) -> dict[str, Any]:
    """The fields of these names that have a value."""
    return {name: getattr(body, name) for name in names if getattr(body, name) is not None}
