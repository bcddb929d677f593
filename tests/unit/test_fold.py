"""Fold: declarations, payloads, keys, and what errors say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from datetime import date
from decimal import Decimal
from typing import Any, ClassVar

import msgspec
import pytest
from typing_extensions import override

from kappa_log import Event, Projection, make_event, projection
from kappa_log import fold as fold_module
from kappa_log.errors import ProjectionError, ProjectionNotFound, RegistrationError
from kappa_log.events import EventPage
from kappa_log.fold import Folding, Registry


@dataclass(frozen=True)
class Total:
    """What the folds of this file count."""

    count: int = 0
    note: str = ""


def page(*events: dict[str, Any]) -> EventPage:
    """Return a page of events; each says what differs from a plain one."""
    plain: dict[str, Any] = {
        "entity_id": "ada",
        "payload_text": "{}",
        "event_type": None,
        "event_version": None,
    }
    rows = [{"position": n + 1} | plain | event for n, event in enumerate(events)]
    names = rows[0] if rows else {"position": 1} | plain
    return EventPage({name: [row[name] for row in rows] for name in names})


def folded(fold: Projection, *events: dict[str, Any]) -> dict[Any, Any]:
    """Return the states after some events."""
    folding = Folding(fold)
    folding.apply(page(*events))
    return folding.states


def counting(**options: Any) -> Projection:
    """Return a projection that counts events and notes payloads."""
    chosen: dict[str, Any] = {"topics": ["t"], "version": 1} | options

    @projection(**chosen)
    def counter(state: Total | None, event: Event) -> Total | None:
        return Total((state or Total()).count + 1, repr(event.payload))

    return counter


def _unresolved_key(event: Event) -> Missing:  # type: ignore[name-defined]  # noqa: F821
    return event.position


# --- declarations -------------------------------------------------------------


def test_a_projection_is_its_function_and_more() -> None:
    """A test of a fold calls it as it was written."""
    fold = counting()

    assert (fold.name, fold.version, fold.label) == ("counter", 1, "counter v1")
    assert (fold.topics, fold.groups, fold.key) == (("t",), None, None)
    assert fold(None, make_event(payload=5)) == Total(1, "5")
    assert repr(fold) == "<projection counter v1>"


def test_topics_and_groups_named_twice_are_named_once() -> None:
    """And in any order they are the same routing."""
    one = counting(topics=["a", "b", "a"], groups=["g", "g"])
    other = counting(topics=["b", "a"], groups=["g"])

    assert (one.topics, one.groups) == (("a", "b"), ("g",))
    assert one.fingerprints.routing == other.fingerprints.routing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Totals"}, r"name 'Totals' does not match \[a-z\].*name="),
        ({"name": "1st"}, "does not match"),
        ({"name": "a" * 41}, "does not match"),
        ({"name": "a-b"}, "does not match"),
        ({"name": "drop table"}, "does not match"),
        ({"name": "a\n"}, "does not match"),
        ({"version": 0}, "'counter': version= is 0"),
        ({"version": "1"}, "version= is '1'"),
        ({"version": True}, "version= is True"),
        ({"version": 1.0}, "version= is 1.0"),
        ({"topics": "orders"}, "topics= is 'orders', not a list of names"),
        ({"topics": []}, r"topics= is \[\], not a list"),
        ({"topics": [""]}, "topics= is"),
        ({"topics": [1]}, "topics= is"),
        ({"topics": None}, "topics= is None"),
        ({"groups": "g"}, "groups= is 'g', not a list of names"),
        ({"groups": []}, "groups= is"),
        ({"key": lambda _: 1, "key_type": float}, "'counter' .*key type"),
        ({"payload": 5}, "'counter' .*payload= 5 cannot be decoded"),
        ({"payload": {"order": 5}}, "'counter' .*payload= .* cannot be decoded"),
        ({"upcast": {("order", 1): repr}}, r"upcast= key \('order', 1\) is no \(type"),
        ({"upcast": {"order": repr}}, "upcast= key 'order' is no"),
        ({"upcast": {("order",): repr}}, "upcast= key .* is no"),
        ({"upcast": {("order", "1"): 5}}, "upcast= of .* is 5, no function"),
        ({"upcast": [repr]}, "upcast= .* is no dict"),
        ({"key": _unresolved_key}, "'counter' .*key function cannot be resolved"),
    ],
)
def test_a_declaration_that_cannot_work_is_refused_when_imported(
    options: dict[str, Any], message: str
) -> None:
    """Before any event is read; the message names the projection and what to write."""
    with pytest.raises(RegistrationError, match=message):
        counting(**options)


@dataclass
class WithKey:
    """Fields that are key columns too."""

    entity_id: str
    Key: int


@dataclass
class Positioned:
    """A field that kappa_log keeps itself."""

    _position: int


@dataclass
class Extended:
    """A field that its rows do not keep."""

    total: int
    extra: InitVar[int] = 0
    kind: ClassVar[str] = "a"


def _init_only(state: Extended | None, event: Event) -> Extended | None:
    del event
    return state


def _nothing(state: None, event: Event) -> None:
    """Never has a row."""


def _one_argument(state: int | None) -> int | None:
    return state


def _unresolved(state: Missing | None, _event: Event) -> Missing | None:  # type: ignore[name-defined]  # noqa: F821
    return state


def _with_key(state: WithKey | None, event: Event) -> WithKey | None:
    del event
    return state


def _positioned(state: Positioned | None, event: Event) -> Positioned | None:
    del event
    return state


@pytest.mark.parametrize(
    ("reducer", "options", "message"),
    [
        (_nothing, {}, "declared to return None, so it never has a row"),
        (_one_argument, {}, r"the fold must take \(state, event\)"),
        (_unresolved, {}, "annotations cannot be resolved: .*Missing"),
        (_with_key, {}, "column 'entity_id' is both a key and a field"),
        (_with_key, {"key": lambda _: ""}, "column 'key' is both a key and a field"),
        (_positioned, {}, "column '_position'"),
        (_init_only, {}, "Extended.extra is an InitVar"),
    ],
)
def test_a_function_that_cannot_be_a_fold_is_refused(
    reducer: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    """With the projection's name and its module where there is one."""
    with pytest.raises(RegistrationError, match=f"projection 'thing'.*{message}"):
        projection(topics=["t"], version=1, name="thing", **options)(reducer)


