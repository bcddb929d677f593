"""Listeners: the user's handlers decide; and dedupe drops nothing for good."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kappa_log import FieldOptions, KappaLog, ingest
from kappa_log.config import load_config
from kappa_log.errors import (
    ConfigError,
    HandlerError,
    NotFound,
    SourceError,
    UsageError,
)

_numbers = count()

HANDLERS = """
import sys
from datetime import UTC, datetime
from enum import StrEnum
from msgspec.structs import replace
from kappa_log import Handler, ack

CALLS = []

class Kind(StrEnum):
    ORDER = "order"

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("not now")

class Orders(Handler):
    def start(self):
        CALLS.append("start")

    def stop(self):
        CALLS.append("stop")

    def around_consume(self, payload, metadata, proceed):
        CALLS.append((metadata.offset, metadata.message_id))
        if payload.get("do") == "never":
            return None
        return proceed({**payload, "wrapped": True})

    def consume(self, payload, metadata):
        assert payload["wrapped"]
        match payload.get("do"):
            case "skip": return "anything else"
            case "raise": raise ValueError("no such order")
            case "exit": sys.exit(0)
            case "nul": raise ValueError("a\\0b")
            case "surrogate": raise ValueError("\\udcff")
            case "long": raise ValueError("\\u00e4" * 100_000)
            case "lines":
                raise ValueError("\\n".join(f"line {n}" for n in range(20_000)))
            case "unprintable": raise Unprintable
            case "naive": return ack("a", datetime(2024, 1, 1))
            case "bytes": return ack(b"a", None)
            case "lone": return ack("\\ud800", None)
        return ack(payload["id"], datetime(2024, 1, 1, tzinfo=UTC), Kind.ORDER, 2)

    def entity_id(self, payload):
        return payload["id"]

    def event_time(self, payload):
        return "nonsense" if payload.get("do") == "exit" else "2024-05-05T00:00:00Z"

    def event_type(self, payload):
        if payload.get("do") == "nul":
            sys.exit(5)
        if payload.get("do") == "raise":
            raise RuntimeError("nobody knows")
        return "failed-order"

class Quiet(Handler):
    def consume(self, payload, metadata):
        return ack(None, None)

class Ported(Handler):
    def around_consume(self, payload, metadata, proceed):
        if "as" in payload:
            metadata = replace(metadata, topic=payload["as"])
        return proceed(payload, metadata)

    def consume(self, payload, metadata):
        return ack(metadata.topic, None)

class NoStart(Quiet):
    def start(self):
        raise RuntimeError("no settings")

class NoStop(Quiet):
    def stop(self):
        sys.exit(4)

class Telling(Handler):
    def around_consume(self, payload, metadata, proceed):
        if payload.get("do") == "never":
            raise ValueError("before consume")
        return proceed({"id": f"seen-{payload['id']}", "do": payload.get("do")})

    def consume(self, payload, metadata):
        raise ValueError("no such order")

    def entity_id(self, payload):
        CALLS.append(("entity_id", payload["id"]))
        if payload["do"] == "write":
            import kappa_log.ingest
            assert kappa_log.ingest.WRITING == []
        return payload["id"]
"""

LISTENER = """
[[listeners]]
topic = "orders"
group_id = "{group}"
handler = "{module}:{handler}"
{more}
"""


class Shop:
    """A folder with handlers of its own, and a log."""

    def __init__(self, url: str, folder: Path) -> None:
        """Write the handlers into a module that no other test has."""
        self.url = url
        self.folder = folder
        self.module = f"shop_handlers_{next(_numbers)}"
        (folder / f"{self.module}.py").write_text(HANDLERS)

    def open(self, *groups: str, handler: str = "Orders", more: str = "") -> KappaLog:
        """Return the log with a listener for each of these groups."""
        text = "".join(
            LISTENER.format(group=g, module=self.module, handler=handler, more=more)
            for g in groups
        )
        (self.folder / "kappa_log.toml").write_text(text)
        app = KappaLog(config=load_config(self.folder, {"database.url": self.url}))
        app.create_database()
        return app

    def lines(self, *lines: str, name: str = "orders.jsonl") -> Path:
        """Write a file of lines."""
        file = self.folder / name
        file.write_text("".join(line + "\n" for line in lines))
        return file

    @property
    def calls(self) -> list[Any]:
        """What the handlers noted."""
        import sys

        return list(sys.modules[self.module].CALLS)


@pytest.fixture
def shop(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A shop over an empty database."""
    monkeypatch.syspath_prepend(tmp_path)
    return Shop(database_url, tmp_path)


