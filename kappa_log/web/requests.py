"""Requests as the API reads them: lists, the last of the repeated, strict JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from flask import Request
from typing_extensions import override
from werkzeug.datastructures import ImmutableMultiDict
from werkzeug.exceptions import BadRequest, UnsupportedMediaType


class LastCounts(ImmutableMultiDict[str, str]):
    """Parameters of which the last one of a name counts; of ``name[]`` all do."""

    @override
    def items(self, multi: bool = False) -> Iterable[tuple[str, Any]]:  # type: ignore[override]
        if multi:
            return super().items(multi=True)
        return [
            (name, values if name.endswith("[]") else values[-1])
            for name, values in self.lists()
        ]


class ApiRequest(Request):
    """A request of the API."""

    parameter_storage_class = LastCounts

    @override
    def get_json(
        self, force: bool = False, silent: bool = False, cache: bool = True
    ) -> Any:
        """Return the body; an empty one says nothing.

        Raises:
            UnsupportedMediaType: It is not declared to be JSON. A form of another
                site can send anything but that.
            BadRequest: It is no JSON.
        """
        body = self.get_data(cache=True)
        if not body:
            return {}
        if self.mimetype != "application/json":
            msg = "the body must be application/json"
            raise UnsupportedMediaType(msg)
        try:
            return msgspec.json.decode(body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            msg = "the body is no JSON"
            raise BadRequest(msg) from None
