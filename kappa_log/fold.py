"""Projections: registered pure functions, and the folding of events into states.

The law that everything here serves: the rows at a position depend on the events up
to it and on nothing else: not on batch sizes, crashes, workers or the clock. So a
key's events fold in log order, always, and each state is settled (see `columns`)
before the next event meets it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import threading
import typing
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, NamedTuple

import msgspec
from typing_extensions import override

from kappa_log import backtrace
from kappa_log.backtrace import KeptError, described
from kappa_log.codec import MAX_DEPTH
from kappa_log.columns import Unsettled
from kappa_log.errors import (
    ArchiveError,
    ProjectionError,
    ProjectionNotFound,
    RegistrationError,
    StorageError,
)
from kappa_log.events import ORIGIN, Event, EventPage, Position
from kappa_log.fingerprint import Fingerprints, fingerprint, package_of
from kappa_log.keys import KeyShape, key_shape
from kappa_log.state import StateShape

Reducer = Callable[[Any, Event], Any]
Upcasters = Mapping[tuple[str | None, str | None], Callable[[Any], Any]]
"""(event_type, event_version) → function from the old payload to the one folded."""

KeyFunction = Callable[[Event], Any]

Load = Callable[[Collection[Any]], dict[Any, Any]]
"""Keys → the stored states of those that have a row."""
READING = (StorageError, ArchiveError)
"""What reading raises: a column that loads when a fold first asks for it may not come,
and that says nothing about the fold."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class Projection:
    """A registered fold: name and version, which events, which key, which state.

    Calling it calls the reducer, so a test needs nothing else.
    """

    pages_at_once = 1
    """How many pages a folding takes best together."""

    reads_files = False
    """Whether its folding reads Parquet files by itself, where they hold a page."""

    def __init__(  # noqa: PLR0913 - what `projection` was given, by the same names
        self,
        reducer: Reducer,
        *,
        name: str,
        version: int,
        topics: tuple[str, ...],
        groups: tuple[str, ...] | None,
        key: KeyFunction | None,
        key_type: Any,
        payload: Any,
        upcast: Upcasters,
    ) -> None:
        """Check the declaration; see `projection`."""
        self.reducer = reducer
        self.__wrapped__ = reducer
        self.__name__ = name
        self.__module__ = reducer.__module__
        self.__doc__ = reducer.__doc__
        self.name = name
        self.version = version
        self.topics = topics
        self.groups = groups
        self.key = key
        self._payload = payload
        try:
            self.upcast = _checked_upcast(upcast)
            self.key_shape = key_shape(key, key_type)
            self.state_shape = StateShape(_state_type(reducer))
            check_columns(self.key_shape, self.state_shape)
            self.payloads = Payloads(payload, self.upcast)
        except RegistrationError as error:
            msg = f"projection '{name}' ({reducer.__module__}): {error}"
            raise RegistrationError(msg) from None

    def __call__(self, state: Any, event: Event) -> Any:
        """Return the state after one event, as the reducer says."""
        return self.reducer(state, event)

    @override
    def __repr__(self) -> str:
        """Show name and version."""
        return f"<projection {self.name} v{self.version}>"

    @property
    def payload_type(self) -> Any:
        """What payloads are decoded into, as it was declared; None: plain values."""
        return self._payload

    @property
    def label(self) -> str:
        """Name and version, for messages."""
        return f"{self.name} v{self.version}"

    def keyed(
        self, page: EventPage, only: Collection[Any] | None = None
    ) -> tuple[list[tuple[Any, Event]], int]:
        """Return a page's (key, event) pairs in log order, and how many had no key.

        Args:
            page: Events that match this projection's topics and groups.
            only: Keys to keep; None keeps all.

        Raises:
            ProjectionError: A payload or key cannot be made; no key is known, so
                no row can be parked and the fold stops.
        """
        entities = page.column("entity_id")
        positions = page.column("position")
        payloads = self.payloads.decode(page, self)
        events = list(
            map(
                Event,
                positions,
                entities,
                payloads,
                [page] * len(positions),
                range(len(positions)),
            )
        )
        if self.key is None:
            pairs = list(zip(entities, events, strict=True))
            unkeyed = entities.count(None)
            if unkeyed:
                pairs = [pair for pair in pairs if pair[0] is not None]
        else:
            pairs, unkeyed = self._function_keys(events, page)
        if only is not None:
            pairs = [pair for pair in pairs if pair[0] in only]
        return pairs, unkeyed

    def folding(
        self,
        load: Load | None = None,
        only: Collection[Any] | None = None,
        most_parked: int = 0,
    ) -> Folding:
        """Return a new folding of events into states; see `Folding`."""
        return Folding(self, load, only, most_parked)

    def is_same(self, left: Any, right: Any) -> bool:
        """Tell whether two states, or None for no row, are what one fold makes."""
        return bool(left == right)

    def _function_keys(
        self,
        events: Sequence[Event],
        page: EventPage,  # noqa: ARG002 - for keys that are computed page by page
    ) -> tuple[list[tuple[Any, Event]], int]:
        pairs: list[tuple[Any, Event]] = []
        unkeyed = 0
        for event in events:
            keys = self._keys_of(event)
            unkeyed += not keys
            pairs += [(key, event) for key in keys]
        return pairs, unkeyed

    def _keys_of(self, event: Event) -> Collection[Any]:
        assert self.key is not None
        try:
            return self._checked_keys(self.key(event))
        except Unsettled as error:
            reason = f"its key {error}"
            if self.key_shape.types == (str,) and "not str" in reason:
                reason += (
                    " (declare another by the key function's annotation or key_type=)"
                )
            raise ProjectionError(self.name, event.position, reason) from error
        except READING:
            raise
        except (Exception, SystemExit) as error:
            reason = f"its key function raised {described(error)}"
            raise ProjectionError(self.name, event.position, reason) from error

    def _checked_keys(self, found: Any) -> Collection[Any]:
        """Return the keys in what the key function returned, each once."""
        if found is None:
            return ()
        shape = self.key_shape
        if not shape.many:
            return (shape.check(found),)
        if found.__class__ is not list:
            msg = f"{found!r} is no list of keys, as the key function declares"
            raise Unsettled(msg)
        return dict.fromkeys(map(shape.check, found))

    @functools.cached_property
    def fingerprints(self) -> Fingerprints:
        """What its code, state, payloads, upcasters and routing are.

        Made on first use, not when declared: by then the names below the fold in
        its module are there. One thread at a time: CPython 3.11 counts the depth of
        syntax trees in one place for all of them (python/cpython issue 106905).
        """
        with _fingerprinting:
            return self._fingerprints()

    def _fingerprints(self) -> Fingerprints:
        shape = [
            (c.name, c.kind, c.nullable, _type_name(c.annotation))
            for c in self.state_shape.columns
        ]
        keys = [(c.name, c.kind) for c in self.key_shape.columns]
        columns = [(name, kind) for name, kind, *_ in shape]
        package = package_of(self.reducer)
        payloads = fingerprint(self._payload, package=package)
        upcasters = fingerprint(
            {repr(k): self.upcast[k] for k in sorted(self.upcast, key=repr)},
            package=package,
        )
        routing: list[object] = [
            sorted(self.topics),
            sorted(self.groups or ()),
            [keys, columns, self.key_shape.many],
            self.key,
        ]
        if self.key is not None:
            routing += [payloads, upcasters]
        return Fingerprints(
            code=fingerprint(self.reducer, self.state_shape.type, package=package),
            state=fingerprint(shape),
            payload=payloads,
            upcasters=upcasters,
            routing=fingerprint(*routing, package=package),
        )


