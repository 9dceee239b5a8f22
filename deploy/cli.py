"""The command line, `expertmesh`."""

import argparse
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from deploy import make_checkpoint, parity, render
from deploy.config import DEFAULT_CONFIG, DeploymentConfig, check_machine, load, resolve, state_dir
from deploy.door import Door
from deploy.local import LocalCluster, RunningCluster
from deploy.waiting import START_TIMEOUT_S
from experts.errors import ConfigError, ExpertmeshError

STOP_TIMEOUT_S = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit code. What we raise on purpose is one line on stderr, without a traceback."""
    args = _parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        # `down`, and whoever else says it politely, ends a cluster as Ctrl-C does.
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        return args.run(args)
    except ExpertmeshError as error:
        print(f"expertmesh {args.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"expertmesh {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertmesh",
        description="Serves a mixture-of-experts model with its attention and its experts apart.",
        epilog="Begin with `expertmesh up`; `expertmesh COMMAND --help` says more of each.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = _command(commands, "up", _up, "start a cluster on this machine, or give a new config to the one that runs")
    up.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="config file (default: the laptop's)")
    up.add_argument("--detach", action="store_true", help="return when it answers; `expertmesh down` ends it")

    _command(commands, "down", _down, "end the cluster that `up` started")

    status = _command(commands, "status", _status, "deployments, replicas, who holds which experts")
    status.add_argument("--json", action="store_true", help="one JSON object instead of a table")

    generate = _command(commands, "generate", _generate, "continue a prompt, streaming over gRPC")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument(
        "--max-tokens", type=_whole_number(1, 2**32 - 1), default=64, metavar="N", help="tokens at most (default: 64)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    generate.add_argument("--seed", type=_whole_number(-(2**63), 2**63 - 1), help="makes sampling repeatable")
    generate.add_argument("--address", metavar="HOST:PORT", help="gRPC address (default: the cluster of this machine)")
    generate.add_argument("--json", action="store_true", help="one JSON object at the end instead of a stream of text")

    parity.add_arguments(
        _command(commands, "parity", parity.run, "compare the cluster's tokens with an unmodified vLLM process")
    )
    make_checkpoint.add_arguments(
        _command(commands, "make-checkpoint", make_checkpoint.run, "write a small random checkpoint, for tests")
    )
    render.add_arguments(_command(commands, "render", render.run, "print the Kubernetes manifests of a deployment"))
    return parser


def _whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"must be between {lowest} and {highest}")
        return int(text)

    return number


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _up(args: argparse.Namespace) -> int:
    resolved = resolve(load(args.config))
    running = RunningCluster.find()
    if running is not None:
        from deploy.change import change

        change(running, resolved, say=_say)
        return 0
    check_machine(resolved)
    if args.detach:
        return _detach(args)
    try:
        with LocalCluster(resolved, say=_say) as cluster:
            cluster.running.write()
            print(_what_to_try(cluster.running), flush=True)
            signal.pause()
    except KeyboardInterrupt:
        _say("stopped")
    finally:
        RunningCluster.file().unlink(missing_ok=True)
    return 0


def _detach(args: argparse.Namespace) -> int:
    """Starts `up` again as a process of its own, and waits until it answers."""
    log_file = state_dir() / "up.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as log:
        owner = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "up", "--config", str(args.config.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).parents[1],  # where `deploy` can be imported from
        )
    try:
        _follow(owner, log_file)
    except BaseException:
        owner.terminate()
        raise
    return 0


def _follow(owner: subprocess.Popen[bytes], log_file: Path) -> None:
    """Shows what the owner says until its cluster answers. Raises ConfigError where it ends, or takes too long."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    said = 0
    while time.monotonic() < deadline_s:
        lines = log_file.read_text().splitlines()
        for line in lines[said:]:
            print(line, flush=True)
        said = len(lines)
        if owner.poll() is not None:
            raise ConfigError(f"the cluster did not start; see {log_file}")
        running = RunningCluster.find()
        if running is not None and running.pid == owner.pid:
            return
        time.sleep(0.5)
    raise ConfigError(f"the cluster did not start within {START_TIMEOUT_S:.0f} s; see {log_file}")


def _down(args: argparse.Namespace) -> int:
    running = _running()
    os.kill(running.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            os.kill(running.pid, 0)
        except ProcessLookupError:
            _say("stopped")
            return 0
        if RunningCluster.find() is None and _is_zombie(running.pid):
            return 0
        time.sleep(0.2)
    raise ConfigError(f"process {running.pid} did not end within {STOP_TIMEOUT_S:.0f} s; kill it to end the cluster")


def _status(args: argparse.Namespace) -> int:
    from deploy.show import status_table

    running = _running()
    try:
        status = Door.of_environment().get_json(f"{running.http}/expertmesh/status")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConfigError(f"the cluster at {running.http} does not answer: {error}") from None
    print(json.dumps(status, indent=2) if args.json else status_table(status))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from deploy.show import generate

    address = args.address or _running().grpc
    return generate(
        address,
        args.prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        as_json=args.json,
    )


def _running() -> RunningCluster:
    running = RunningCluster.find()
    if running is None:
        raise ConfigError("no cluster is running here; start one with `expertmesh up`")
    return running


def _what_to_try(running: RunningCluster) -> str:
    body = json.dumps({"model": running.model, "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0})
    key = (
        ""
        if DeploymentConfig.model_validate(running.config).gateway.auth == "none"
        else "-H 'Authorization: Bearer KEY' "
    )
    return "\n".join(
        [
            "",
            f"Serving {running.model} ({running.dtype}, {running.num_groups} expert groups). Try:",
            "",
            f"  curl {running.http}/v1/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}",
            "",
            f"  {_own_command()} generate --address {running.grpc} 'Once upon a time'",
            "",
            f"`{_own_command()} status` shows the parts. Ctrl-C, or `{_own_command()} down`, ends it.",
        ]
    )


def _own_command() -> str:
    """How to call us again as things are: by name where it is on the PATH, else by path."""
    program = Path(sys.argv[0])
    if program.name != "expertmesh":
        program = Path(sys.executable).with_name("expertmesh")
    on_path = any((Path(folder) / "expertmesh").exists() for folder in os.get_exec_path())
    return "expertmesh" if on_path else os.path.relpath(program)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[-1].startswith("Z")
    except OSError:
        return True


if __name__ == "__main__":
    sys.exit(main())
