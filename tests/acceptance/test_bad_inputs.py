"""Bad input: a line becomes an event byte for byte, or a Failure that keeps it whole.

One table of lines and one of folds, both on both databases. Later kinds of input get
their rows here.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from typing_extensions import override

from kappa_log import Event, FieldOptions, KappaLog, Projection, projection
from kappa_log.errors import AlreadyRunning, ProjectionError
from kappa_log.storage.lists import Failure
from support.logs import open_log, rows


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of a database of this file's tests, each of which has a topic of its own."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('bad') / 'log.db'}"
        return
    with request.getfixturevalue("postgres_server").database() as url:
        yield url


@pytest.fixture(scope="module")
def log(
    shared_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KappaLog]:
    """Log over that database."""
    with open_log(shared_url, tmp_path_factory.mktemp("config")) as app:
        yield app


# --- lines --------------------------------------------------------------------

KEPT = ""
"""Outcome of a line that becomes an event."""

GOOD = b'{"id": "good", "at": "2024-01-01T00:00:00Z", "n": %d}'

ENTITY = FieldOptions(entity_id="id")
TIME = FieldOptions(event_time="at")
TYPE = FieldOptions(event_type="id", event_version="n")
KEY = FieldOptions(key="id")
DEEP = FieldOptions(entity_id="id", event_time="a.b")


class Row(NamedTuple):
    """Lines, what becomes of each, and why."""

    id: str
    lines: list[bytes]
    outcomes: list[str]
    """KEPT, or a part of the Failure's message."""
    reason: str
    fields: FieldOptions = FieldOptions()


def entity(text: str) -> bytes:
    """Return a line with this JSON as its entity."""
    return f'{{"id":{text}}}'.encode()


def at(text: str) -> bytes:
    """Return a line with this JSON as its event time."""
    return f'{{"at":{text}}}'.encode()