def test_a_handler_decides_about_each_record(shop: Shop) -> None:
    """Ack keeps, all else skips, around_consume sees and may change the payload.

    SEED H1, H4, H5, H17.
    """
    file = shop.lines(
        '{"id":"ada"}', '{"do":"skip"}', '{"do":"never"}', '{"id":7}', '{"id":null}'
    )
    with shop.open("billing") as app:
        before = app.now()
        report = app.ingest(file, topic="orders")

        counts = report.counts
        assert (counts.acked, counts.skipped, counts.failed) == (3, 2, 0)
        assert report.group_id == "billing"
        events = app.events(topic="orders", oldest_first=True)
        assert [event.entity_id for event in events] == ["ada", "7", None]
        assert all(before <= event.recorded_at <= app.now() for event in events)
        assert {(e.event_type, e.event_version) for e in events} == {("order", "2")}
        assert events[0].payload == {"id": "ada"}  # As received, not as wrapped.
        assert app.verify().ok
        assert [call for call in shop.calls if isinstance(call, str)] == [
            "start",
            "stop",
        ]
        seen = [call for call in shop.calls if not isinstance(call, str)]
        assert [offset for offset, _ in seen] == [0, 1, 2, 3, 4]
        assert seen[0][1] == events[0].message_id


def test_metadata_may_be_passed_on_with_the_payload(shop: Shop) -> None:
    """As Ruby's yield did; other metadata are consume's alone."""
    file = shop.lines('{"n":1}', '{"as":"refunds"}')
    with shop.open("billing", handler="Ported") as app:
        app.ingest(file, topic="orders")
        found = [(event.entity_id, event.topic) for event in app.events()]

    assert found == [("refunds", "orders"), ("orders", "orders")]


FAILURES = [
    ("raise", "ValueError", "no such order", ("ada", True, None)),
    ("exit", "SystemExit", "0", ("ada", False, "failed-order")),
    ("nul", "ValueError", "a\\x00b", ("ada", True, None)),
    ("surrogate", "ValueError", "\\udcff", ("ada", True, "failed-order")),
    ("long", "ValueError", "\u00e4\u00e4", ("ada", True, "failed-order")),
    ("lines", "ValueError", "line 1", ("ada", True, "failed-order")),
    ("unprintable", "Unprintable", "cannot be read", ("ada", True, "failed-order")),
    ("naive", "DecodeError", "has no zone", ("ada", True, "failed-order")),
    ("bytes", "DecodeError", "entity_id is bytes", ("ada", True, "failed-order")),
    ("lone", "DecodeError", "lone surrogate", ("ada", True, "failed-order")),
]


@pytest.mark.parametrize(("do", "name", "message", "told"), FAILURES)
def test_a_handler_that_raises_leaves_a_failure_whole(
    shop: Shop, do: str, name: str, message: str, told: tuple[str, bool, str | None]
) -> None:
    """With class, message, backtrace, fingerprint, and what its extractors can tell.

    SEED F8, F9, F10.
    """
    line = f'{{"id":"ada","do":"{do}"}}'
    file = shop.lines('{"id":1}', line, '{"id":2}', line + " ")
    with shop.open("billing") as app:
        report = app.ingest(file, topic="orders")

        assert (report.counts.acked, report.counts.failed) == (2, 2)
        second, first = app.failures()
        assert (first.offset, first.value) == (1, line.encode())
        assert first.error_class == name
        assert message in (first.error_message or "")
        assert (first.error_message or "").isprintable() or do == "lines"
        # It begins with the user's code, not with ours that called it.
        assert "Traceback" in first.error_backtrace[0]
        assert f"{shop.module}.py" in first.error_backtrace[1]
        assert sum(map(len, first.error_backtrace)) < 80_000
        "".join(first.error_backtrace).encode()
        assert first.fingerprint == second.fingerprint
        found = (first.entity_id, first.event_time is not None, first.event_type)
        assert found == told
        assert [first.id, second.id] == report.failure_ids
        assert app.failure(first.id) == first
        assert app.verify().ok


def test_extractors_get_what_consume_received(shop: Shop) -> None:
    """SEED F9, F10: not what was decoded; what never came to consume tells nothing."""
    file = shop.lines('{"id":"ada"}', '{"id":"bob","do":"never"}')
    with shop.open("billing", handler="Telling") as app:
        app.ingest(file, topic="orders")

        bob, ada = app.failures()
        assert (ada.entity_id, bob.entity_id) == ("seen-ada", None)
        assert shop.calls == [("entity_id", "seen-ada")]


