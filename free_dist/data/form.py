"""Whether JSON has the form of a dataclass: every difference, each with where it is.

Knows types, from the dataclass's own annotations; does not know what any field means.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
"""How JSON's readers call our types."""


def read_json(content: bytes) -> tuple[Any, list[str]]:
    """(what UTF-8 JSON holds, what is wrong with the writing of it); the first is None where it cannot be read."""
    faults: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        faults.extend(
            f"{name!r} stands twice in one object" for name in sorted({n for n in names if names.count(n) > 1})
        )
        return dict(pairs)

    try:
        return json.loads(content.decode(), object_pairs_hook=once), faults
    except UnicodeDecodeError as error:
        return None, [f"is not UTF-8 ({error.reason} at byte {error.start})"]
    except RecursionError:
        return None, ["is nested too deeply to be read"]
    except ValueError as error:
        return None, [f"is not JSON ({error})"]


def form_faults(value: Any, wanted: Any, *, without: tuple[str, ...] = (), place: str = "") -> Iterator[str]:
    """What keeps ``value``, as read from JSON, from being ``wanted``.

    ``wanted``: a dataclass, ``tuple[X, ...]``, ``X | None`` or a plain type.  ``without``: fields of the
    outermost dataclass that the JSON does not hold.  Tuples are lists in JSON.
    """
    if dataclasses.is_dataclass(wanted):
        yield from _object_faults(value, wanted, without, place)
    elif get_origin(wanted) is tuple:
        if not isinstance(value, list):
            yield f"{place or 'it'} is {_called(value)}, want a list"
            return
        for number, item in enumerate(value):
            yield from form_faults(item, get_args(wanted)[0], place=f"{place}[{number}]")
    elif NoneType in (choices := get_args(wanted)):
        if value is not None:
            yield from form_faults(value, next(choice for choice in choices if choice is not NoneType), place=place)
    elif not _is(value, wanted):
        yield f"{place or 'it'} is {_called(value)}, want {NAMES.get(wanted, str(wanted))}"


def _object_faults(value: Any, wanted: Any, without: tuple[str, ...], place: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place or 'it'} is {_called(value)}, want an object"
        return
    types = _types(wanted)
    fields = {field.name: field for field in dataclasses.fields(wanted) if field.name not in without}
    before = f"{place}." if place else ""
    yield from (f"{before}{name} is no field we know" for name in value if name not in fields)
    for name, field in fields.items():
        if name in value:
            yield from form_faults(value[name], types[name], place=before + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield f"{before}{name} is missing"


@cache
def _types(wanted: Any) -> dict[str, Any]:
    return get_type_hints(wanted)


def _is(value: Any, wanted: Any) -> bool:
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


def _called(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    for kind, name in ((str, "text"), (NoneType, "null"), (dict, "an object"), (list, "a list")):
        if isinstance(value, kind):
            return name
    return repr(value)