def test_a_lambda_needs_a_name() -> None:
    """Its own is no name of a table."""
    with pytest.raises(RegistrationError, match="'<lambda>' does not match"):
        projection(topics=["t"], version=1)(lambda state, event: (state, event))


# --- the registry -------------------------------------------------------------


def test_the_highest_version_is_the_latest_and_each_is_found_by_its_code() -> None:
    """An older version may stay registered beside a newer one."""

    @projection(topics=["t"], version=1, name="counter")
    def other(_state: int | None, event: Event) -> int | None:
        return event.position

    new = counting(version=10)
    registry = Registry([new, other, new])

    assert registry.names == ["counter"]
    assert registry.latest("counter") is new
    assert registry.made_by("counter", other.fingerprints) is other
    assert registry.made_by("counter", counting(topics=["x"]).fingerprints) is None
    assert registry.made_by("nothing", new.fingerprints) is None


def test_two_of_one_name_and_version_are_refused_by_their_modules() -> None:
    """Nobody could tell which of them made a row."""
    with pytest.raises(
        RegistrationError, match="'counter' version 1 is declared twice"
    ):
        Registry([counting(), counting()])


def test_an_unknown_projection_is_refused_with_those_there_are() -> None:
    """The alternatives are in the message and on the error."""
    registry = Registry([counting(name="b"), counting(name="a")])

    with pytest.raises(ProjectionNotFound, match="'c' is not registered; known: a, b"):
        registry.latest("c")
    with pytest.raises(ProjectionNotFound, match="nor is any other; put one into"):
        Registry().latest("c")


# --- payloads -----------------------------------------------------------------


class Order(msgspec.Struct):
    """A typed payload."""

    amount: Decimal