def projection(  # noqa: PLR0913 - a declaration has an option for each thing it says
    *,
    topics: Sequence[str],
    version: int,
    name: str | None = None,
    groups: Sequence[str] | None = None,
    key: KeyFunction | None = None,
    key_type: Any = None,
    payload: Any = None,
    upcast: Upcasters | None = None,
) -> Callable[[Reducer], Projection]:
    """Declare a function ``(state | None, event) -> state | None`` a projection.

    The function must be pure: no clock, no input or output, no randomness. None
    deletes the row.

    Args:
        topics: Topics whose events are folded.
        version: The author's number; raise it when rows change their meaning.
        name: Name of the projection; the function's name if not given.
        groups: Consumer groups whose events are folded. Needed once the log holds
            a topic under several groups.
        key: Function from event to key, to a list of keys, or to None for an event
            that is not for this projection; the entity_id if not given.
        key_type: Type of the key, if its function has no return annotation.
        payload: `msgspec.Struct` to decode payloads into, or a dict of one per
            event type.
        upcast: (event_type, event_version) → function from that version's payload
            to the payload that the fold expects.

    Raises:
        RegistrationError: The declaration cannot work; the message says why.
    """

    def declare(reducer: Reducer) -> Projection:
        chosen = str(name or getattr(reducer, "__name__", ""))
        check_declaration(chosen, version, topics, groups)
        _check_signature(chosen, reducer)
        return Projection(
            reducer,
            name=chosen,
            version=version,
            topics=tuple(dict.fromkeys(topics)),
            groups=None if groups is None else tuple(dict.fromkeys(groups)),
            key=key,
            key_type=key_type,
            payload=payload,
            upcast=upcast or {},
        )

    return declare


