"""What every client is asked, and how its script says what it got: one line of JSON.

Every client's environment runs this, so it needs nothing but the standard library. The questions are in asked.json,
which the JavaScript client reads, too.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

NO_MODEL = "no-such-model"
NO_KEY = "none"  # clients want one, also where the server asks for none
WRONG_KEY = "this-key-was-never-given-out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The cluster, as a client is told of it."""

    http: str  # http://HOST:PORT
    grpc: str  # HOST:PORT
    model: str
    key: str | None  # None: the cluster asks for none

    @classmethod
    def from_environment(cls) -> "Server":
        found = os.environ
        return cls(
            http=found["EXPERTMESH_HTTP"],
            grpc=found["EXPERTMESH_GRPC"],
            model=found["EXPERTMESH_MODEL"],
            key=found.get("EXPERTMESH_KEY"),
        )

    @property
    def environment(self) -> dict[str, str]:
        """Variables that `from_environment` reads."""
        found = {"EXPERTMESH_HTTP": self.http, "EXPERTMESH_GRPC": self.grpc, "EXPERTMESH_MODEL": self.model}
        return found if self.key is None else found | {"EXPERTMESH_KEY": self.key}

    @property
    def any_key(self) -> str:
        return self.key or NO_KEY


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The questions: the same for all clients, so that their answers must be the same."""

    prompt: str
    messages: list[dict[str, str]]
    max_tokens: int
    stop: list[str]
    n: int
    seed: int
    temperature: float  # of the seeded questions; all others are greedy
    long_words: int  # words of a prompt that fits no context

    @classmethod
    def read(cls) -> "Asked":
        return cls(**json.loads(Path(__file__).with_name("asked.json").read_text()))

    @property
    def too_long(self) -> str:
        return "word " * self.long_words


def report(answers: Mapping[str, object]) -> None:
    """What the test reads."""
    print(json.dumps(answers))


def class_names(error: BaseException) -> list[str]:
    """The class of an error, and its bases."""
    return [kind.__name__ for kind in type(error).__mro__]


def refusals(
    ask: Callable[[str, str, str], object],
    server: Server,
    asked: Asked,
    *,
    told_by: Callable[[BaseException], list[str]] = class_names,
) -> dict[str, list[str]]:
    """Why a request is refused -> how the client tells it; an empty list where it did not.

    ask: sends one short question, (model, prompt, key).
    """

    def refused(model: str, prompt: str, key: str) -> list[str]:
        try:
            ask(model, prompt, key)
        except Exception as error:
            return told_by(error)
        return []

    found = {
        "unknown_model": refused(NO_MODEL, asked.prompt, server.any_key),
        "too_long": refused(server.model, asked.too_long, server.any_key),
    }
    if server.key is not None:
        found["wrong_key"] = refused(server.model, asked.prompt, WRONG_KEY)
    return found
