"""One line in a gateway's log for each generation that ended: facts with keys, and no prompt unless it is asked for.

A generation that is traced has a span with the same facts, and never a prompt.
"""

import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cluster.traces import begin_generation

if TYPE_CHECKING:
    from cluster.spans import Recorded

log = logging.getLogger(__name__)

Detail = Literal["off", "facts", "prompts"]
_NOT_WORTH_A_LINE = frozenset({"overloaded"})  # under overload that would be thousands a second; they are counted
# Outcomes that are no client's doing: a trace shows them as errors.
_FAULTS = frozenset({"deadline_exceeded", "overloaded", "unavailable", "internal_error"})


@dataclass(slots=True, kw_only=True)
class Record:
    """What is known of a generation by the time it ends."""

    surface: str  # http or grpc
    began_s: float = field(default_factory=time.monotonic)
    request_id: str = ""
    prompt_token_ids: Sequence[int] = ()
    num_new_tokens: int = 0  # of all choices
    first_token_s: float | None = None  # after it began
    span: "Recorded | None" = field(default_factory=begin_generation)  # where it is traced

    def on_start(self, request_id: str, prompt_token_ids: Sequence[int]) -> None:
        """It has been checked, and goes to an engine."""
        self.request_id, self.prompt_token_ids = request_id, prompt_token_ids

    def on_tokens(self, count: int) -> None:
        if self.first_token_s is None and count:
            self.first_token_s = time.monotonic() - self.began_s
            if self.span is not None:
                self.span.event("first_token")
        self.num_new_tokens += count

    def write(self, outcome: str, detail: Detail) -> None:
        """It has ended."""
        if self.span is not None:
            self._end(self.span, outcome)
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

    def _end(self, span: "Recorded", outcome: str) -> None:
        facts = {
            "expertmesh.request_id": self.request_id,
            "expertmesh.surface": self.surface,
            "expertmesh.outcome": outcome,
            "gen_ai.usage.input_tokens": len(self.prompt_token_ids),
            "gen_ai.usage.output_tokens": self.num_new_tokens,
        }
        span.end(facts, failure=outcome if outcome in _FAULTS else None)


RECORD: ContextVar[Record | None] = ContextVar("record", default=None)  # of the request that a task works for


def tell(event: str, **numbers: int) -> None:
    """What happens to the request that this task works for, in its trace, if it has one."""
    record = RECORD.get()
    if record is not None and record.span is not None:
        record.span.event(event, {f"expertmesh.{name}": number for name, number in numbers.items()})