_fingerprinting = threading.RLock()


class Registry:
    """The projections that are known, by name and version."""

    def __init__(self, projections: Iterable[Projection] = ()) -> None:
        """Take projections in.

        Raises:
            RegistrationError: Two of them have one name and version.
        """
        self._known: dict[str, dict[int, Projection]] = {}
        for found in projections:
            self.add(found)

    def add(self, new: Projection) -> None:
        """Take one projection in; the same object twice is once."""
        versions = self._known.setdefault(new.name, {})
        other = versions.get(new.version)
        if other is not None and other is not new:
            msg = (
                f"projection '{new.name}' version {new.version} is declared twice: "
                f"in {other.__module__} and in {new.__module__}"
            )
            raise RegistrationError(msg)
        versions[new.version] = new

    def __iter__(self) -> Iterator[Projection]:
        """Yield all versions of all projections."""
        for versions in self._known.values():
            yield from versions.values()

    @property
    def names(self) -> list[str]:
        """Names of all projections, sorted."""
        return sorted(self._known)

    def latest(self, name: str) -> Projection:
        """Return the highest version of a projection, or raise ProjectionNotFound."""
        versions = self._known.get(name)
        if not versions:
            raise ProjectionNotFound(name, self.names)
        return versions[max(versions)]

    def made_by(self, name: str, prints: Fingerprints) -> Projection | None:
        """Return the registered version whose code made a build, if it is there."""
        versions = self._known.get(name, {})
        for number in sorted(versions, reverse=True):
            if versions[number].fingerprints == prints:
                return versions[number]
        return None


class Parked(msgspec.Struct, frozen=True):
    """Where a key stopped, and why."""

    position: Position
    """Of its first event that is not folded."""
    error: KeptError


class Rows(NamedTuple):
    """Rows to write, each as its columns' stored values."""

    kept: list[Any]
    """Lists or tuples of keys, fields, and the last position folded in."""
    gone: list[Any]
    """Lists of keys whose row is deleted."""


PART_EVENTS = 500
"""Events whose payloads are decoded together: few enough to be still in the processor's
cache when they are folded (measured: 2,000 take a sixth longer)."""

MAX_NAMED = 20_000
"""Changed keys that are known by name; if there are more, all are looked through."""


class Entry:
    """What the events of one key have come to.

    State and position lie together, so that an event costs one look into a dictionary.
    """

    __slots__ = ("position", "state")

    def __init__(self, state: Any) -> None:
        self.state = state
        """None for no row."""
        self.position: Position = ORIGIN
        """Last one folded in since the last `drain`; ORIGIN if there is none."""