class Refund(msgspec.Struct):
    """Another one."""

    id: int


PRECISE = "0.1000000000000000055511151231257827"
ORDER = {"event_type": "order", "payload_text": f'{{"amount":{PRECISE}}}'}
REFUND = {"event_type": "refund", "payload_text": '{"id":7}'}
OLD = {"event_type": "order", "event_version": "0", "payload_text": '{"cents":125}'}


def test_a_payload_is_plain_json_unless_typed() -> None:
    """Integers keep all their digits."""
    states = folded(counting(), {"payload_text": f"[{2**64},1.5,null]"})

    assert states["ada"].note == f"[{2**64}, 1.5, None]"


@pytest.mark.parametrize("payload", [Order, {"order": Order}])
def test_a_typed_payload_is_exact(payload: Any) -> None:
    """One type, or one per event type: a decimal is read from its digits."""
    states = folded(counting(payload=payload), ORDER)

    assert states["ada"].note == f"Order(amount=Decimal('{PRECISE}'))"


def test_each_event_type_has_its_payload_type() -> None:
    """A type that is not listed stays plain."""
    fold = counting(payload={"order": Order, "refund": Refund})
    plain = {"event_type": "note", "payload_text": "[1]"}

    pairs, _ = fold.keyed(page(ORDER, REFUND, plain, plain | {"event_type": None}))

    assert [type(event.payload) for _, event in pairs] == [Order, Refund, list, list]


@pytest.mark.parametrize("payload", [None, Order, {"order": Order}])
def test_an_old_payload_is_brought_up_to_date(payload: Any) -> None:
    """By event type and version; what comes out is read as the declared type."""
    upcast = {("order", "0"): lambda old: {"amount": f"{old['cents'] / 100}"}}
    wanted = repr({"amount": "1.25"} if payload is None else Order(Decimal("1.25")))

    states = folded(counting(payload=payload, upcast=upcast), OLD)

    assert states["ada"].note == wanted


def test_an_upcaster_leaves_other_versions_alone() -> None:
    """Only what is of its type and version goes through it."""
    upcast = {("order", "0"): lambda _: 1 / 0}

    states = folded(counting(upcast=upcast), {**OLD, "event_version": None})

    assert states["ada"].note == "{'cents': 125}"


@pytest.mark.parametrize("payload", [None, Order, {"order": Order}])
@pytest.mark.parametrize("text", [None, "null"])
def test_no_payload_and_null_are_none_however_typed(
    payload: Any, text: str | None
) -> None:
    """A fold over a topic with tombstones meets None."""
    states = folded(counting(payload=payload), {**ORDER, "payload_text": text}, ORDER)

    assert states["ada"].count == 2
    pairs, _ = counting(payload=payload).keyed(page({**ORDER, "payload_text": text}))
    assert pairs[0][1].payload is None


@pytest.mark.parametrize("payload", [Order, {"order": Order}])
def test_a_payload_of_another_type_names_its_own_event(payload: Any) -> None:
    """Not the page, nor an event that is in order."""
    bad = {"event_type": "order", "payload_text": '{"amount":[]}'}
    null = {"event_type": "order", "payload_text": "null"}

    with pytest.raises(
        ProjectionError, match=r"its payload cannot be decoded.*amount"
    ) as raised:
        folded(counting(payload=payload), ORDER, null, bad, ORDER)

    assert (raised.value.projection, raised.value.position) == ("counter", 3)
    assert raised.value.key is None


@pytest.mark.parametrize("raised", [KeyError("a"), SystemExit(0)])
def test_a_payload_type_that_raises_names_the_event(raised: BaseException) -> None:
    """Not the page: what msgspec does not take for an error of its own, too."""

    class Picky(msgspec.Struct):
        amount: int

        def __post_init__(self) -> None:
            if self.amount < 0:
                raise raised

    texts = [{"payload_text": f'{{"amount":{n}}}'} for n in (1, -1, 2)]

    with pytest.raises(ProjectionError, match=type(raised).__name__) as error:
        folded(counting(payload=Picky), *texts)

    assert error.value.position == 2