def test_extractors_are_called_with_no_transaction_open(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they wait for, nobody waits for them at the head's lock."""
    file = shop.lines('{"id":"ada","do":"write"}')
    with shop.open("billing", handler="Telling") as app:
        open_: list[str] = []
        monkeypatch.setattr(ingest, "WRITING", open_, raising=False)
        write = app.database.write

        @contextmanager
        def noted(**how: Any) -> Iterator[Any]:
            with write(**how) as connection:
                open_.append("write")
                yield connection
                open_.clear()

        monkeypatch.setattr(app.database, "write", noted)
        app.ingest(file, topic="orders")

        assert app.failures()[0].entity_id == "seen-ada"


def test_a_handler_that_cannot_start_reads_nothing(shop: Shop) -> None:
    """Handler and hook are named; nobody who reads the file is fenced."""
    file = shop.lines('{"id":1}')
    with shop.open("billing", handler="NoStart") as app:
        with pytest.raises(
            HandlerError,
            match=rf"{shop.module}:NoStart: start\(\) raised RuntimeError: no settings",
        ) as caught:
            app.ingest(file, topic="orders")

        assert (caught.value.hook, app.sources()) == ("start", {})


def test_a_handler_that_cannot_stop_keeps_what_was_committed(shop: Shop) -> None:
    """Handler and hook are named."""
    file = shop.lines('{"id":1}')
    with shop.open("billing", handler="NoStop") as app:
        with pytest.raises(
            HandlerError, match=r"NoStop: stop\(\) raised SystemExit: 4; .*is kept"
        ):
            app.ingest(file, topic="orders")
        assert app.head().position == 1


def test_a_handler_that_cannot_stop_hides_no_earlier_error(shop: Shop) -> None:
    """The first one says why the run ended; the second is a note to it."""
    file = shop.lines('{"id":1}')
    with shop.open("billing", handler="NoStop") as app:
        file.unlink()

        with pytest.raises(SourceError, match="No such file") as caught:
            app.ingest(file, topic="orders")

        assert any("stop() raised" in note for note in caught.value.__notes__)


def test_failures_group_by_class_and_place(shop: Shop) -> None:
    """One broken handler is one group, however many records it fails on."""
    file = shop.lines(
        '{"do":"raise","n":1}',
        '{"do":"raise","n":2}',
        '{"do":"exit"}',
        "nonsense",
        "{}",
    )
    with shop.open("billing") as app:
        app.ingest(file, topic="orders")

        prints = [failure.fingerprint for failure in reversed(app.failures())]
        assert prints[0] == prints[1]
        assert len(set(prints)) == 4


def test_an_undecodable_record_never_reaches_the_handler(shop: Shop) -> None:
    """SEED H14: its extractors have nothing to read either."""
    file = shop.lines("nonsense")
    with shop.open("billing") as app:
        app.ingest(file, topic="orders")

        (failure,) = app.failures()
        assert (failure.error_class, failure.entity_id) == ("DecodeError", None)
        assert shop.calls == ["start", "stop"]


def test_field_options_and_dedupe_are_refused_beside_a_listener(shop: Shop) -> None:
    """Two would decide; nothing is read."""
    file = shop.lines('{"id":1}')
    with shop.open("billing") as app:
        for options in ({"fields": FieldOptions(entity_id="id")}, {"dedupe": "offset"}):
            with pytest.raises(UsageError, match=r"'orders' has a listener.*leave"):
                app.ingest(file, topic="orders", **options)
        assert app.sources() == {}


def test_of_several_listeners_one_must_be_picked(shop: Shop) -> None:
    """SEED F11: the groups are named; each group has events of its own."""
    file = shop.lines('{"id":1}')
    with shop.open("billing", "shipping") as app:
        with pytest.raises(
            UsageError, match=r"listeners for the groups billing, shipping; .*--group"
        ):
            app.ingest(file, topic="orders")

        for group in ("shipping", "billing"):
            report = app.ingest(file, topic="orders", group=group)
            assert (report.group_id, report.counts.acked) == (group, 1)
        assert app.verify().ok


def test_what_fails_in_two_groups_is_a_failure_of_each(shop: Shop) -> None:
    """SEED F14: the second one was dropped without a trace."""
    file = shop.lines('{"id":"ada","do":"raise"}')
    with shop.open("billing", "shipping") as app:
        for group in ("billing", "shipping"):
            app.ingest(file, topic="orders", group=group)

        found = app.failures()
        assert sorted(failure.group_id for failure in found) == ["billing", "shipping"]
        assert len({failure.checksum for failure in found}) == 1


def test_a_group_that_no_listener_of_the_topic_has_is_refused(shop: Shop) -> None:
    """A typo would put the records under a group of its own, past the handler."""
    file = shop.lines('{"id":1}')
    with shop.open("billing", "shipping") as app:
        with pytest.raises(
            UsageError, match="groups billing, shipping, none for 'biling'"
        ):
            app.ingest(file, topic="orders", group="biling")
        assert app.sources() == {}
        assert app.ingest(file, topic="others", group="biling").counts.acked == 1


def test_options_that_are_no_text_are_refused_by_name(shop: Shop) -> None:
    """A shell passes on bytes that are none."""
    file = shop.lines('{"id":1}')
    with shop.open() as app:
        for options, name in (
            ({"fields": FieldOptions(entity_id="\udcff")}, "--entity-id"),
            ({"fields": FieldOptions(key="a\0")}, "--key"),
            ({"dedupe": "header:\udcff"}, "dedupe"),
            ({"group": "\udcff"}, "group"),
        ):
            with pytest.raises(UsageError, match=f"^{name} contains"):
                app.ingest(file, topic="orders", **options)
        assert app.sources() == {}


@pytest.mark.parametrize(
    ("more", "handler", "message"),
    [
        ("", "Missing", "has no Missing"),
        ('decoder = "jsn"', "Orders", "decoder 'jsn' is not known; use one of: json"),
        (
            'dedupe = "payloads"',
            "Orders",
            r"dedupe 'payloads' is not known; use payload",
        ),
        ('dedupes = "payload"', "Orders", "did you mean dedupe"),
        ('park = "all"', "Orders", "park"),
        ("max_retries = -1", "Orders", "max_retries"),
    ],
)
def test_a_wrong_listener_is_a_wrong_setting(
    shop: Shop, more: str, handler: str, message: str
) -> None:
    """SEED F11: the message names the alternatives; nothing is read."""
    file = shop.lines('{"id":1}')

    with (
        pytest.raises(ConfigError, match=message),
        shop.open("billing", more=more, handler=handler) as app,
    ):
        app.ingest(file, topic="orders")


# --- resuming -----------------------------------------------------------------

ENTITY = FieldOptions(entity_id="id")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": FieldOptions(entity_id="other")}, "field options"),
        ({"fields": None}, "field options"),
        ({"fields": ENTITY, "dedupe": "offset"}, "--dedupe payload, now with offset"),
    ],
)
def test_resuming_with_other_options_is_refused(
    shop: Shop, options: dict[str, Any], message: str
) -> None:
    """One file would be read by two rules; another source or group may be."""
    file = shop.lines('{"id":1}')
    with shop.open() as app:
        app.ingest(file, topic="orders", fields=ENTITY)
        shop.lines('{"id":1}', '{"id":2}')

        with pytest.raises(UsageError, match=f"{message}.*nothing was changed"):
            app.ingest(file, topic="orders", **options)

        assert app.head().position == 1
        app.ingest(file, topic="orders", group="other", **options)
        assert app.ingest(file, topic="orders", fields=ENTITY).counts.acked == 1