class Folding:
    """States of one build in memory, and which of them changed since they were stored.

    A key that is parked keeps the state that it had before the event it is parked at:
    of its events only those below that position are folded.

    Args:
        fold: The projection.
        load: Keys → stored states, for keys that memory lacks. None says that
            memory is complete: a key it lacks has no row.
        only: Keys to fold; None folds all.
        most_parked: How many keys may be parked in all, for a fold that raises to
            park its key; 0 lets it stop the folding.
    """

    def __init__(
        self,
        fold: Projection,
        load: Load | None = None,
        only: Collection[Any] | None = None,
        most_parked: int = 0,
    ) -> None:
        self.projection = fold
        self.entries: dict[Any, Entry] = {}
        self.parked: dict[Any, Position] = {}
        """Key → position of its first event that is not folded."""
        self.new_parked: dict[Any, Parked] = {}
        """Those that were parked since the last `drain`."""
        self.events = 0
        self.unkeyed = 0
        self._touched: set[Any] | None = set()
        """Keys folded into since the last `drain`, and maybe some that failed; None if
        they are too many to be named."""
        self._load = load
        self._only = only
        self._most_parked = most_parked
        is_safe = not most_parked or fold.state_shape.is_immutable
        self._fold_rest = self._fold_all if is_safe else self._fold_with_care

    def __len__(self) -> int:
        """Return how many states are in memory."""
        return len(self.entries)

    @property
    def states(self) -> dict[Any, Any]:
        """Key → state, of all that are in memory; None for no row."""
        return {key: entry.state for key, entry in self.entries.items()}

    def position_of(self, key: Any) -> Position | None:
        """Return the last position folded into a key since the last `drain`."""
        entry = self.entries.get(key)
        return None if entry is None else entry.position or None

    def adopt(self, states: Mapping[Any, Any]) -> None:
        """Take stored states in, of keys that memory lacks."""
        self.entries.update(zip(states, map(Entry, states.values()), strict=True))

    def after(self, key: Any, state: Any, event: Event) -> Any:
        """Return the settled state after one event of a key.

        Raises:
            ProjectionError: The fold raised, or returned what no column holds.
        """
        entry = self.entries[key] = Entry(state)
        self.fold([(key, event)])
        return entry.state

    def apply(self, page: EventPage) -> None:
        """Fold a page of matching events.

        Raises:
            ProjectionError: The fold failed on one of them, and keys may not be
                parked, or no key is known. States in memory are void then: forget
                this object, start again from stored rows.
        """
        # Where stored states are read, that is done once for the whole page.
        parts = [page] if self._load is not None else page.parts(PART_EVENTS)
        for part in parts:
            self._apply(part)

    def _apply(self, page: EventPage) -> None:
        pairs, unkeyed = self.projection.keyed(page, self._only)
        self.events += (
            len(page.column("position"))
            if self._only is None
            else len({event.position for _, event in pairs})
        )
        self.unkeyed += unkeyed
        if self.parked:
            pairs = list(filter(self._is_due, pairs))
        if self._load is not None:
            entries = self.entries
            missing = {key for key, _ in pairs if key not in entries}
            if missing:
                self.adopt(self._load(missing))
        self._note(pairs)
        self._fold_on(pairs)

    def complete(self) -> None:
        """Fold what `apply` left for later; errors as `apply`, counts are true now."""

    def fold(self, pairs: Iterable[tuple[Any, Event]]) -> None:
        """Fold (key, event) pairs whose states are in memory; errors as `apply`."""
        self._touched = None
        self._fold_on(pairs)

    def _fold_on(self, pairs: Iterable[tuple[Any, Event]]) -> None:
        rest = iter(pairs)
        is_filtered = False
        while True:
            try:
                self._fold_rest(rest)
            except ProjectionError as error:
                self._park(error)
            else:
                return
            if not is_filtered:
                # Lazily: it sees the keys that are parked further on, too.
                rest = filter(self._is_due, rest)
                is_filtered = True

    def _note(self, pairs: Collection[tuple[Any, Event]]) -> None:
        """Note which keys change, as long as they are few."""
        touched = self._touched
        if touched is not None:
            touched.update(key for key, _ in pairs)
            if len(touched) > MAX_NAMED:
                self._touched = None

    def _fold_all(self, pairs: Iterable[tuple[Any, Event]]) -> None:
        entries = self.entries
        get = entries.get
        reduce, settle = self.projection.reducer, self.projection.state_shape.settle
        key: Any = None
        event: Any = None
        try:
            for key, event in pairs:
                entry = get(key)
                if entry is None:
                    entry = entries[key] = Entry(None)
                state = reduce(entry.state, event)
                if state is not None:
                    state = settle(state)
                entry.state = state
                entry.position = event.position
        except Unsettled as error:
            reason = f"its new state {error}"
            raise self._failed(event.position, key, reason) from error
        except READING:
            raise
        except (Exception, SystemExit) as error:
            reason = f"the fold raised {described(error)}"
            raise self._failed(event.position, key, reason) from error

    def _fold_with_care(self, pairs: Iterable[tuple[Any, Event]]) -> None:
        """Fold so that a key whose fold fails has the state from before the event.

        A fold may change a state in its place and then raise.
        """
        shape, entries = self.projection.state_shape, self.entries
        for key, event in pairs:
            entry = entries.get(key)
            state = None if entry is None else entry.state
            before = None if state is None else shape.values(state)
            try:
                self._fold_all([(key, event)])
            except ProjectionError:
                if before is not None:
                    entries[key].state = shape.build(before)
                raise

    def drain(self) -> dict[Any, tuple[Any, Position]]:
        """Return key → (state or None, position) of what changed, and forget it did."""
        changed = self.changed(self.entries if self._touched is None else self._touched)
        for key in changed:
            self.entries[key].position = ORIGIN
        self._touched = set()
        self.new_parked.clear()
        return changed

    def changed(self, keys: Iterable[Any]) -> dict[Any, tuple[Any, Position]]:
        """Return key → (state or None, position) of those keys that changed."""
        entries = self.entries
        found = {key: entries[key] for key in keys if key in entries}
        return {key: (e.state, e.position) for key, e in found.items() if e.position}

    def drain_rows(self) -> Rows:
        """Return the rows of what changed, and forget it did."""
        return self.rows_of(self.drain())

    def rows_of(self, changed: Mapping[Any, tuple[Any, Position]]) -> Rows:
        """Return the rows of key → (state or None, position)."""
        keys = self.projection.key_shape.values
        values = self.projection.state_shape.values
        rows = Rows([], [])
        for key, (state, position) in changed.items():
            if state is None:
                rows.gone.append(keys(key))
            else:
                rows.kept.append([*keys(key), *values(state), position])
        return rows

    def _is_due(self, pair: tuple[Any, Event]) -> bool:
        """Tell whether an event's key is not parked, or only later on."""
        position = self.parked.get(pair[0])
        return position is None or pair[1].position < position

    def _park(self, error: ProjectionError) -> None:
        """Park the key of a fold that failed, or raise its error."""
        if not self._most_parked:
            raise error
        if len(self.parked) >= self._most_parked:
            reason = (
                f"{error.reason}; and {len(self.parked):,} keys are parked already, "
                "the most there may be: the fold itself seems to be wrong"
            )
            raise ProjectionError(
                error.projection, error.position, reason, key=error.key
            ) from error.__cause__
        self.parked[error.key] = error.position
        self.new_parked[error.key] = Parked(error.position, _kept(error))

    def _failed(self, position: Position, key: Any, reason: str) -> ProjectionError:
        return ProjectionError(self.projection.name, position, reason, key=key)


