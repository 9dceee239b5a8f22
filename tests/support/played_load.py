"""Loads for the autoscaling simulation: how much work each expert group is given, over time.

Each is `[num_steps, num_groups]` float64, in replicas that never rest: 1.6 is work for 1.6 of them.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Work = NDArray[np.float64]


def uniform(num_steps: int, num_groups: int, *, work: float) -> Work:
    return np.full((num_steps, num_groups), work)


def zipf(num_steps: int, num_groups: int, *, total: float) -> Work:
    """The k-th group has 1/k of the first one's work."""
    share = 1.0 / np.arange(1, num_groups + 1)
    return np.tile(total * share / share.sum(), (num_steps, 1))


def moving_hot_spot(num_steps: int, num_groups: int, *, stay_steps: int, cold: float, hot: float) -> Work:
    """One group is hot for stay_steps, and then, from one moment to the next, its neighbour is."""
    work = uniform(num_steps, num_groups, work=cold)
    step = np.arange(num_steps)
    work[step, step // stay_steps % num_groups] = hot
    return work


def day_and_night(num_steps: int, num_groups: int, *, day_steps: int, night: float, noon: float) -> Work:
    """A sine between `night` and `noon`, over as many days as fit; each group's noon is at another time."""
    phase = np.arange(num_steps)[:, None] / day_steps + np.arange(num_groups) / num_groups
    return night + (noon - night) * (1 - np.cos(2 * np.pi * phase)) / 2


def recorded(traffic: NDArray[np.float64], *, steps_per_window: int) -> Work:
    """What gate_load.json has recorded of eight groups, over and over.

    traffic: [num_steps] mean work of a group at that time.
    """
    rows = np.array(json.loads((Path(__file__).parent / "gate_load.json").read_text())["rows"], dtype=np.float64)
    spread = (rows / rows.mean())[np.arange(len(traffic)) // steps_per_window % len(rows)]
    return spread * traffic[:, None]


def with_noise(work: Work, *, spread: float, drift: float, seed: int) -> Work:
    """The work as it comes in: each step by itself log-normal with `spread`, on a slow wander of `drift`.

    The wander forgets itself over about ten steps; both are relative, and neither changes the mean.
    """
    rng = np.random.default_rng(seed)
    wander = np.zeros_like(work)
    for step in range(1, len(work)):
        wander[step] = 0.9 * wander[step - 1] + drift * np.sqrt(1 - 0.9**2) * rng.standard_normal(work.shape[1])
    return work * np.exp(spread * rng.standard_normal(work.shape) - spread**2 / 2 + wander - drift**2 / 2)
