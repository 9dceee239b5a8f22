"""Whether the cluster said what one unmodified vLLM process says: the first promise as a pure function.

float32: every sequence is the one that vLLM gives when it gets all prompts together. Nothing less holds.

bfloat16 and float16: rounding depends on the batch even inside vLLM, so three things must hold, and what they are held
against is measured on unmodified vLLM in the same run, on the same prompts.

1. Rounding margin. Each token is judged by teacher forcing: vLLM reads the sequence so far as a prompt, and the token's
   margin is how far its logit is below the largest one (0: it is the largest). vLLM computes its own tokens twice, when
   it generates them (all prompts together, and again one by one) and when it is forced to read them. The largest change
   of a difference between two logits from the one to the other, among the twenty best of each, is what rounding alone
   can do to a choice: no token's margin may be larger. It is never taken to be less than the worst margin of a token of
   vLLM's own, nor than one unit in the last place of the largest logit seen. Where rounding flips the choice of an
   expert it is large, and catches gross errors only; the two counts below are what sees small ones.
2. Tokens off the top. Over all passes, the tokens with a margin above 0 may not be more frequent than among vLLM's own
   tokens, three standard deviations of such a count allowed, and three tokens for where vLLM has none.
3. Identical sequences. Each pass is held against vLLM in the like composition ("alone" against one by one, "under load"
   against together). Over all passes, their share must be at least the share of vLLM's own sequences that stay the same
   from one composition to the other. One by one is the composition that differs: batches of three or more give vLLM the
   same bits as all together, and a share measured with those would be 100 % and say nothing about rounding.
   Where one by one gives the same bits, too, as on CPUs with bfloat16 instructions, a tenth may differ: expert groups
   add in another order than one process, and none of 16 excludes only that more than a sixth differ (95 %, 3 / n).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Tokens = tuple[tuple[int, ...], ...]  # [num_prompts][num_tokens]
Margins = tuple[tuple[float, ...], ...]  # aligned with Tokens; in logits, 0 or more
Composition = Literal["together", "one by one"]

# Bits of the significand that are stored: a number in [2^e, 2^(e+1)) has units of 2^(e - bits).
_STORED_BITS = {"bfloat16": 7, "float16": 10}
_ONE_IN = 10  # sequences may differ where none of vLLM's own does


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Greedy tokens of every prompt, and what teacher forcing says of them."""

    tokens: Tokens
    margins: Margins


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What the cluster answered in one pass."""

    name: str
    like: Composition  # which composition of the reference it resembles
    answers: Answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What unmodified vLLM says to the same prompts."""

    together: Answers
    one_by_one: Answers
    largest_change: float  # of a difference of two logits, from generating to teacher forcing
    largest_logit: float  # absolute

    def of(self, composition: Composition) -> Answers:
        return self.together if composition == "together" else self.one_by_one


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token of a sequence that is not the reference's."""

    pass_name: str
    prompt: int
    position: int
    cluster_token: int | None  # None: the answer ended before
    reference_token: int | None
    margin: float | None  # of the cluster's token; before it, both read the same

    def __str__(self) -> str:
        margin = "" if self.margin is None else f", whose margin is {self.margin:.4g}"
        return (
            f"{self.pass_name}: prompt {self.prompt}, position {self.position}: vLLM says token "
            f"{self.reference_token}, the cluster {self.cluster_token}{margin}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    name: str
    like: Composition
    identical: int  # sequences equal to the reference in the like composition
    identical_to_together: int
    off_top: int  # tokens with a margin above 0
    worst_margin: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Everything that was measured, and whether it holds."""

    holds: bool
    reasons: tuple[str, ...]  # why not; empty where it holds
    num_prompts: int
    num_tokens: int  # of one pass
    passes: tuple[PassResult, ...]
    own_identical: int  # vLLM's sequences that are the same together and one by one
    own_off_top: int  # of its tokens in both compositions
    own_worst_margin: float
    rounding_margin: float | None  # None in float32, which has none
    off_top_allowed: int | None  # over all passes
    first_difference: Difference | None

    @property
    def worst_margin(self) -> float:
        return max(result.worst_margin for result in self.passes)


def judge(dtype: str, passes: tuple[Pass, ...], reference: Reference) -> Verdict:
    """dtype: float32, bfloat16 or float16. passes: on the reference's prompts.

    Raises ValueError where there are none.
    """
    if not passes or not reference.together.tokens:
        raise ValueError("a verdict needs at least one pass with at least one prompt")
    exact = dtype == "float32"
    if exact:
        differences = [d for each in passes for d in _differences(each, reference.together)]
    else:
        differences = [d for each in passes for d in _differences(each, reference.of(each.like))]
    own = (reference.together, reference.one_by_one)
    results = tuple(_result(each, reference) for each in passes)
    own_identical = _identical(own[0].tokens, own[1].tokens)
    rounding_margin = None if exact else _rounding_margin(reference, dtype)
    allowed = None if exact else _off_top_allowed(own, sum(_num_tokens(each.answers) for each in passes))
    if rounding_margin is None or allowed is None:
        reasons = _unlike(results, len(own[0].tokens))
    else:
        reasons = [*_missing(passes, own[0]), *_beyond(passes, rounding_margin)]
        reasons += _too_rare(results, len(own[0].tokens), own_identical=own_identical, allowed=allowed)
    return Verdict(
        holds=not reasons,
        reasons=tuple(reasons),
        num_prompts=len(own[0].tokens),
        num_tokens=_num_tokens(own[0]),
        passes=results,
        own_identical=own_identical,
        own_off_top=sum(map(_off_top, own)),
        own_worst_margin=max(map(_worst, own)),
        rounding_margin=rounding_margin,
        off_top_allowed=allowed,
        first_difference=differences[0] if differences else None,
    )


def last_place(value: float, dtype: str) -> float:
    """One unit in the last place of `value` in a 16-bit float type."""
    if value == 0:
        return 0.0
    return math.ldexp(1.0, math.frexp(abs(value))[1] - 1 - _STORED_BITS[dtype])


def _unlike(results: tuple[PassResult, ...], num_prompts: int) -> list[str]:
    return [
        f"{result.name}: {result.identical_to_together} of {num_prompts} sequences are identical; float32 needs all"
        for result in results
        if result.identical_to_together < num_prompts
    ]


def _missing(passes: tuple[Pass, ...], reference: Answers) -> list[str]:
    return [
        f"{each.name}: prompt {prompt} was answered with {len(ours)} tokens instead of {len(theirs)}"
        for each in passes
        for prompt, (ours, theirs) in enumerate(zip(each.answers.tokens, reference.tokens, strict=True))
        if len(ours) != len(theirs)
    ]


def _beyond(passes: tuple[Pass, ...], rounding_margin: float) -> list[str]:
    return [
        f"{each.name}: prompt {prompt}, position {position}: token {each.answers.tokens[prompt][position]} is "
        f"{margin:.4g} below vLLM's largest logit, and rounding explains {rounding_margin:.4g}"
        for each in passes
        for prompt, margins in enumerate(each.answers.margins)
        for position, margin in enumerate(margins)
        if not margin <= rounding_margin  # a NaN is beyond it too
    ]


def _too_rare(results: tuple[PassResult, ...], num_prompts: int, *, own_identical: int, allowed: int) -> list[str]:
    reasons: list[str] = []
    off_top = sum(result.off_top for result in results)
    if off_top > allowed:
        reasons.append(
            f"{off_top} tokens are not vLLM's largest logit, and at most {allowed} are what vLLM's own would be"
        )
    identical, num_sequences = sum(result.identical for result in results), num_prompts * len(results)
    may_differ = num_sequences // _ONE_IN if own_identical == num_prompts else 0
    if (identical + may_differ) * num_prompts < own_identical * num_sequences:
        reasons.append(
            f"{identical} of {num_sequences} sequences are identical to vLLM's in the like composition: a smaller "
            f"share than the {own_identical} of {num_prompts} that vLLM has with itself in the other composition"
        )
    return reasons


def _rounding_margin(reference: Reference, dtype: str) -> float:
    own = max(_worst(reference.together), _worst(reference.one_by_one))
    return max(reference.largest_change, own, last_place(reference.largest_logit, dtype))


def _off_top_allowed(own: tuple[Answers, Answers], num_tokens: int) -> int:
    expected = num_tokens * sum(map(_off_top, own)) / max(sum(map(_num_tokens, own)), 1)
    return int(expected + 3 * math.sqrt(expected) + 3)


def _result(each: Pass, reference: Reference) -> PassResult:
    return PassResult(
        name=each.name,
        like=each.like,
        identical=_identical(each.answers.tokens, reference.of(each.like).tokens),
        identical_to_together=_identical(each.answers.tokens, reference.together.tokens),
        off_top=_off_top(each.answers),
        worst_margin=_worst(each.answers),
    )


def _differences(each: Pass, reference: Answers) -> Iterator[Difference]:
    for prompt, (ours, theirs) in enumerate(zip(each.answers.tokens, reference.tokens, strict=True)):
        if ours == theirs:
            continue
        shorter = min(len(ours), len(theirs))
        position = next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)
        margins = each.answers.margins[prompt]
        yield Difference(
            pass_name=each.name,
            prompt=prompt,
            position=position,
            cluster_token=ours[position] if position < len(ours) else None,
            reference_token=theirs[position] if position < len(theirs) else None,
            margin=margins[position] if position < len(margins) else None,
        )


def _identical(ours: Tokens, theirs: Tokens) -> int:
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def _num_tokens(answers: Answers) -> int:
    return sum(map(len, answers.tokens))


def _off_top(answers: Answers) -> int:
    return sum(margin > 0 for margins in answers.margins for margin in margins)


def _worst(answers: Answers) -> float:
    return max((margin for margins in answers.margins for margin in margins), default=0.0)