PARKED_BACKTRACE_BYTES = 8 * 1024
"""Most of the backtrace of a parked key: there may be thousands of them."""


def _kept(error: ProjectionError) -> KeptError:
    cause = error.__cause__
    assert cause is not None
    _cut_ours(cause)
    found = backtrace.kept(cause, PARKED_BACKTRACE_BYTES)
    if isinstance(cause, Unsettled):
        # Our own class, which means nothing to whoever wrote the fold.
        return found._replace(
            error_class=ProjectionError.__name__,
            error_message=backtrace.storable(error.reason, PARKED_BACKTRACE_BYTES),
        )
    return found


def _cut_ours(error: BaseException) -> None:
    """Take from an error what leads from the engine to the fold that raised it."""
    trace = error.__traceback__
    if trace is not None and trace.tb_next is not None:
        error.__traceback__ = trace.tb_next
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen.__context__, ProjectionError):
            seen.__context__ = None
        seen = seen.__context__


class Payloads:
    """Decodes the payload texts of a page, all in one call where their type is one."""

    def __init__(self, payload: Any, upcast: Upcasters) -> None:
        self._upcast = upcast
        by_type: dict[str, Any] = payload if isinstance(payload, dict) else {}
        self._single: Any = Any if payload is None or by_type else payload
        self._one_call = not upcast and not by_type
        try:
            page_type: Any = list[self._single | None]  # type: ignore[name-defined]
            self._page: Any = msgspec.json.Decoder(page_type)
            self._one = msgspec.json.Decoder(self._single | None)
            self._by_type = {
                name: msgspec.json.Decoder(wanted | None)
                for name, wanted in by_type.items()
            }
        except TypeError as error:
            msg = f"payload= {payload!r} cannot be decoded from JSON: {error}"
            raise RegistrationError(msg) from None

    def decode(self, page: EventPage, fold: Projection) -> Sequence[Any]:
        """Return the payload of each event, or raise ProjectionError for the first."""
        if self._one_call:
            texts = page.joined_payloads()
            # If it fails, one by one, to name the culprit.
            with contextlib.suppress(Exception, SystemExit):
                decoded: list[Any] = self._page.decode(texts)
                return decoded
        found = []
        for index, text in enumerate(page.column("payload_text")):
            try:
                found.append(None if text is None else self._decode(page, index, text))
            except (Exception, SystemExit) as error:
                reason = f"its payload cannot be decoded: {described(error)}"
                position = page.column("position")[index]
                raise ProjectionError(fold.name, position, reason) from error
        return found

    def _decode(self, page: EventPage, index: int, text: str) -> Any:
        if self._one_call:
            return self._one.decode(text)
        event_type = page.column("event_type")[index]
        decoder = self._by_type.get(event_type, self._one)
        if self._upcast:
            version = page.column("event_version")[index]
            upcaster = self._upcast.get((event_type, version))
            if upcaster is not None:
                new = upcaster(msgspec.json.decode(text))
                return msgspec.convert(new, decoder.type, str_keys=True)
        # From the text, not from plain values: a Decimal keeps all its digits.
        return decoder.decode(text)


