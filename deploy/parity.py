"""`expertmesh parity`: greedy tokens of a cluster beside those of an unmodified vLLM process on the same checkpoint.

What must hold, for each dtype, is said in deploy/parity_verdict.py; deploy/parity_traffic.py has the prompts and the
passes, deploy/reference.py the vLLM process.
"""

import argparse
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.config import DEFAULT_CONFIG, DeploymentConfig, Resolved, check_machine, load, memory_needed, resolve
from deploy.local import LocalCluster, RunningCluster
from deploy.parity_show import as_json, table
from deploy.parity_traffic import MAX_PROMPT, Question, answers_alone, answers_under_load, make_prompts
from deploy.parity_verdict import Answers, Pass, Reference, Verdict, judge
from deploy.reference import Forced, Job, ReferenceProcess, Report
from experts.checkpoint import open_checkpoint
from experts.errors import ConfigError

ALONE, UNDER_LOAD = "alone", "under load"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The cluster that is compared: the running one, or one of our own."""

    running: RunningCluster | None  # None: to be started
    resolved: Resolved
    question: Question

    @property
    def dtype(self) -> str:
        return self.resolved.dtype


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options. Without any, the running cluster is compared, or one like the laptop's is started."""
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="compare on this checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="compute in this type")
    parser.add_argument("--prompts", type=_positive, default=16, metavar="N", help="prompts of a pass (default: 16)")
    parser.add_argument("--tokens", type=_positive, default=32, metavar="N", help="tokens of an answer (default: 32)")
    parser.add_argument("--groups", type=_positive, metavar="D", help="expert groups")
    parser.add_argument("--attention", type=_positive, metavar="R", help="attention replicas")
    parser.add_argument("--load", type=_count, default=8, metavar="N", help="sampled streams beside (default: 8)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="config file of the cluster that is started")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """0 where the cluster's tokens are vLLM's, as far as its dtype allows; else 1.

    Raises ConfigError where the cluster cannot be compared, ServingError where it or the reference did not answer.
    """
    # Ray prints to stdout when it ends; the verdict alone belongs there.
    with redirect_stdout(sys.stderr):
        verdict, running = _compare(args)
    print(as_json(verdict, running) if args.json else table(verdict, running))
    return 0 if verdict.holds else 1


def _compare(args: argparse.Namespace) -> tuple[Verdict, RunningCluster]:
    subject = _subject(args)
    with ReferenceProcess(threads=subject.resolved.config.attention.threads) as reference:
        with _cluster(subject) as running:
            beside = _fits_beside(subject.resolved)
            if beside:
                reference.start(_reference_arguments(subject))
            answers = _ask(running, subject.question, num_streams=args.load)
            report = _report(reference, subject, answers) if beside else None
        if report is None:  # there was no memory for both at a time
            reference.start(_reference_arguments(subject))
            report = _report(reference, subject, answers)
    return judge(subject.dtype, _passes(report), _measured(report)), running


def _subject(args: argparse.Namespace) -> Subject:
    running = RunningCluster.find()
    if running is None:
        resolved = _own(args)
    else:
        _check_match(running, args)
        resolved = _of_running(running)
    _check_nothing_is_dropped(resolved.config)
    vocab_size = resolved.checkpoint.config.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigError(f"{resolved.checkpoint.path}/config.json has no vocab_size")
    max_model_len = resolved.config.model.max_model_len
    if MAX_PROMPT + args.tokens >= max_model_len:
        raise ConfigError(
            f"--tokens may be at most {max_model_len - MAX_PROMPT - 1} with max_model_len {max_model_len}"
        )
    question = Question(
        prompts=make_prompts(resolved.checkpoint.path, args.prompts, vocab_size=vocab_size),
        num_tokens=args.tokens,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
    )
    return Subject(running=running, resolved=resolved, question=question)


def _check_match(running: RunningCluster, args: argparse.Namespace) -> None:
    if args.config is not None:
        raise ConfigError(
            f"a cluster is running (pid {running.pid}), and --config would start another one: leave it out, or end the "
            "running one with `expertmesh down`"
        )
    checkpoint = None if args.checkpoint is None else str(args.checkpoint.resolve())
    for flag, asked, found in (
        ("--checkpoint", checkpoint, str(Path(running.checkpoint).resolve())),
        ("--dtype", args.dtype, running.dtype),
        ("--groups", args.groups, running.num_groups),
        ("--attention", args.attention, running.attention_replicas),
    ):
        if asked is not None and asked != found:
            raise ConfigError(
                f"{flag} is {asked}, and the running cluster (pid {running.pid}) has {found}: leave it out, or end "
                "that cluster with `expertmesh down`"
            )


def _check_nothing_is_dropped(config: DeploymentConfig) -> None:
    factor = config.router.capacity_factor
    if factor is not None:
        raise ConfigError(
            f"router.capacity_factor is {factor:g}, so rows may be dropped, and tokens need not be vLLM's: compare a "
            "cluster that leaves it out"
        )


def _of_running(running: RunningCluster) -> Resolved:
    return resolve(DeploymentConfig.model_validate(running.config))


def _own(args: argparse.Namespace) -> Resolved:
    http_port, grpc_port = _free_ports(2)
    # It is for us alone, whatever door the config has for others.
    overrides: dict[str, object] = {
        "gateway.http_host": "127.0.0.1",
        "gateway.http_port": http_port,
        "gateway.grpc_host": "127.0.0.1",
        "gateway.grpc_port": grpc_port,
        "gateway.auth": "none",
        "gateway.tls_cert_file": None,
        "gateway.tls_key_file": None,
        "gateway.tls_client_ca_file": None,
    }
    for key, value in (
        ("model.checkpoint", None if args.checkpoint is None else str(args.checkpoint)),
        ("model.dtype", args.dtype),
        ("experts.groups", args.groups),
        ("attention.replicas", args.attention),
    ):
        if value is not None:
            overrides[key] = value
    config = _within_context(load(args.config or DEFAULT_CONFIG, overrides), args.checkpoint)
    resolved = resolve(config)
    check_machine(resolved)
    return resolved


def _within_context(config: DeploymentConfig, checkpoint: Path | None) -> DeploymentConfig:
    """A checkpoint named on the command line may have a shorter context than the config file assumes."""
    context = (
        None if checkpoint is None else open_checkpoint(checkpoint.absolute()).config.get("max_position_embeddings")
    )
    if not isinstance(context, int) or context >= config.model.max_model_len:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"max_model_len": context})})


@contextmanager
def _cluster(subject: Subject) -> Iterator[RunningCluster]:
    if subject.running is not None:
        _say(f"comparing the running cluster (pid {subject.running.pid})")
        yield subject.running
        return
    with LocalCluster(subject.resolved, say=_say) as cluster:
        yield cluster.running


def _ask(running: RunningCluster, question: Question, *, num_streams: int) -> dict[str, list[list[int]]]:
    count = len(question.prompts)
    _say(f"asking {count} prompts one after the other")
    alone = answers_alone(running.grpc, question)
    _say(f"asking {count} prompts at once, beside {num_streams} sampled streams")
    return {ALONE: alone, UNDER_LOAD: answers_under_load(running.grpc, question, num_streams=num_streams)}


def _report(reference: ReferenceProcess, subject: Subject, answers: dict[str, list[list[int]]]) -> Report:
    _say("asking unmodified vLLM")
    question = subject.question
    report = reference.report(Job(prompts=question.prompts, num_tokens=question.num_tokens, passes=answers))
    reference.stop()
    return report


def _reference_arguments(subject: Subject) -> dict[str, object]:
    # Imported here: they import Ray, whose environment must be set before that where we start a cluster.
    from cluster.attention import plain_engine_arguments
    from experts.served_model import ServedModel

    config = subject.resolved.config
    model = ServedModel(
        checkpoint=str(subject.resolved.checkpoint.path),
        dtype=subject.dtype,
        num_groups=1,
        max_rows=subject.resolved.max_rows,
        runtime_dir="",
    )
    arguments = plain_engine_arguments(
        model, max_model_len=config.model.max_model_len, kv_cache_mib=config.attention.kv_cache_mib
    )
    # All prompts in one batch is one of the two compositions.
    return arguments | {"max_num_seqs": max(config.attention.max_num_seqs, len(subject.question.prompts))}


def _fits_beside(resolved: Resolved) -> bool:
    """Whether the reference can be loaded now, while the cluster is up."""
    return memory_needed(_shrunk(resolved)) < psutil.virtual_memory().available


def _shrunk(resolved: Resolved) -> Resolved:
    """The smallest deployment of the same checkpoint: an upper bound for one process that holds all of it."""
    config = resolved.config
    smallest = config.model_copy(
        update={
            "attention": config.attention.model_copy(update={"replicas": 1}),
            "experts": config.experts.model_copy(update={"groups": 1, "replicas": 1}),
            "router": config.router.model_copy(update={"replicas": 1}),
        }
    )
    return Resolved(
        config=smallest, checkpoint=resolved.checkpoint, served_name=resolved.served_name, dtype=resolved.dtype
    )


def _passes(report: Report) -> tuple[Pass, ...]:
    return (
        Pass(name=ALONE, like="one by one", answers=_answers(report["passes"][ALONE])),
        Pass(name=UNDER_LOAD, like="together", answers=_answers(report["passes"][UNDER_LOAD])),
    )


def _measured(report: Report) -> Reference:
    return Reference(
        together=_answers(report["together"]),
        one_by_one=_answers(report["one_by_one"]),
        largest_change=report["largest_change"],
        largest_logit=report["largest_logit"],
    )


def _answers(forced: Forced) -> Answers:
    return Answers(tokens=tuple(map(tuple, forced["tokens"])), margins=tuple(map(tuple, forced["margins"])))


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until the last is found, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