@pytest.mark.parametrize(
    ("upcaster", "message"),
    [
        (lambda old: old["missing"], "KeyError: 'missing'"),
        (lambda _: sys.exit(0), "SystemExit: 0"),
        (lambda _: {"amount": []}, "ValidationError"),
    ],
)
def test_an_upcaster_that_fails_stops_the_projection(
    upcaster: Callable[[Any], Any], message: str
) -> None:
    """Its event is named; no key is known yet."""
    fold = counting(payload=Order, upcast={("order", "0"): upcaster})

    with pytest.raises(ProjectionError, match=message) as raised:
        folded(fold, ORDER, OLD)

    assert raised.value.position == 2


# --- keys ---------------------------------------------------------------------


def test_an_event_without_entity_is_counted_and_left_out() -> None:
    """It has no row to belong to."""
    folding = Folding(counting())

    folding.apply(page({"entity_id": None}, {}, {"entity_id": None}))

    assert (folding.events, folding.unkeyed) == (3, 2)
    assert list(folding.states) == ["ada"]


def test_an_event_may_belong_to_several_rows_once_each() -> None:
    """A list of keys; a repeat counts once, none or None is unkeyed."""

    def keys(event: Event) -> list[str] | None:
        return event.payload  # type: ignore[no-any-return]

    folding = Folding(counting(key=keys))
    folding.apply(
        page(
            {"payload_text": '["a","b","a"]'},
            {"payload_text": "[]"},
            {"payload_text": "null"},
            {"payload_text": '["b"]'},
        )
    )

    assert {key: state.count for key, state in folding.states.items()} == {
        "a": 1,
        "b": 2,
    }
    assert (folding.events, folding.unkeyed) == (4, 2)


def test_only_chosen_keys_are_folded() -> None:
    """As a replay with a start does; other events cost nothing."""
    folding = Folding(counting(), only={"bob"})

    folding.apply(page({}, {"entity_id": "bob"}, {"entity_id": "bob"}))

    assert {key: state.count for key, state in folding.states.items()} == {"bob": 2}
    assert folding.events == 2


@pytest.mark.parametrize(
    ("key", "key_type", "message"),
    [
        (lambda e: e.position, None, r"its key is int, not str \(declare another by"),
        (lambda _: 5, date, "its key is int, not date"),
        (lambda _: "a\0", None, "its key contains a NUL"),
        (lambda _: "a" * 2000, None, "its key has 2000 bytes"),
        (lambda _: "a", list[str], "its key 'a' is no list of keys"),
        (lambda _: ("a",), list[str], "is no list of keys"),
        (lambda _: ["a", 5], list[str], "its key is int, not str"),
        (lambda _: ["a"], None, "its key is list, not str"),
        (lambda _: ("a", 1), tuple[str, str], "its key is int, not str"),
        (lambda e: e.payload["id"], None, "its key function raised KeyError: 'id'"),
        (lambda _: sys.exit(0), None, "its key function raised SystemExit"),
    ],
)
def test_a_key_that_cannot_be_stops_the_projection(
    key: Callable[[Event], Any], key_type: Any, message: str
) -> None:
    """No key is known, so no row could be parked: the event is named."""
    fold = counting(key=key, key_type=key_type)

    with pytest.raises(ProjectionError, match=message) as raised:
        folded(fold, {"position": 41})

    assert (raised.value.projection, raised.value.position) == ("counter", 41)
    assert raised.value.key is None


# --- folding ------------------------------------------------------------------


def test_states_that_memory_lacks_are_loaded_once_a_page() -> None:
    """Keys that have no row stay without one."""
    asked: list[Any] = []

    def load(keys: Any) -> dict[Any, Any]:
        asked.append(set(keys))
        return {"ada": Total(5)}

    folding = Folding(counting(), load)
    folding.apply(page({}, {}, {"entity_id": "bob"}))
    folding.apply(page({}))

    assert asked == [{"ada", "bob"}]
    assert folding.states["ada"].count == 8


