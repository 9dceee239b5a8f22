"""What the command line shows of a running cluster: its parts, and the text it generates."""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import cast

import grpc

from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from deploy.door import Door
from experts.errors import ServingError

_DROPPED = (
    "expertmesh generate: {} rows were dropped in the steps of this answer (router.capacity_factor), so it may be "
    "another than it would have been"
)


def status_table(status: Mapping[str, object]) -> str:
    """The status as text for a terminal. status: what /expertmesh/status answers."""
    deployments = cast("Mapping[str, Mapping[str, object]]", status.get("deployments", {}))
    cluster = cast("Mapping[str, object]", status.get("controller") or {})
    lines = [f"{'deployment':<14}{'status':<12}replicas"]
    for name, deployment in sorted(deployments.items()):
        replicas = cast("Mapping[str, int]", deployment.get("replicas", {}))
        counts = ", ".join(f"{count} {state.lower()}" for state, count in replicas.items()) or "none"
        lines.append(f"{name:<14}{deployment.get('status', ''):<12}{counts}")
    if not cluster:
        return "\n".join([*lines, "", "the controller does not answer: who holds which experts is not known"])
    missing = cast("list[int]", cluster.get("missing_groups", []))
    lines += ["", f"placement version {cluster.get('placement_version')}"]
    if missing:
        lines.append(f"without a live copy: expert groups {', '.join(map(str, missing))}")
    lines += ["", *_groups(cast("list[Mapping[str, object]]", cluster.get("groups", [])))]
    return "\n".join([*lines, "", *_members(cast("list[dict[str, object]]", cluster.get("members", [])))])


def generate(address: str, prompt: str, *, max_tokens: int, temperature: float, seed: int | None, as_json: bool) -> int:
    """Streams a continuation of `prompt` to stdout; the exit code. Raises ServingError with the server's sentence."""
    request = pb.GenerateRequest(prompt=prompt, max_tokens=max_tokens, temperature=temperature)
    if seed is not None:
        request.seed = seed
    text: list[str] = []
    token_ids: list[int] = []
    last = pb.GenerateChunk()
    try:
        with Door.of_environment().channel(address) as channel:
            for chunk in pb_grpc.InferenceStub(channel).GenerateStream(request):
                text.append(chunk.text)
                token_ids.extend(chunk.token_ids)
                last = chunk
                if not as_json:
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
    except grpc.RpcError as error:
        call = cast("grpc.Call", error)
        raise ServingError(f"{address}: {call.code().name}: {call.details()}") from None
    if as_json:
        answer = {
            "prompt": prompt,
            "text": "".join(text),
            "token_ids": token_ids,
            "finish_reason": last.finish_reason,
            "dropped_rows": last.dropped_rows,
        }
        print(json.dumps(answer))
        return 0
    print()
    if last.dropped_rows:
        print(_DROPPED.format(last.dropped_rows), file=sys.stderr)
    return 0


def _groups(groups: list[Mapping[str, object]]) -> list[str]:
    """Copies of each expert group, and why there are so many."""
    lines = [f"{'expert group':<14}{'copies':<12}why"]
    for group in groups:
        target = group.get("target")
        copies = f"{group['copies']}" if target is None else f"{group['copies']} of {target}"
        why = group.get("reason") or "not decided yet"
        changed = f"; before: {group['last_change']}" if group.get("last_change") else ""
        lines.append(f"{group['group']!s:<14}{copies:<12}{why}{changed}")
    return lines


def _members(members: list[dict[str, object]]) -> list[str]:
    by_kind: dict[str, list[dict[str, object]]] = defaultdict(list)
    for member in members:
        by_kind[str(member["kind"])].append(member)
    lines = [f"{'member':<36}{'pid':<9}holds"]
    for kind in ("experts", "router", "attention"):
        for member in by_kind[kind]:
            holds = _held(member) if kind == "experts" else ""
            lines.append(f"{member['member_id']:<36}{member['pid']:<9}{holds}")
    return lines


def _held(member: Mapping[str, object]) -> str:
    first, count = cast("int", member["first_expert"]), cast("int", member["num_experts"])
    return f"group {member['group']}: experts {first} to {first + count - 1} of each layer"
