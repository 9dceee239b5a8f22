"""`expertmesh up` where a cluster runs already: it takes the new config while it serves."""

import logging
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import psutil

from deploy.config import DeploymentConfig, Resolved, memory_needed, pinned
from deploy.local import RunningCluster, booked_cpus, ray_environment
from deploy.waiting import Say, StartError, wait_until_running
from experts.errors import ConfigError

# Every part must agree on these, so old and new replicas could not work together; and clients know the ports.
FIXED = (
    ("model", ("checkpoint", "served_name", "dtype", "max_model_len")),
    ("experts", ("groups", "listen")),
    ("gateway", ("http_host", "http_port", "grpc_host", "grpc_port", "tls_cert_file")),
    ("metrics", ("host", "port", "enabled")),
)


def change(running: RunningCluster, resolved: Resolved, *, say: Say) -> None:
    """Makes the running cluster what the config says; replicas whose settings are the same go on undisturbed.

    Numbers of replicas, limits and bounds of the autoscaling change without a restart. Anything else restarts the
    replicas one after the other, each of them when its replacement is there.
    Raises ConfigError where the change needs `expertmesh down` first, and StartError where it failed.
    """
    old, new = DeploymentConfig.model_validate(running.config), pinned(resolved)
    _check(running, old, new)
    _check_memory(old, resolved)
    os.environ |= ray_environment(Path(running.runtime_dir))
    import ray
    from ray.serve.context import _get_global_client

    from deploy.app import serve_config

    started_s = time.monotonic()
    ray.init(address=running.ray_address, namespace="serve", log_to_driver=False, logging_level=logging.ERROR)
    try:
        client = _get_global_client()
        if client is None:
            raise StartError(
                f"Serve does not answer at {running.ray_address}; `expertmesh down` ends what is left of it"
            )
        client.deploy_apps(serve_config(resolved, running.runtime_dir))
        # Now, and not at the end: Serve goes on trying to make it so, whatever becomes of us.
        replace(running, config=new.model_dump(), attention_replicas=new.attention.replicas).write()
        wait_until_running(client, started_s=started_s, say=say)
    finally:
        ray.shutdown()


def _check(running: RunningCluster, old: DeploymentConfig, new: DeploymentConfig) -> None:
    before, after = old.model_dump(), new.model_dump()
    changed = [
        f"{section}.{key} from {before[section][key]} to {after[section][key]}"
        for section, keys in FIXED
        for key in keys
        if before[section][key] != after[section][key]
    ]
    if changed:
        raise ConfigError(f"cannot change {', '.join(changed)} while the cluster runs: `expertmesh down` first")
    # Twice: where everything restarts, each replacement books its place before the old replica goes.
    needed = math.ceil(2 * booked_cpus(new))
    if needed > running.ray_cpus:
        raise ConfigError(
            f"the new config books {booked_cpus(new):.1f} CPUs from Ray and may need {needed} for a while, and the "
            f"cluster was started with {running.ray_cpus}: fewer replicas, or `expertmesh down` first"
        )


def _check_memory(old: DeploymentConfig, resolved: Resolved) -> None:
    more = memory_needed(resolved) - memory_needed(replace(resolved, config=old))
    free = psutil.virtual_memory().available
    if more > free:
        raise ConfigError(
            f"the change needs about {more / 2**30:.1f} GiB more memory on this machine, and {free / 2**30:.1f} GiB "
            "are free: use fewer replicas, or a larger machine"
        )