@pytest.mark.parametrize("most", [0, 2, 9])
def test_what_changed_is_drained_however_much_it_is(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few changed keys are known by name, of many all in memory is looked at."""
    monkeypatch.setattr(fold_module, "MAX_NAMED", most)
    folding = Folding(counting())
    folding.adopt({"old": Total(7), "zoe": Total(1)})
    for name in ("ada", "bob", "zoe", "ada"):
        folding.apply(page({"position": 3, "entity_id": name}))

    changed = {key: state.count for key, (state, _) in folding.drain().items()}
    assert changed == {"ada": 2, "bob": 1, "zoe": 2}
    assert folding.drain() == {}
    assert folding.position_of("ada") is None


def test_what_changed_is_drained_once_with_its_last_position() -> None:
    """A deleted row too; what did not change is not written again."""

    @projection(topics=["t"], version=1)
    def latest(_state: Total | None, event: Event) -> Total | None:
        return Total(event.position) if event.payload else None

    folding = Folding(latest)
    folding.apply(
        page(
            {"payload_text": "1"},
            {"entity_id": "bob", "payload_text": "1"},
            {"payload_text": "0"},
        )
    )

    assert folding.drain() == {"ada": (None, 3), "bob": (Total(2), 2)}
    assert folding.drain() == {}


def test_a_fold_sees_settled_states_only() -> None:
    """An int in a float field is a float before the next event meets it."""
    seen: list[Any] = []

    @dataclass
    class Sum:
        total: float

    def fold(state: Any, event: Event) -> Any:
        seen.append(state and state.total)
        return Sum(event.position)

    fold.__annotations__["return"] = Sum
    folded(projection(topics=["t"], version=1, name="sum")(fold), {}, {}, {})

    assert repr(seen) == "[None, 1.0, 2.0]"


class Unprintable(Exception):
    """An error that cannot even be shown."""

    @override
    def __str__(self) -> str:
        msg = "no"
        raise RuntimeError(msg)


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            lambda: 1 / 0,
            "the fold raised ZeroDivisionError: division by zero at <lambda>",
        ),
        (lambda: sys.exit(0), "the fold raised SystemExit: 0"),
        (lambda: _raise(Unprintable()), "the fold raised Unprintable"),
        (lambda: _raise(ValueError("x" * 10_000)), "the fold raised ValueError: x+ at"),
        (lambda: 5, "its new state is int, not Total"),
        (lambda: {"count": 5}, "its new state is dict, not Total"),
        (
            lambda: Total(2**63),
            "its new state field 'count' 9223372036854775808 is outside",
        ),
        (lambda: Total(1, "\0"), "its new state field 'note' contains a NUL"),
        (lambda: Total(1.5), "its new state field 'count' is float, not int"),  # type: ignore[arg-type]
    ],
)
def test_a_fold_that_fails_names_projection_position_and_key(
    result: Callable[[], Any], message: str
) -> None:
    """And where in the code, so that the author finds it."""

    @projection(topics=["t"], version=1)
    def broken(_state: Total | None, event: Event) -> Total | None:
        return Total() if event.position == 1 else result()

    with pytest.raises(ProjectionError, match=message) as raised:
        folded(broken, {}, {"entity_id": "bob"})

    error = raised.value
    assert (error.projection, error.position, error.key) == ("broken", 2, "bob")
    assert str(error).startswith(
        "projection 'broken' failed on the event at position 2 for key 'bob': "
    )
    assert len(str(error)) < 1000
    assert error.__cause__ is not None


def test_an_interrupt_is_no_error_of_the_fold() -> None:
    """Ctrl-C ends the program, not the projection."""

    @projection(topics=["t"], version=1)
    def interrupted(_state: Total | None, _event: Event) -> Total | None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folded(interrupted, {})


def test_one_step_gives_the_state_after_one_event() -> None:
    """What explain shows is what the row was."""
    fold = counting()

    assert fold.folding().after("ada", Total(4), make_event(9, {"a": 1})) == Total(
        5, "{'a': 1}"
    )
    with pytest.raises(ProjectionError, match="position 9"):
        counting(name="x").folding().after("ada", 5, make_event(9))