def check_declaration(name: str, version: Any, topics: Any, groups: Any) -> None:
    """Raise RegistrationError unless these can be a projection's."""
    if not NAME.fullmatch(name):
        msg = (
            f"projection name {name!r} does not match [a-z][a-z0-9_]{{0,39}}; "
            "give one by name="
        )
        raise RegistrationError(msg)
    if version.__class__ is not int or version < 1:
        msg = f"projection '{name}': version= is {version!r}, not 1, 2, 3 …"
        raise RegistrationError(msg)
    for option, values in (("topics", topics), ("groups", groups)):
        if values is None and option == "groups":
            continue
        if (
            isinstance(values, str)
            or not values
            or not all(isinstance(value, str) and value for value in values)
        ):
            msg = f"projection '{name}': {option}= is {values!r}, not a list of names"
            raise RegistrationError(msg)


def _check_signature(name: str, reducer: Any) -> None:
    try:
        inspect.signature(reducer).bind(None, None)
    except TypeError as error:
        msg = f"projection '{name}': the fold must take (state, event): {error}"
        raise RegistrationError(msg) from None


def check_columns(keys: KeyShape, states: StateShape) -> None:
    """Raise RegistrationError for a name that both a key and a field have."""
    repeated = Counter(c.name.lower() for c in (*keys.columns, *states.columns))
    for name, times in repeated.items():
        if times > 1:
            msg = f"column {name!r} is both a key and a field of the state"
            raise RegistrationError(msg)


def _state_type(reducer: Reducer) -> Any:
    try:
        # Classes of an enclosing function are among what the fold closes over.
        enclosed = dict(inspect.getclosurevars(reducer).nonlocals)
        hints = typing.get_type_hints(reducer, localns=enclosed)
    except (NameError, TypeError, ValueError) as error:
        msg = f"its annotations cannot be resolved: {error}"
        raise RegistrationError(msg) from None
    declared = hints.get("return", Any)
    arguments = typing.get_args(declared)
    if type(None) in arguments:
        rest = tuple(a for a in arguments if a is not type(None))
        return rest[0] if len(rest) == 1 else typing.Union[rest]  # noqa: UP007
    if declared is type(None):
        msg = "its fold is declared to return None, so it never has a row"
        raise RegistrationError(msg)
    return declared


def _parts(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else ()


def _checked_upcast(upcast: Any) -> dict[Any, Callable[[Any], Any]]:
    if not isinstance(upcast, Mapping):
        msg = f"upcast= {upcast!r} is no dict of (type, version) → function"
        raise RegistrationError(msg)
    for key, function in upcast.items():
        if [isinstance(k, str | None) for k in _parts(key)] != [True, True]:
            msg = f"upcast= key {key!r} is no (type, version), each a str or None"
            raise RegistrationError(msg)
        if not callable(function):
            msg = f"upcast= of {key!r} is {function!r}, no function"
            raise RegistrationError(msg)
    return dict(upcast)


def _type_name(annotation: Any) -> Any:
    is_class = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation.__qualname__ if is_class else annotation


assert MAX_DEPTH < 900  # noqa: PLR2004 - page decoding adds a level below Python's limit