LINES = [
    # What is JSON, and what is not.
    Row("null", [b"null"], [KEPT], "JSON null is a payload; only Kafka has tombstones"),
    Row(
        "scalars",
        [b"5", b'"text"', b"true", b"[]", b"{}"],
        [KEPT] * 5,
        "any JSON value is a payload where no field is asked for",
    ),
    Row("spaces", [b' { "a" : [ 1 , 2 ] } \t'], [KEPT], "kept byte for byte"),
    Row("crlf", [b'{"a":1}\r\n'], [KEPT], "the line end is no part of the value"),
    Row("not-json", [b"hello", b"{", b"{'a':1}"], ["JSON"] * 3, "kept as a Failure"),
    Row(
        "two-documents", [b"{} {}", b"{},"], ["trailing"] * 2, "a line is one document"
    ),
    Row("nul-byte", [b"\x00", b'"\x00"'], ["JSON"] * 2, "control bytes are no JSON"),
    Row(
        "raw-escape", [b'"\x1b[31m"'], ["JSON"], "escapes a terminal obeys are no JSON"
    ),
    Row("not-utf8", [b"\xff\x00", b'"\xff"'], ["not UTF-8"] * 2, "no guessing"),
    Row("overlong", [b'"\xc0\x80"'], ["not UTF-8"], "overlong UTF-8 hides a NUL"),
    Row("cesu", [b'"\xed\xa0\x80"'], ["not UTF-8"], "a surrogate in UTF-8"),
    Row("bom", [b"\xef\xbb\xbf{}"], ["byte order mark"], "readers differ about it"),
    Row("utf-16", ['{"a":1}'.encode("utf-16")], ["not UTF-8"], "json.loads accepts it"),
    Row("utf-16-le", ['{"a":1}'.encode("utf-16-le")], ["JSON"], "so it does this"),
    Row(
        "gzip-in-a-line",
        [gzip.compress(b"1", mtime=0).replace(b"\n", b"")],
        ["not UTF-8"],
        "payloads are never inflated",
    ),
    # Text.
    Row("escaped-nul", [b'{"a":"\\u0000"}'], [KEPT], "in JSON text it is six letters"),
    Row(
        "lone-surrogate",
        [b'"\\ud800"', b'{"\\udc00":1}', b'"\\ud800\\u0061"'],
        ["lone surrogate"] * 3,
        "it would fail at the write, or in Arrow",
    ),
    Row("surrogate-pair", [b'"\\ud83d\\ude00"'], [KEPT], "a pair is one character"),
    Row(
        "hostile-text",
        [
            b'"<script>alert(1)</script>"',
            b'"=HYPERLINK(1)"',
            '"\u202e"'.encode(),
            b'"\\u001b]52;c;\\u0007"',
            b'"{{7*7}}"',
        ],
        [KEPT] * 5,
        "text is text; whoever shows it escapes it",
    ),
    # Numbers.
    Row("nan", [b"NaN", b'{"a":Infinity}', b"-Infinity"], ["JSON"] * 3, "no numbers"),
    Row("1e400", [b"1e400", b"-1e400"], ["range"] * 2, "json.loads makes it infinite"),
    Row(
        "large-integers",
        [b"9007199254740993", b"18446744073709551616", b"-" + b"9" * 100],
        [KEPT] * 3,
        "exact to the last digit; orjson makes a float of 2^64",
    ),
    Row("5000-digits", [b"1" * 5000], ["range"], "no quadratic work"),
    Row(
        "precise",
        [b"0.1000000000000000055511151231257827"],
        [KEPT],
        "a Decimal payload reads all digits",
    ),
    Row("one", [b"1", b"1.0", b"1e0", b"-0.0"], [KEPT] * 4, "identity is over bytes"),
    # Objects and nesting.
    Row(
        "duplicate-keys",
        [b'{"a":1,"a":2}', b'{"a":1,"\\u0061":1}', b'[{"b":{"c":1 , "c" :1}}]'],
        ["duplicate key"] * 3,
        "two readers would read two values",
    ),
    Row("512-levels", [b"[" * 512 + b"]" * 512], [KEPT], "the limit itself"),
    Row(
        "deeper",
        [b"[" * 513 + b"]" * 513, b'{"a":' * 100_000, b"[" * 100_000],
        ["512 levels", "JSON", "512 levels"],
        "nothing recurses over it",
    ),
    Row("1-MB", [b'"' + b"x" * 1_000_000 + b'"'], [KEPT], "a broker's largest record"),
    # Fields.
    Row(
        "missing-field",
        [b"{}", b"[]", b"5", b'"id"', b"null", b'{"ID":1}'],
        ["no field 'id'"] * 6,
        "a typo must not make events of nobody",
        ENTITY,
    ),
    Row("null-field", [b'{"id":null}'], [KEPT], "null is NULL, and said so", ENTITY),
    Row(
        "deep-field",
        [b'{"id":1,"a":{"b":null}}', b'{"id":1,"a":{}}', b'{"id":1,"a":[1]}'],
        [KEPT, "no field 'a.b'", "no field 'a.b'"],
        "a dotted path",
        DEEP,
    ),
    Row(
        "entity",
        [entity('"ada"'), entity("7"), entity('""'), entity('"' + "a" * 1024 + '"')],
        [KEPT] * 4,
        "text or a whole number",
        ENTITY,
    ),
    Row(
        "no-entity",
        [entity("1.0"), entity("true"), entity("[]"), entity("{}")],
        ["is float", "is bool", "is list", "is dict"],
        "nothing else identifies",
        ENTITY,
    ),
    Row(
        "entity-too-long",
        [
            entity('"' + "a" * 1025 + '"'),
            entity('"' + "\u00e4" * 513 + '"'),
            entity("9" * 3000),
            entity('"' + "key " * 2500 + '"'),
        ],
        ["1025 bytes", "1026 bytes", "3000 bytes", "10000 bytes"],
        "PostgreSQL could not index it; SQLite refuses alike",
        ENTITY,
    ),
    Row("entity-nul", [entity('"a\\u0000b"')], ["NUL"], "as PostgreSQL's text", ENTITY),
    Row(
        "type",
        [
            b'{"id":"order","n":2}',
            b'{"id":null,"n":null}',
            b'{"id":5,"n":"\\u0000"}',
            b'{"id":"' + b"x" * 1025 + b'","n":1}',
        ],
        [KEPT, KEPT, "event_version contains a NUL", "event_type has 1025 bytes"],
        "type and version are indexed too",
        TYPE,
    ),
    Row(
        "key",
        [
            b'{"id":"a\\u0000b"}',
            b'{"id":""}',
            b'{"id":null}',
            b'{"id":1}',
            b'{"id":[]}',
            b"{}",
            b"nonsense",
            b'{"id":"' + b"k" * 9000 + b'"}',
        ],
        [KEPT] * 4 + ["no text or whole number", "no field 'id'", "JSON", KEPT],
        "keys are bytes of any length; none differs from empty",
        KEY,
    ),
    # Times.
    Row(
        "time",
        [
            at('"2024-01-01T00:00:00Z"'),
            at('"2024-01-01T05:30:00.123456+05:30"'),
            at('"0001-01-01T00:00:00Z"'),
            at('"9999-12-31T23:59:59.999999Z"'),
            at("null"),
        ],
        [KEPT] * 5,
        "an offset makes it an instant",
        TIME,
    ),
    Row(
        "naive-time",
        [at('"2024-01-01T00:00:00"'), at('"2024-01-01"')],
        ["has no zone"] * 2,
        "nobody guesses a zone",
        TIME,
    ),
    Row(
        "impossible-time",
        [
            at('"2024-02-30T00:00:00Z"'),
            at('"2024-01-01T25:00Z"'),
            at('"soon"'),
            at('""'),
        ],
        ["no ISO 8601 time"] * 4,
        "not on any calendar",
        TIME,
    ),
    Row(
        "time-out-of-range",
        [
            at('"10000-01-01T00:00:00Z"'),
            at('"0001-01-01T00:00:00+14:00"'),
            at('"9999-12-31T23:59:59-14:00"'),
        ],
        ["no ISO 8601 time", "outside the years", "outside the years"],
        "it could be stored and never be read",
        TIME,
    ),
    Row(
        "time-as-number",
        [at("1700000000"), at("1.5"), at("true")],
        ["is int", "is float", "is bool"],
        "seconds or milliseconds, nobody can tell",
        TIME,
    ),
]


