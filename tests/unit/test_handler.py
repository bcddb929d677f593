"""Handler: what ack accepts, what field options pick, how handlers are loaded."""

from __future__ import annotations

import sys
from datetime import UTC, date, datetime, timedelta, timezone
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from kappa_log.errors import ConfigError, DecodeError, UsageError
from kappa_log.handler import (
    Ack,
    FieldHandler,
    FieldOptions,
    Handler,
    Metadata,
    ack,
    is_overridden,
    key_of,
    load_handler,
    pick,
    split_path,
)

METADATA = Metadata("l", "g", "t", 0, 0, None, None, (), 0, None, "00")


class Kind(StrEnum):
    """An event type as many declare it."""

    ORDER = "order"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ("ada", "ada"),
        ("", ""),
        (7, "7"),
        (-(2**70), "-1180591620717411303424"),
        (Kind.ORDER, "order"),
        ("ä" * 512, "ä" * 512),
    ],
)
def test_an_entity_is_text_or_a_whole_number(given: Any, kept: str | None) -> None:
    """SEED H3, H16: a number becomes its digits, as SQL and files write it."""
    assert ack(given, None).entity_id == kept


@pytest.mark.parametrize("name", ["entity_id", "event_type", "event_version"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (True, "is bool"),
        (1.5, "is float"),
        (b"x", "is bytes"),
        (["x"], "is list"),
        ("a\0b", "NUL"),
        ("a" * 1025, "1025 bytes"),
        (10**1025, "1026 bytes"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_other_identifiers_are_refused_and_named(
    name: str, given: Any, message: str
) -> None:
    """SEED H16: what a database could not index, or would turn into something else."""
    arguments: dict[str, Any] = {"entity_id": None, "event_time": None, name: given}

    with pytest.raises(DecodeError, match=f"{name}.*{message}"):
        ack(**arguments)


@pytest.mark.parametrize(
    ("given", "micros"),
    [
        (None, None),
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(1970, 1, 1, 5, 30, 0, 1, timezone(timedelta(hours=5.5))), 1),
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00.000001+00:00", 1),
        ("1970-01-01 01:00:00+01:00", 0),
        ("19700101T000000Z", 0),
        ("0001-01-01T00:00:00Z", -62_135_596_800_000_000),
    ],
)
def test_a_time_is_an_instant(given: Any, micros: int | None) -> None:
    """SEED H3, H16: aware datetimes and ISO 8601 text with an offset."""
    assert ack(None, given).event_time == micros


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (datetime(2024, 1, 1), "has no zone"),  # noqa: DTZ001
        ("2024-01-01T00:00:00", "has no zone"),
        ("2024-01-01", "has no zone"),
        ("2024-02-30T00:00:00Z", "no ISO 8601 time"),
        ("2024-01-01T25:00:00Z", "no ISO 8601 time"),
        ("10000-01-01T00:00:00Z", "no ISO 8601 time"),
        ("9999-12-31T23:59:59-01:00", "outside the years 1 to 9999"),
        ("yesterday", "no ISO 8601 time"),
        ("", "no ISO 8601 time"),
        (1_700_000_000, "is int"),
        (1.5, "is float"),
        (date(2024, 1, 1), "is date"),
    ],
)
def test_a_time_that_is_no_instant_is_refused(given: Any, message: str) -> None:
    """SEED H16: naive, impossible, unreadable, or a number whose unit nobody knows."""
    with pytest.raises(DecodeError, match=f"event_time.*{message}"):
        ack(None, given)


def test_a_version_may_be_a_number() -> None:
    """SEED H3: schemas are numbered by many."""
    assert ack("a", None, "order", 2) == Ack("a", None, "order", "2")


def test_fields_become_columns() -> None:
    """Dotted paths lead into the payload; what no option names stays NULL."""
    fields = FieldOptions("customer.id", "at", None, "v")
    payload = {"customer": {"id": 7}, "at": "1970-01-01T00:00:01Z", "v": None}

    assert FieldHandler(fields).consume(payload, METADATA) == Ack(
        "7", 1_000_000, None, None
    )


@pytest.mark.parametrize("payload", [{}, [], "text", 5, None, {"a": None}, {"a": []}])
def test_a_missing_field_is_refused_by_its_path(payload: object) -> None:
    """Whatever the record is instead; a null at the end of the path is NULL."""
    with pytest.raises(DecodeError, match=r"no field 'a.b'"):
        pick(payload, ("a", "b"))
    assert pick({"a": {"b": None}}, ("a", "b")) is None


@pytest.mark.parametrize(
    ("value", "key"), [("ä", "ä".encode()), (7, b"7"), ("", b""), (None, None)]
)
def test_a_key_is_utf8_bytes(value: object, key: bytes | None) -> None:
    """Text and whole numbers; a null is no key, which differs from an empty one."""
    assert key_of({"k": value}, ("k",)) == key


