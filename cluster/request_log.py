"""One line in a gateway's log for each generation that ended: facts with keys, and no prompt unless it is asked for."""

import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

log = logging.getLogger(__name__)

Detail = Literal["off", "facts", "prompts"]
_NOT_WORTH_A_LINE = frozenset({"overloaded"})  # under overload that would be thousands a second; they are counted


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known of a generation by the time it ends."""

    surface: str  # http or grpc
    began_s: float = field(default_factory=time.monotonic)
    request_id: str = ""
    prompt_token_ids: Sequence[int] = ()
    num_new_tokens: int = 0  # of all choices
    first_token_s: float | None = None  # after it began

    def on_start(self, request_id: str, prompt_token_ids: Sequence[int]) -> None:
        """It has been checked, and goes to an engine."""
        self.request_id, self.prompt_token_ids = request_id, prompt_token_ids

    def on_tokens(self, count: int) -> None:
        if self.first_token_s is None and count:
            self.first_token_s = time.monotonic() - self.began_s
        self.num_new_tokens += count

    def write(self, outcome: str, detail: Detail) -> None:
        if detail == "off" or outcome in _NOT_WORTH_A_LINE:
            return
        facts: dict[str, object] = {
            "request": self.request_id,
            "surface": self.surface,
            "outcome": outcome,
            "prompt_tokens": len(self.prompt_token_ids),
            "new_tokens": self.num_new_tokens,
            "s": round(time.monotonic() - self.began_s, 4),
        }
        if self.first_token_s is not None:
            facts["first_token_s"] = round(self.first_token_s, 4)
        if detail == "prompts":
            facts["prompt_token_ids"] = list(self.prompt_token_ids)
        log.info("request", extra=facts)


RECORD: ContextVar[Record | None] = ContextVar("record", default=None)  # of the request that a task works for