def assert_is_the_line(event: Event, line: bytes) -> None:
    """Check that an event has the bytes of its line."""
    assert (event.payload_text or "").encode() == line
    assert event.checksum == blake2b(line, digest_size=16).hexdigest()
    assert repr(event.payload) == repr(json.loads(line))


def assert_keeps_the_line(failure: Failure, line: bytes) -> None:
    """Check that a failure has the bytes of its line, and says what is wrong."""
    assert failure.value == line
    assert failure.checksum == blake2b(line, digest_size=16).hexdigest()
    assert failure.error_class == "DecodeError"
    assert failure.error_backtrace
    assert (failure.attempts, failure.parked) == (1, False)


@pytest.mark.parametrize("row", LINES, ids=lambda row: row.id)
def test_a_line_becomes_an_event_or_a_failure_whole(
    log: KappaLog, tmp_path: Path, row: Row
) -> None:
    """Between two good lines: nothing lost, nothing changed, nobody else harmed."""
    fine = [GOOD % 1, GOOD % 2] if row.id != "deep-field" else []
    lines = [*fine[:1], *(line.removesuffix(b"\r\n") for line in row.lines), *fine[1:]]
    outcomes = [*([KEPT] * len(fine[:1])), *row.outcomes, *([KEPT] * len(fine[1:]))]
    end = b"\r\n" if row.lines[0].endswith(b"\r\n") else b"\n"
    file = tmp_path / row.id
    file.write_bytes(end.join(lines) + end)
    head = log.head().position

    report = log.ingest(file, topic=row.id, fields=row.fields)

    events = log.events(topic=row.id, limit=100, oldest_first=True)
    failures = {f.offset: f for f in log.failures(limit=500) if f.topic == row.id}
    kept = [n for n, outcome in enumerate(outcomes) if outcome == KEPT]
    assert [event.offset for event in events] == kept
    assert [e.position for e in events] == [head + 1 + n for n in range(len(kept))]
    assert sorted(failures) == [n for n in range(len(lines)) if n not in kept]
    for event in events:
        assert_is_the_line(event, lines[event.offset])
    for offset, failure in failures.items():
        assert_keeps_the_line(failure, lines[offset])
        assert outcomes[offset] in (failure.error_message or "")
    assert report.counts.acked == len(kept)
    assert report.counts.failed == len(failures)
    assert report.counts.seen == report.lines == report.next_offset == len(lines)
    again = log.ingest(file, topic=row.id, fields=row.fields)
    assert (again.resumed_at, again.lines, again.counts.seen) == (len(lines), 0, 0)
    assert log.verify().ok