@pytest.mark.parametrize("value", [True, 1.5, [], {}])
def test_what_is_no_text_is_no_key(value: object) -> None:
    """Nobody could tell in which spelling it would be the same key."""
    with pytest.raises(DecodeError, match="'k' is no text or whole number"):
        key_of({"k": value}, ("k",))


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b"])
def test_a_path_is_names_joined_by_dots(path: str) -> None:
    """A typo is refused before a record is read."""
    with pytest.raises(UsageError, match="not names joined by dots"):
        split_path("--key", path)


@pytest.mark.parametrize(
    ("path", "why"), [("a\0b", "NUL"), ("a.\udcff", "lone surrogate")]
)
def test_a_path_is_text_that_databases_keep(path: str, why: str) -> None:
    """Bytes of a shell may be none; the option is named."""
    for name in ("entity_id", "event_time", "event_type", "event_version"):
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(UsageError, match=f"{option} contains a {why}"):
            FieldHandler(FieldOptions(**{name: path}))
    with pytest.raises(UsageError, match=f"--key contains a {why}"):
        split_path("--key", path)


def test_the_base_handler_decides_nothing() -> None:
    """SEED H22: consume must be written; hooks have defaults that do nothing."""
    plain = Handler()

    with pytest.raises(NotImplementedError):
        plain.consume({}, METADATA)
    assert plain.around_consume(5, METADATA, lambda payload: payload + 1) == 6
    assert plain.entity_id({}) is plain.event_time({}) is None
    assert plain.event_type({}) is plain.event_version({}) is None
    plain.start()
    plain.stop()
    assert not is_overridden(plain, "entity_id")


HANDLERS = """
import sys
from kappa_log import Handler

class Good(Handler):
    def consume(self, payload, metadata):
        return None

class Mute(Handler):
    def entity_id(self, payload):
        return 1

class Odd(Handler):
    async def consume(self, payload, metadata):
        return None

    def around_consume(self, payload, metadata):
        return None

def function(payload, metadata, more=None):
    return payload, metadata

def one(payload):
    return None

def yields(payload, metadata):
    yield 1

class Broken(Handler):
    def __init__(self):
        raise RuntimeError("no settings")

class Leaves(Handler):
    def __init__(self):
        sys.exit(3)

class Stranger:
    pass

number = 5
"""


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of a user's handlers on the path."""
    (tmp_path / "some_handlers.py").write_text(HANDLERS)
    (tmp_path / "broken_handlers.py").write_text("1 / 0")
    (tmp_path / "leaving_handlers.py").write_text("import sys; sys.exit(4)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_handlers", raising=False)


@pytest.mark.usefixtures("handlers")
def test_a_handler_is_loaded_by_module_and_class() -> None:
    """SEED H2: a new object each time: no state is shared."""
    first = load_handler("some_handlers:Good")

    assert type(first).__name__ == "Good"
    assert load_handler("some_handlers:Good") is not first


@pytest.mark.usefixtures("handlers")
def test_a_plain_function_is_a_handler() -> None:
    """It decides, and has no hooks; SEED H1 wanted a class."""
    handler = load_handler("some_handlers:function")

    assert handler.consume(1, METADATA) == (1, METADATA)
    assert not is_overridden(handler, "retry_consume")
    assert handler.entity_id({}) is None


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("some_handlers", "not of the form module:Class"),
        (":Good", "not of the form module:Class"),
        ("some_handlers:", "not of the form module:Class"),
        (
            "no_such_module:Good",
            (
                "cannot be imported: ModuleNotFoundError: "
                "No module named 'no_such_module'$"
            ),
        ),
        (
            "broken_handlers:Good",
            "cannot be imported: ZeroDivisionError.* at broken_handlers.py, line",
        ),
        ("leaving_handlers:Good", "cannot be imported: SystemExit"),
        ("some_handlers:Missing", "module some_handlers has no Missing"),
        ("some_handlers:Mute", r"Mute has no method consume\(payload, metadata\)"),
        ("some_handlers:Odd", "Odd.consume is async or yields; it must return"),
        ("some_handlers:Odd", "; Odd.around_consume cannot be called with .*proceed"),
        ("some_handlers:one", r"one cannot be called with \(payload, metadata\): too"),
        ("some_handlers:yields", "yields is async or yields"),
        ("some_handlers:Stranger", "Stranger is no subclass of kappa_log.Handler"),
        ("some_handlers:number", "5 is no subclass of kappa_log.Handler, and no fun"),
        (
            "some_handlers:Broken",
            "cannot be made: RuntimeError.*no settings at __init__, line",
        ),
        ("some_handlers:Leaves", "cannot be made: SystemExit"),
    ],
)
def test_a_handler_that_cannot_be_loaded_is_a_wrong_setting(
    path: str, message: str
) -> None:
    """SEED F11: the message names the setting's value and what is wrong with it."""
    with pytest.raises(ConfigError, match=f"handler '{path}'.*{message}"):
        load_handler(path)
