"""JSON from strangers: one meaning, and no text that costs more to read than its bytes are worth."""

import json
from typing import NoReturn

from cluster.validate import has_lone_surrogate
from experts.errors import RequestError

MAX_DEPTH = 32
MAX_KEYS = 1000  # in all objects together
MAX_CONTAINERS = 20_000  # lists and objects; a completion of 128 prompts has 129
_DEEPER = (str, list, dict)


def read_json(text: str, what: str, field: str | None = None) -> object:
    """The value of a JSON text, in which every object names a key once and every string can be written as UTF-8.

    what: how a refusal calls the text. field: whose fault it is.
    Raises RequestError for whatever is not JSON, or too deep, or has too many keys or lists.
    """
    return _Reader(what, field).read(text)


class _Reader:
    def __init__(self, what: str, field: str | None) -> None:
        self._what = what
        self._field = field
        self._keys = 0
        self._containers = 0

    def read(self, text: str) -> object:
        if text.count("[") > MAX_CONTAINERS + len(text) // 16:  # some may stand in strings
            self._refuse("has too many lists")
        try:
            value = json.loads(text, object_pairs_hook=self._object, parse_constant=self._constant)
        except RecursionError:
            self._refuse(f"is nested more than {MAX_DEPTH} levels deep")
        except json.JSONDecodeError as error:
            self._refuse(f"is not valid JSON: {error.msg} at character {error.pos}")
        except ValueError:
            self._refuse("contains a number with too many digits")
        self._check(value)
        return value

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        """Counts while it is read, so that what is refused is not read to its end."""
        self._keys += len(pairs)
        if self._keys > MAX_KEYS:
            self._refuse(f"has more than {MAX_KEYS} keys")
        self._count(1)
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            twice = _shown(next(name for name in fields if names.count(name) > 1))
            self._refuse(f"names {twice!r} twice in one object")
        return fields

    def _constant(self, word: str) -> object:
        self._refuse(f"contains {word}, which is not JSON")

    def _check(self, value: object) -> None:
        """Depth, number of lists, and texts, level by level; what is at fault is named by its field at the top."""
        level, depth = [(self._field, value)], 0
        while level:
            below: list[tuple[str | None, object]] = []
            for field, item in level:
                if isinstance(item, str):
                    if has_lone_surrogate(item):
                        self._refuse("is not valid Unicode (it contains half a surrogate pair)", field)
                    continue
                if depth > MAX_DEPTH:
                    self._refuse(f"is nested more than {MAX_DEPTH} levels deep", field)
                if isinstance(item, dict):
                    below += [(field, key) for key in item]
                    below += [
                        (field or _shown(key), inner) for key, inner in item.items() if isinstance(inner, _DEEPER)
                    ]
                elif isinstance(item, list):
                    self._count(1)
                    below += [(field, inner) for inner in item if isinstance(inner, _DEEPER)]
            level, depth = below, depth + 1

    def _count(self, containers: int) -> None:
        self._containers += containers
        if self._containers > MAX_CONTAINERS:
            self._refuse(f"has more than {MAX_CONTAINERS} lists and objects")

    def _refuse(self, why: str, field: str | None = None) -> NoReturn:
        raise RequestError(f"{self._what if field is None else field} {why}", field=field or self._field)


def _shown(name: str) -> str:
    return name[:64].encode(errors="replace").decode()