def test_a_blank_line_is_no_record(log: KappaLog, tmp_path: Path) -> None:
    """It takes an offset, so that offsets are line numbers; a file of none is fine."""
    file = tmp_path / "blank"
    file.write_bytes(b"\n1\n \t\n\r\n2\n\n")

    report = log.ingest(file, topic="blank")

    assert (report.lines, report.blank, report.counts.acked) == (6, 4, 2)
    assert [e.offset for e in log.events(topic="blank", oldest_first=True)] == [1, 4]
    file.write_bytes(b"\n1\n \t\n\r\n2\n\n\n\n")
    report = log.ingest(file, topic="blank")
    assert (report.lines, report.blank, report.counts.seen) == (2, 2, 0)
    assert log.verify().ok


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"half":'])
def test_a_file_without_records_changes_nothing(
    log: KappaLog, tmp_path: Path, content: bytes
) -> None:
    """Empty, blank, or its first line still being written."""
    file = tmp_path / f"nothing-{len(content)}"
    file.write_bytes(content)
    head = log.head()

    report = log.ingest(file, topic="nothing")

    assert (report.counts.seen, report.first_position) == (0, None)
    assert report.held_back is (content == b'{"half":')
    assert log.head() == head
    assert log.verify().ok


def test_keys_are_kept_as_bytes(log: KappaLog, tmp_path: Path) -> None:
    """A null key is no key, which differs from an empty one."""
    file = tmp_path / "keys"
    file.write_bytes(b'{"id":"a\\u0000"}\n{"id":""}\n{"id":null}\n{"id":7}\n')

    log.ingest(file, topic="keys", fields=KEY)

    found = log.events(topic="keys", oldest_first=True)
    assert [event.key for event in found] == [b"a\0", b"", None, b"7"]


@pytest.mark.parametrize(
    "topic", ["a" * 249, "../../etc/passwd", "a%2F..", "dots\u2024\u2025", "<b>'\";--"]
)
def test_a_topic_is_a_name_and_nothing_more(
    log: KappaLog, tmp_path: Path, topic: str
) -> None:
    """No path, no SQL, no markup: whatever it holds is kept and found again."""
    file = tmp_path / "topic"
    file.write_bytes(b"1\n")

    log.ingest(file, topic=topic)

    assert [event.topic for event in log.events(topic=topic)] == [topic]


# --- folds --------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """A state with a column of each kind that can refuse."""

    count: int = 0
    ratio: float = 0.0
    note: str = ""
    body: Any = None


class BadFold(NamedTuple):
    """What a fold does at the third event, and what the error says."""

    id: str
    result: Callable[[Total], Any]
    message: str


class Opaque:
    """Nothing that JSON knows."""


class Unprintable(Exception):
    """An error that fails even when it is shown."""

    @override
    def __str__(self) -> str:
        msg = "not now"
        raise RuntimeError(msg)


def unprintable(_: Total) -> Any:
    """Raise it."""
    raise Unprintable


def recurse(state: Total) -> Any:
    """Never return."""
    return recurse(state)


FOLDS = [
    BadFold("raises", lambda _: 1 / 0, "ZeroDivisionError: division by zero"),
    BadFold("sys-exit", lambda _: sys.exit(0), "SystemExit: 0"),
    BadFold("unprintable", unprintable, "Unprintable"),
    BadFold("recursion", recurse, "RecursionError"),
    BadFold("other-type", lambda _: 5, "its new state is int, not Total"),
    BadFold("a-dict", lambda _: {"count": 1}, "is dict, not Total"),
    BadFold("nan", lambda _: Total(1, math.nan), "'ratio' is nan"),
    BadFold("infinite", lambda _: Total(1, math.inf), "'ratio' is inf"),
    BadFold(
        "overflow", lambda _: Total(2**63), "'count' 9223372036854775808 is outside"
    ),
    BadFold("float-count", lambda _: Total(1.5), "'count' is float, not int"),  # type: ignore[arg-type]
    BadFold("no-count", lambda _: Total(None), "'count' is None"),  # type: ignore[arg-type]
    BadFold("nul", lambda _: Total(1, 0.0, "a\0"), "'note' contains a NUL"),
    BadFold("surrogate", lambda _: Total(1, 0.0, "\ud800"), "'note' contains a lone"),
    BadFold(
        "opaque", lambda _: Total(body=Opaque()), "'body' cannot be written as JSON"
    ),
    BadFold("nan-inside", lambda _: Total(body=[math.nan]), "'body' cannot be written"),
]


