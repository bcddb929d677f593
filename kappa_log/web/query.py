"""What requests may say: parameters and bodies, checked before anything is asked.

Numbers are ASCII digits and times have an offset: what is read leniently is read
wrongly by somebody. Parameters that are not known are ignored, as they always were;
members of a body are not, since a misspelled filter would act on everything.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time
from hashlib import blake2b
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import override

from kappa_log.codec import check_id
from kappa_log.config import OnError, did_you_mean
from kappa_log.errors import DecodeError, UsageError
from kappa_log.events import from_micros, in_utc, to_micros
from kappa_log.plan import From
from kappa_log.storage.pages import Chosen, Page, Place

MAX_LIMIT = 500
DEFAULT_LIMIT = 20

MAX_NUMBER = 2**63 - 1
"""The largest number that a database keeps."""

ONE_OF = "Any of these; repeated for each."

_SPACE_FOR_PLUS = re.compile(r"(T\S+) (\d\d:?\d\d)$")


def _whole(value: object) -> object:
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        msg = "a whole number is written with the digits 0 to 9"
        raise ValueError(msg)
    return value


def _limit(value: object) -> object:
    try:
        return _whole(value)
    except ValueError:
        msg = f"a whole number from 1 to {MAX_LIMIT}, in the digits 0 to 9"
        raise ValueError(msg) from None


def _moment(value: object) -> datetime:
    if not isinstance(value, str):
        msg = "a time is text"
        raise ValueError(msg)  # noqa: TRY004 - pydantic reports ValueError
    # An unescaped + of a query is a space by the time it comes here.
    text = _SPACE_FOR_PLUS.sub(r"\1+\2", value)
    try:
        return datetime.combine(date.fromisoformat(text), time.min, UTC)
    except ValueError:
        found = datetime.fromisoformat(text)
    return in_utc(found)


def _text(value: str) -> str:
    try:
        check_id("text", value)
    except DecodeError as error:
        raise ValueError(str(error)) from None
    return value


Moment = Annotated[
    datetime,
    BeforeValidator(_moment),
    WithJsonSchema(
        {
            "type": "string",
            "description": "A date (its midnight in UTC), or a time with an offset.",
            "examples": ["2026-01-31", "2026-01-31T09:30:00Z"],
        }
    ),
]
Text = Annotated[str, AfterValidator(_text)]
Texts = Annotated[list[Text], Field(max_length=100)]
Number = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MAX_NUMBER)]
Identifier = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MAX_NUMBER)]
Limit = Annotated[int, BeforeValidator(_limit), Field(ge=1, le=MAX_LIMIT)]
By = Literal["recorded", "event-time"]
Reason = Annotated[str, AfterValidator(_text), Field(max_length=1000)]


class Query(BaseModel):
    """Parameters; those that are not known are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Body(BaseModel):
    """A body; a member that is not known is refused, with those that there are."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="wrap")
    @classmethod
    def _named(cls, given: Any, validated: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validated(given)
        except ValidationError as error:
            unknown = [
                one["loc"]
                for one in error.errors()
                if one["type"] == "extra_forbidden" and len(one["loc"]) == 1
            ]
            if not unknown:
                raise
            found = [
                _no_member(str(name), list(cls.model_fields)) for (name,) in unknown
            ]
            raise ValidationError.from_exception_data(cls.__name__, found) from None


def _no_member(name: str, known: list[str]) -> InitErrorDetails:
    said = PydanticCustomError(
        "no_such_member", "no such member{hint}", {"hint": did_you_mean(name, known)}
    )
    return InitErrorDetails(type=said, loc=(name,), input=None)


class Limited(Query):
    """How much of a list is wanted."""

    limit: Limit = DEFAULT_LIMIT


class After(Limited):
    """How much of a list is wanted, and past which id."""

    after: Number | None = None


class ListQuery(Limited):
    """Filters and pages of events and failures alike."""

    topic: Text | None = None
    group_id: Text | None = None
    entity_id: Text | None = None
    event_type: Text | None = None
    topics: Texts | None = Field(default=None, alias="topic[]", description=ONE_OF)
    group_ids: Texts | None = Field(
        default=None, alias="group_id[]", description=ONE_OF
    )
    entity_ids: Texts | None = Field(
        default=None, alias="entity_id[]", description=ONE_OF
    )
    event_types: Texts | None = Field(
        default=None, alias="event_type[]", description=ONE_OF
    )
    partition: Number | None = None
    record_offset: Number | None = Field(default=None, description="Kafka's offset.")
    since: Moment | None = None
    until: Moment | None = Field(default=None, description="Exclusive.")
    by: By = Field(default="recorded", description="What since and until mean.")
    offset: Number = Field(default=0, description="Rows to pass over.")
    cursor: str | None = Field(
        default=None,
        max_length=200,
        description="Where the page before ended; from its Link header.",
    )

    def chosen(self) -> Chosen:
        """Return the filters."""
        return Chosen(
            equal=self._equal(), since=self.since, until=self.until, by=self.by
        )

    def page(self) -> Page:
        """Return the part that is wanted.

        Raises:
            UsageError: The cursor is none of ours, or of another list.
        """
        if self.cursor is None:
            return Page(limit=self.limit, offset=self.offset)
        if self.offset:
            msg = "offset and cursor exclude each other"
            raise UsageError(msg)
        return Page(limit=self.limit, after=self._place(self.cursor))

    def next_cursor(self, place: Place) -> str:
        """Return the cursor of the page that begins past a row."""
        event_time, kept, identifier = place
        happened = "" if event_time is None else str(to_micros(event_time))
        text = f"{happened}.{to_micros(kept)}.{identifier}"
        return f"{text}.{self._seal(text)}"

    def _place(self, cursor: str) -> Place:
        text, _, seal = cursor.rpartition(".")
        try:
            if seal == self._seal(text):
                return _place_of(text)
        except (ValueError, OverflowError):
            pass  # Sealed by somebody else: the seal is no secret.
        msg = "cursor is none of this list with these filters; begin without it"
        raise UsageError(msg)

    def _seal(self, text: str) -> str:
        """Return what tells a cut cursor, or one of another list, from a good one.

        It is no secret: a cursor shows nothing that the list does not.
        """
        facts = [type(self).__name__, msgspec.to_builtins(self.chosen()), text]
        return blake2b(msgspec.json.encode(facts), digest_size=8).hexdigest()

    def _equal(self) -> dict[str, Any]:
        return {
            "topic": _wanted("topic", self.topic, self.topics),
            "group_id": _wanted("group_id", self.group_id, self.group_ids),
            "entity_id": _wanted("entity_id", self.entity_id, self.entity_ids),
            "event_type": _wanted("event_type", self.event_type, self.event_types),
            "partition": self.partition,
            "offset": self.record_offset,
        }


def _wanted(
    name: str, one: str | None, some: list[str] | None
) -> str | tuple[str, ...] | None:
    """Return the value of a filter, or those of which it takes any."""
    if some is None:
        return one
    if one is not None:
        msg = f"{name} and {name}[] exclude each other"
        raise UsageError(msg)
    return tuple(some)


def _place_of(text: str) -> Place:
    happened, kept, identifier = text.split(".")
    event_time = from_micros(int(happened)) if happened else None
    if not 0 <= int(identifier) <= MAX_NUMBER:
        raise ValueError(identifier)
    return event_time, from_micros(int(kept)), int(identifier)


class EventQuery(ListQuery):
    """Which events are wanted."""

    after: Number | None = Field(default=None, description="Past this position.")
    before: Number | None = Field(default=None, description="Below this position.")

    @override
    def chosen(self) -> Chosen:
        """Return the filters."""
        return msgspec.structs.replace(
            super().chosen(), after=self.after, before=self.before
        )


class FailureQuery(ListQuery):
    """Which failures are wanted."""

    fingerprint: Text | None = None
    error_class: Text | None = None

    @override
    def _equal(self) -> dict[str, Any]:
        mine = {"fingerprint": self.fingerprint, "error_class": self.error_class}
        return super()._equal() | mine


class Because(Query):
    """Why something is done, for the audit trail."""

    reason: Reason | None = None


class RetryQuery(Because):
    """How one failure is retried, and why."""

    dry_run: bool = Field(
        default=False,
        description="Call the handlers, tell what would come of it, roll it back.",
    )


class FailureFilterBody(Body):
    """Which failures are meant, and why; at least one filter, or all of them."""

    ids: list[Identifier] | None = Field(default=None, min_length=1, max_length=1000)
    fingerprint: Text | None = None
    topic: Text | None = None
    group_id: Text | None = None
    error_class: Text | None = None
    all: bool = Field(default=False, description="Needed where no filter is given.")
    dry_run: bool = Field(
        default=False,
        description="Of a retry: call the handlers for the first 500, tell what would "
        "come of it, roll it back. Of a discard: count.",
    )
    reason: Reason | None = None

    def chosen(self) -> dict[str, Any]:
        """Return the filters.

        Raises:
            UsageError: None was given, and nobody said that all are meant.
        """
        given = {
            "ids": None if self.ids is None else tuple(self.ids),
            "fingerprint": self.fingerprint,
            "topic": self.topic,
            "group": self.group_id,
            "error_class": self.error_class,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        if bool(chosen) == self.all:
            msg = 'give filters, or "all": true without any'
            raise UsageError(msg)
        return chosen


class ReasonBody(Body):
    """Why something is done, for the audit trail."""

    reason: Reason | None = None


class RowQuery(Limited):
    """Which rows of a projection are wanted."""

    key: Text | None = Field(default=None, description="Parts are joined by /.")
    after: Text | None = Field(default=None, description="Only rows past this key.")
    build: Identifier | None = Field(default=None, description="Not the live one.")
    offset: Number = Field(default=0, description="Rows to pass over.")


class KeyQuery(Limited):
    """Which row is explained."""

    key: Text = Field(description="Parts are joined by /.")


class DiffQuery(Query):
    """Which builds are compared."""

    old: Identifier | None = Field(default=None, description="The live one.")
    new: Identifier | None = Field(default=None, description="The newest other one.")


class ParkedQuery(Limited):
    """Which parked keys of a projection are wanted."""

    build: Identifier | None = Field(default=None, description="Not the live one.")
    offset: Number = Field(default=0, description="Keys to pass over.")


class RetryBody(Body):
    """Which parked keys are folded on, and why."""

    keys: list[Text] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="As they are listed; parts are joined by /.",
    )
    all: bool = Field(default=False, description="Needed where no keys are given.")
    dry_run: bool = Field(default=False, description="Tell the outcome, keep nothing.")
    reason: Reason | None = None

    def chosen(self) -> list[str] | None:
        """Return the keys; None means all.

        Raises:
            UsageError: None was given, and nobody said that all are meant.
        """
        if (self.keys is not None) == self.all:
            msg = 'give keys, or "all": true without any'
            raise UsageError(msg)
        return self.keys


MaxChanged = Annotated[str, Field(pattern=r"^[0-9]{1,12}(\.[0-9]{1,6})?%?$")]


class PromoteBody(Body):
    """How a shadow is promoted."""

    max_changed: MaxChanged | None = None
    reason: Reason | None = None


class UndoBody(Body):
    """How a promotion is undone."""

    behind: bool = Field(default=False, description="Even if it cannot catch up.")
    reason: Reason | None = None


class Coordinates(Body):
    """A record of a topic."""

    topic: Text
    partition: Number
    offset: Number


class ReplayBody(Body):
    """What is replayed: as `kappa-log replay` takes it."""

    projection: Text
    since: Moment | None = None
    from_position: Identifier | None = None
    from_offset: Coordinates | None = None
    until: Moment | None = None
    by: By = "recorded"
    dry_run: bool = False
    promote: bool = True
    max_changed: MaxChanged | None = None
    on_error: OnError = Field(
        default="stop", description="Whether a fold that raises parks its key."
    )
    reason: Reason | None = None
    source: From = Field(
        default="sql",
        description="Where events are read: the database, or the configured archive "
        "as far as it reaches.",
    )

    def request(self) -> dict[str, Any]:
        """Return it as `KappaLog.replay` takes it."""
        at = self.from_offset
        return {
            "since": self.since,
            "from_position": self.from_position,
            "from_offset": None if at is None else (at.topic, at.partition, at.offset),
            "until": self.until,
            "by": self.by,
            "promote": self.promote,
            "max_changed": self.max_changed,
            "on_error": self.on_error,
            "reason": self.reason,
            "source": self.source,
        }


class ReplayQuery(Limited):
    """Which replays are wanted."""

    projection: Text | None = None
    unfinished: bool = False


class VerifyBody(Body):
    """What is verified."""

    head: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    projections: list[Text] = Field(default=[], max_length=100)
