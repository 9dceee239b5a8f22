"""The preStop hook of a worker pod: `python -m deploy.leave --deadline-s N`.

It asks Ray to drain the pod's node, so that Serve starts replacements elsewhere before it stops the replicas here;
waits until none of ours is left, or the deadline is over; and stops Ray. The pod's processes themselves say what is
left: whoever ends a pod may have ended the cluster's head as well.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import psutil

APPLICATION = "expertmesh"  # deploy/app.py's APP_NAME; importing that would load vLLM, here, while the pod is busy
LOOK_EVERY_S = 1.0
SAY_EVERY_S = 10.0
ASK_EVERY_S = 5.0
ASK_FOR_S = 60.0  # the head may be restarting; if it stays away, nobody is there to move replicas
CALL_TIMEOUT_S = 30.0  # of one `ray` command
_NODE_ID_FLAGS = ("--node_id=", "--node-id=")
Say = Callable[[str], None]
Commands = Iterable[Sequence[str]]  # of processes, each as its arguments


def main(arguments: list[str] | None = None) -> int:
    """0 in any case: Kubernetes ends the container, whatever the hook says."""
    parser = argparse.ArgumentParser(prog="deploy.leave", description="Empties this Ray node, and stops it.")
    parser.add_argument("--deadline-s", type=int, required=True, metavar="N", help="seconds until it stops in any case")
    end_s = time.monotonic() + parser.parse_args(arguments).deadline_s
    try:
        _leave(end_s, _say)
    finally:
        _stop_ray()
    return 0


def node_id(commands: Commands) -> str | None:
    """The id of the Ray node that these processes are, as its raylet was given it; None where no raylet runs."""
    raylet = next((command for command in commands if command and command[0].endswith("/raylet")), ())
    for argument in raylet:
        for flag in _NODE_ID_FLAGS:
            if argument.startswith(flag):
                return argument.removeprefix(flag)
    return None


def replicas_left(commands: Commands) -> list[str]:
    """The deployments whose replicas are among these processes, sorted, one entry for each replica."""
    mark = f"ServeReplica:{APPLICATION}:"
    titles = [command[0] for command in commands if command and command[0].startswith("ray::") and mark in command[0]]
    # A title goes on with the method that runs, as in `ray::ServeReplica:expertmesh:router.__init__`.
    return sorted(title.partition(mark)[2].partition(".")[0].strip() for title in titles)


def drain_command(node: str, remaining_s: float) -> list[str]:
    """Preemption, since Ray may refuse the other reason, idleness, for a node that is not idle."""
    return [
        "ray",
        "drain-node",
        f"--node-id={node}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=the pod is being deleted",
        f"--deadline-remaining-seconds={max(0, int(remaining_s))}",
    ]


def wait_until_left(
    left: Callable[[], list[str]], end_s: float, *, say: Say, now: Callable[[], float], sleep: Callable[[float], None]
) -> bool:
    """Whether nothing is left before end_s, on the clock `now`. left: what still is. Says so every SAY_EVERY_S."""
    said_s = -SAY_EVERY_S
    while waiting_for := left():
        if now() >= end_s:
            say(f"the deadline is over, and these are stopped as they are: {', '.join(waiting_for)}")
            return False
        if now() - said_s >= SAY_EVERY_S:
            said_s = now()
            say(f"waiting, at most {end_s - said_s:.0f} s, for {', '.join(waiting_for)}")
        sleep(LOOK_EVERY_S)
    say("no replica is left here")
    return True


def _leave(end_s: float, say: Say) -> None:
    node = node_id(_commands())
    if node is None:
        say("no Ray node runs here")
        return
    if _ask_to_drain(node, end_s, say):
        wait_until_left(lambda: replicas_left(_commands()), end_s, say=say, now=time.monotonic, sleep=time.sleep)


def _ask_to_drain(node: str, end_s: float, say: Say) -> bool:
    """Whether Ray's head has taken the request."""
    give_up_s = min(end_s, time.monotonic() + ASK_FOR_S)
    while True:
        problem = _call(drain_command(node, end_s - time.monotonic()))
        if problem is None:
            say(f"Ray drains node {node}")
            return True
        say(f"Ray does not drain node {node}: {problem}")
        if time.monotonic() + ASK_EVERY_S >= give_up_s:
            return False
        time.sleep(ASK_EVERY_S)


def _stop_ray() -> None:
    problem = _call(["ray", "stop"])
    _say("Ray is stopped" if problem is None else f"ray stop: {problem}")


def _call(command: list[str]) -> str | None:
    """What went wrong, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {CALL_TIMEOUT_S:.0f} s"
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip().rpartition("\n")[2]


def _commands() -> list[list[str]]:
    """The command lines of all processes that this one sees: those of its container."""
    return [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]


def _say(text: str) -> None:
    """In the container's log: Kubernetes shows what a hook prints only where it fails."""
    line = f"leave: {text}"
    try:
        with open("/proc/1/fd/1", "w") as log:
            print(line, file=log, flush=True)
    except OSError:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