def fold_of(
    name: str,
    result: Callable[[Total], Any] | None,
    version: int = 1,
    key: Callable[[Event], Any] | None = None,
) -> Projection:
    """Return a projection that counts, and at the third event does something else."""

    @projection(topics=[name], version=version, name=name.replace("-", "_"), key=key)
    def counted(state: Total | None, event: Event) -> Total | None:
        new = Total((state or Total()).count + 1)
        if event.payload["n"] == 3 and result is not None:
            return result(new)  # type: ignore[no-any-return]
        return new

    return counted


def ingest_five(log: KappaLog, folder: Path, topic: str) -> int:
    """Ingest events of ada and bob in turns; return the position of the first."""
    file = folder / topic
    entities = ["ada", "bob", "ada", "bob", "ada"]
    file.write_text(
        "".join(f'{{"id":"{e}","n":{n + 1}}}\n' for n, e in enumerate(entities))
    )
    report = log.ingest(file, topic=topic, fields=ENTITY)
    assert report.counts.acked == 5
    assert report.first_position is not None
    return report.first_position


def with_code(log: KappaLog, *folds: Projection) -> KappaLog:
    """Return the same log as another program sees it."""
    return KappaLog(config=log.config, projections=folds)


def counts(app: KappaLog, name: str) -> dict[str, int]:
    """Return key → count of the live rows."""
    return {row["entity_id"]: row["count"] for row in rows(app, name)}


@pytest.mark.parametrize("bad", FOLDS, ids=lambda bad: bad.id)
def test_a_fold_that_fails_stops_before_its_event(
    log: KappaLog, tmp_path: Path, bad: BadFold
) -> None:
    """If told to stop: rows before are written, the cursor stands before the event.

    Otherwise it parks the key, whatever the error is.
    """
    topic = f"live-{bad.id}"
    name = topic.replace("-", "_")
    first = ingest_five(log, tmp_path, topic)

    with with_code(log, fold_of(topic, bad.result)) as app:
        for _ in range(2):
            with pytest.raises(ProjectionError) as raised:
                app.project([name], on_error="stop")

            error = raised.value
            assert (error.projection, error.position) == (name, first + 2)
            assert error.key == "ada"
            assert bad.message in str(error)
            assert f"stands at {first + 1}, all before is written" in str(error)
            assert f"kappa-log replay {name}" in str(error)
            assert counts(app, name) == {"ada": 1, "bob": 1}
            live = app.projection(name).live
            assert live is not None
            assert live.cursor == first + 1
        (done,) = app.project([name])
        assert (done.parked, done.to_position) == (1, first + 4)
        assert counts(app, name) == {"ada": 1, "bob": 2}
        (kept,) = app.parked(name)
        assert (kept.key, kept.position, kept.waiting) == ("ada", first + 2, 2)
        told = f"{kept.error_class}: {kept.error_message}"
        assert bad.message in told or kept.error_class == "Unprintable"

    with with_code(log, fold_of(topic, None, version=2)) as app:
        assert "Run: kappa-log replay" in (app.project([name])[0].waiting or "")
        assert app.replay(name).promoted
        assert counts(app, name) == {"ada": 3, "bob": 2}


@pytest.mark.parametrize("bad", FOLDS, ids=lambda bad: bad.id)
def test_a_replay_that_fails_leaves_the_live_build_alone(
    log: KappaLog, tmp_path: Path, bad: BadFold
) -> None:
    """It can be resumed, to fail again, or cancelled; then a better one replays."""
    topic = f"replay-{bad.id}"
    name = topic.replace("-", "_")
    first = ingest_five(log, tmp_path, topic)
    good = fold_of(topic, None)
    with with_code(log, good) as app:
        app.project([name])
        before = app.projection(name).live

    with with_code(log, good, fold_of(topic, bad.result, version=2)) as app:
        with pytest.raises(
            ProjectionError, match="live build was not changed"
        ) as raised:
            app.replay(name)
        error = raised.value
        assert (error.projection, error.position) == (name, first + 2)
        assert error.key == "ada"
        assert bad.message in str(error)
        (left,) = app.replays(name, unfinished=True)
        assert f"kappa-log replay --cancel {left.id}" in str(error)
        with pytest.raises(
            AlreadyRunning, match=f"--cancel {left.id}.*--resume {left.id}"
        ):
            app.replay(name)
        with pytest.raises(ProjectionError, match=f"position {first + 2}"):
            app.resume(left.id)

        assert counts(app, name) == {"ada": 3, "bob": 2}
        assert app.projection(name).live == before
        assert app.cancel(left.id).outcome == "cancelled"
        assert [build.role for build in app.projection(name).builds] == ["live"]

    with with_code(log, good, fold_of(topic, None, version=3)) as app:
        assert app.replay(name).promoted
        assert app.verify(names=[name]).ok


