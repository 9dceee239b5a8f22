"""What `expertmesh parity` prints."""

import json
from dataclasses import asdict

from deploy.local import RunningCluster
from deploy.parity_verdict import Verdict


def table(verdict: Verdict, running: RunningCluster) -> str:
    """The verdict for a terminal."""
    lines = [
        f"{running.dtype}, {running.num_groups} expert groups, {running.attention_replicas} attention: "
        f"{verdict.num_prompts} prompts, {verdict.num_tokens} tokens a pass, beside unmodified vLLM",
        "",
        f"{'':<24}{'identical to':<22}{'of all':<10}{'off the top':<14}worst margin",
    ]
    count = verdict.num_prompts
    exact = verdict.rounding_margin is None
    for result in verdict.passes:
        like, identical = ("together", result.identical_to_together) if exact else (result.like, result.identical)
        same = f"{identical}/{count}"
        lines.append(
            f"cluster, {result.name:<15}vLLM, {like:<16}{same:<10}{result.off_top:<14}{result.worst_margin:.4g}"
        )
    same, off_top = f"{verdict.own_identical}/{count}", f"{verdict.own_off_top} (of both)"
    lines.append(f"{'vLLM, one by one':<24}{'vLLM, together':<22}{same:<10}{off_top:<14}{verdict.own_worst_margin:.4g}")
    if verdict.rounding_margin is not None:
        lines.append(f"{'allowed':<24}{'':<32}{verdict.off_top_allowed!s:<14}{verdict.rounding_margin:.4g}")
    if verdict.first_difference is not None:
        lines += ["", f"first difference: {verdict.first_difference}"]
    lines += ["", *verdict.reasons, "parity holds" if verdict.holds else "parity does NOT hold"]
    return "\n".join(lines)


def as_json(verdict: Verdict, running: RunningCluster) -> str:
    """The verdict for a program: one JSON object."""
    subject = {"dtype": running.dtype, "groups": running.num_groups, "attention": running.attention_replicas}
    return json.dumps({**subject, "checkpoint": running.checkpoint, **asdict(verdict)})