def test_resuming_under_a_listener_is_refused(shop: Shop) -> None:
    """What the field options began, a handler does not go on with."""
    file = shop.lines('{"id":1}')
    with shop.open() as app:
        app.ingest(file, topic="orders", group="billing", fields=ENTITY)

    with shop.open("billing") as app, pytest.raises(UsageError, match="of a listener"):
        app.ingest(file, topic="orders")


# --- dedupe -------------------------------------------------------------------

LINES = [
    '{"id":1,"k":"x"}',
    '{"id":1,"k":"x"}',  # The same payload and key.
    '{"id":2,"k":"x"}',
    '{"id":1, "k":"x"}',  # One byte more is another payload.
]


@pytest.mark.parametrize(
    ("dedupe", "repeats"),
    [("payload", {1: 1}), ("offset", {}), ("key+payload", {1: 1}), (None, {1: 1})],
)
def test_a_mode_says_what_is_a_duplicate(
    shop: Shop, dedupe: str | None, repeats: dict[int, int]
) -> None:
    """SEED H6, H7, H10: dropped ones are listed with the position that they repeat."""
    file = shop.lines(*LINES)
    with shop.open() as app:
        fields = FieldOptions(entity_id="id", key="k")
        report = app.ingest(file, topic="orders", fields=fields, dedupe=dedupe)

        assert report.counts.duplicate == len(repeats)
        assert report.counts.acked == len(LINES) - len(repeats)
        assert {d.offset: d.repeats for d in app.duplicates()} == repeats
        assert all(d.key == b"x" for d in app.duplicates())
        assert app.verify().ok


