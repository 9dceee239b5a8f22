"""Reads the numbers out of Prometheus' families."""

from collections.abc import Iterable

from prometheus_client import Metric


def values(families: Iterable[Metric], name: str) -> dict[tuple[str, ...], float]:
    """Samples of a family by their labels' values, in the order of the labels' names."""
    return {
        tuple(label for _, label in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }
