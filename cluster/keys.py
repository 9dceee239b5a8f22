"""API keys: who may ask for anything but health.

Pure but for the file and the variable that keys are read from. A key itself is never kept, logged or shown: only its
SHA-256 is, and it is compared in constant time with every one there is.
"""

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from experts.errors import ConfigError, RequestError

KEYS_VARIABLE = "EXPERTMESH_API_KEYS"  # keys with commas between them
MIN_KEY_CHARS, MAX_KEY_CHARS = 16, 512
_BEARER = "bearer "


class Unauthenticated(RequestError):
    """No key, or none of ours (UNAUTHENTICATED, 401)."""


class Keys:
    """The keys that open a gateway; without any, everything is open."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Raises ConfigError for a key that is too short to be a secret, or that no header can carry."""
        self._digests = [hashlib.sha256(_checked(key)).digest() for key in dict.fromkeys(keys)]

    @classmethod
    def read(cls, file: str | None, environment: Mapping[str, str] = os.environ) -> Self:
        """The keys of the file, one a line, and of the variable. Raises ConfigError where there is none."""
        keys = [key for key in map(str.strip, environment.get(KEYS_VARIABLE, "").split(",")) if key]
        if file is not None:
            keys += _lines_of(Path(file))
        if not keys:
            raise ConfigError(
                f"gateway.auth is keys, and there is no key: name a file with one key a line as gateway.keys_file, or "
                f"set {KEYS_VARIABLE}; `python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one"
            )
        return cls(keys)

    @property
    def are_wanted(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> None:
        """Returns if this value of an `Authorization` header opens the gateway. Raises Unauthenticated."""
        if not self._digests:
            return
        if authorization is None:
            raise Unauthenticated("an API key is needed here: Authorization: Bearer KEY")
        presented = authorization[len(_BEARER) :].strip() if authorization[: len(_BEARER)].lower() == _BEARER else ""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        # All of them, so that the time tells nothing of which one it was.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise Unauthenticated("this API key is not valid here")


def _lines_of(file: Path) -> list[str]:
    try:
        mode = file.stat().st_mode
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"gateway.keys_file: {file} cannot be read: {error}") from None
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(f"gateway.keys_file: {file} has mode {mode & 0o777:o}; others may read it: chmod 600")
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def _checked(key: str) -> bytes:
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"an API key has {len(key)} characters; {MIN_KEY_CHARS} to {MAX_KEY_CHARS} of printable ASCII without "
            "blanks make one"
        )
    return key.encode()