def test_skips_and_failures_make_no_duplicates(shop: Shop) -> None:
    """SEED H6, F14: only what is in the log can be repeated."""
    file = shop.lines('{"do":"skip"}', '{"do":"skip"}', "bad", "bad")
    with shop.open("billing") as app:
        counts = app.ingest(file, topic="orders").counts

        assert (counts.skipped, counts.failed, counts.duplicate) == (2, 2, 0)


def test_an_unknown_mode_is_refused_with_those_there_are(shop: Shop) -> None:
    """Before a line is read."""
    file = shop.lines('{"id":1}')
    with (
        shop.open() as app,
        pytest.raises(
            ConfigError,
            match=re.escape("use payload, offset, key+payload or header:NAME"),
        ),
    ):
        app.ingest(file, topic="orders", dedupe="paylod")


def test_a_mode_of_headers_makes_failures_of_lines(shop: Shop) -> None:
    """Lines have no headers; they are kept until somebody says what they are."""
    file = shop.lines('{"id":1}')
    with shop.open() as app:
        counts = app.ingest(file, topic="orders", dedupe="header:id").counts

        assert counts.failed == 1
        assert "no header 'id'" in (app.failures()[0].error_message or "")


def _by_fields(shop: Shop) -> tuple[Callable[[], KappaLog], FieldOptions | None]:
    return shop.open, FieldOptions(entity_id="id", key="k")


def _by_listener(shop: Shop) -> tuple[Callable[[], KappaLog], FieldOptions | None]:
    return (lambda: shop.open("billing")), None


@pytest.mark.parametrize("by", [_by_fields, _by_listener])
def test_a_duplicate_can_be_admitted_once(
    shop: Shop, by: Callable[[Shop], tuple[Callable[[], KappaLog], FieldOptions | None]]
) -> None:
    """SEED H7: it becomes an event of its own coordinates; dedupe loses nothing."""
    opened, fields = by(shop)
    file = shop.lines(*LINES)
    with opened() as app:
        app.ingest(file, topic="orders", fields=fields)
        (dropped,) = app.duplicates()

        position = app.admit(dropped.id, reason="two orders indeed")

        event = app.event(position)
        assert position == app.head().position == 4
        assert (event.offset, event.entity_id) == (1, "1")
        assert event.payload_text == LINES[1]
        assert event.key == (None if fields is None else b"x")
        assert event.message_id != app.event(1).message_id
        assert app.duplicates() == []
        with pytest.raises(NotFound, match=f"duplicate {dropped.id} not found"):
            app.admit(dropped.id)
        assert app.ingest(file, topic="orders", fields=fields).counts.seen == 0
        assert app.verify().ok


def test_a_duplicate_that_its_handler_refuses_stays_one(shop: Shop) -> None:
    """Nothing is changed, and the message says why."""
    file = shop.lines('{"id":1}', '{"id":1}')
    with shop.open("billing", handler="Quiet") as app:
        app.ingest(file, topic="orders")
    shop.folder.joinpath(f"{shop.module}.py").write_text("")
    for code, message in (
        ("return 5", "its handler skips it"),
        ("raise ValueError('no')", r"its handler raises ValueError\('no'\)"),
    ):
        module = f"later_handlers_{next(_numbers)}"
        (shop.folder / f"{module}.py").write_text(
            "from kappa_log import Handler\nclass Quiet(Handler):\n"
            f"    def consume(self, payload, metadata):\n        {code}\n"
        )
        shop.module = module
        with shop.open("billing", handler="Quiet") as app:
            (dropped,) = app.duplicates()
            with pytest.raises(UsageError, match=f"cannot be admitted: {message}"):
                app.admit(dropped.id)
            assert app.duplicates() == [dropped]
            assert app.head().position == 1


def test_the_same_file_under_another_name_is_all_duplicates(shop: Shop) -> None:
    """Identity is of the message, wherever it came from."""
    file = shop.lines(LINES[0], LINES[2])
    with shop.open() as app:
        app.ingest(file, topic="orders", fields=ENTITY)

        report = app.ingest(file, topic="orders", fields=ENTITY, source="again")

        assert (report.counts.acked, report.counts.duplicate) == (0, 2)
        assert [d.repeats for d in app.duplicates()] == [1, 2]
        assert {d.source for d in app.duplicates()} == {"file:again"}
        assert app.head().position == 2
        position = app.admit(app.duplicates()[0].id)
        assert app.sources()[app.event(position).source_id] == "file:again"
        assert app.verify().ok