class BadKey(NamedTuple):
    """A key function at the third event, and what the error says."""

    id: str
    result: Callable[[], Any]
    message: str


def unprintable_key() -> Any:
    """Raise it."""
    raise Unprintable


KEYS = [
    BadKey("wrong-type", lambda: 5, "its key is int, not str (declare another by"),
    BadKey("list", lambda: ["a"], "its key is list, not str"),
    BadKey("too-long", lambda: "a" * 1025, "its key has 1025 bytes; at most 1024"),
    BadKey("nul", lambda: "a\0", "its key contains a NUL"),
    BadKey("surrogate", lambda: "\ud800", "its key contains a lone surrogate"),
    BadKey(
        "raises", lambda: dict[str, str]()["x"], "its key function raised KeyError: 'x'"
    ),
    BadKey("unprintable", unprintable_key, "its key function raised Unprintable"),
    BadKey("sys-exit", lambda: sys.exit(0), "its key function raised SystemExit"),
]


@pytest.mark.parametrize("bad", KEYS, ids=lambda bad: bad.id)
def test_a_key_function_that_fails_stops_before_its_event(
    log: KappaLog, tmp_path: Path, bad: BadKey
) -> None:
    """No key is known, so none is named; all before is written."""
    topic = f"key-{bad.id}"
    name = topic.replace("-", "_")
    first = ingest_five(log, tmp_path, topic)

    def key(event: Event) -> Any:
        return bad.result() if event.payload["n"] == 3 else event.entity_id

    key.__annotations__["return"] = str

    with with_code(log, fold_of(topic, None, key=key)) as app:
        with pytest.raises(ProjectionError) as raised:
            app.project([name])

        error = raised.value
        assert (error.projection, error.position) == (name, first + 2)
        assert error.key is None
        assert bad.message in str(error)
        assert {row["key"]: row["count"] for row in rows(app, name)} == {
            "ada": 1,
            "bob": 1,
        }
        live = app.projection(name).live
        assert live is not None
        assert live.cursor == first + 1


class Typed(msgspec.Struct):
    """A payload in which n is text, which it is not."""

    n: str


def test_a_payload_of_another_type_stops_before_its_event(
    log: KappaLog, tmp_path: Path
) -> None:
    """As a key function does: nothing is known about the event."""
    first = ingest_five(log, tmp_path, "typed-payload")

    @projection(topics=["typed-payload"], version=1, payload=Typed)
    def typed(state: int | None, event: Event) -> int | None:
        return (state or 0) + len(event.payload.n)

    with (
        with_code(log, typed) as app,
        pytest.raises(
            ProjectionError,
            match=f"position {first}: its payload cannot be decoded.*str",
        ),
    ):
        app.project()


def test_a_nul_in_a_payload_reaches_the_fold(log: KappaLog, tmp_path: Path) -> None:
    """JSON can say it, so the fold sees it; a JSON column keeps it, a text cannot."""
    file = tmp_path / "nul-payload"
    file.write_bytes(b'{"id":"ada","n":"a\\u0000b"}\n')
    log.ingest(file, topic="nul-payload", fields=ENTITY)

    @projection(topics=["nul-payload"], version=1)
    def seen(state: list[str] | None, event: Event) -> list[str] | None:
        return [*(state or []), event.payload["n"]]

    with with_code(log, seen) as app:
        app.project()
        assert rows(app, "seen") == [{"entity_id": "ada", "value": ["a\0b"]}]


def test_none_in_a_nullable_json_column_is_null(log: KappaLog, tmp_path: Path) -> None:
    """It is written and read back as what it was, in live rows and a fresh fold."""
    ingest_five(log, tmp_path, "nullable-json")

    @dataclass(frozen=True)
    class Wide:
        tags: list[str] | None
        note: str | None
        ratio: float = -0.0

    def fold(_state: Any, event: Event) -> Any:
        return Wide(None if event.payload["n"] < 3 else ["x"], None)

    fold.__annotations__["return"] = Wide
    wide = projection(topics=["nullable-json"], version=1, name="wide")(fold)

    with with_code(log, wide) as app:
        app.project()
        assert [row["tags"] for row in rows(app, "wide")] == [["x"], ["x"]]
        assert app.verify(names=["wide"]).ok
