"""Kubernetes' quantities as numbers."""

import re

_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)(m|k|[MGTP]|[KMGTP]i)?")
_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGTP", start=1)
}


def quantity(written: object) -> float:
    """The number that a quantity such as `500m`, `1.5`, `16Gi` or 2 stands for.

    Raises ValueError for anything else.
    """
    found = _WRITTEN.fullmatch(str(written))
    if found is None:
        raise ValueError(f"{written!r} is no quantity such as 500m, 2 or 16Gi")
    return float(found[1]) * _UNITS.get(found[2], 1.0)


def quantity_or_zero(written: object) -> float:
    """For arithmetic beside the check (bounds.py) that refuses what is no quantity."""
    try:
        return quantity(written)
    except ValueError:
        return 0.0
