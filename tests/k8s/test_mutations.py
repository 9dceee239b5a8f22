"""The checks catch what they are there for: faults are planted in a copy of a render, and each is caught by name."""

import pickle
from functools import cache

import faults_network
import faults_pods
import faults_ray
import faults_serve
import pytest
import schemas
from checks import ALL, checks_of
from faults import FAULTS, Fault
from rendered import documents

SOURCES = (faults_network, faults_pods, faults_ray, faults_serve)  # importing them fills FAULTS
LEAST_FAULTS = 25


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_name(fault: Fault):
    check, before = checks_of(fault.overlay)[fault.check], documents(fault.overlay)
    spoilt = pickle.loads(pickle.dumps(before))
    fault.plant(spoilt)
    assert spoilt != before, "nothing was planted"
    if fault.check == "schemas" and any(map(schemas.wants_crds, (new for new in spoilt if new not in before))):
        schemas.need_crds()
    assert fault.rule not in _rules_before(fault.overlay, fault.check), "the rule is broken without the fault"
    found = check(spoilt)
    assert fault.rule in {problem.rule for problem in found}, f"caught only {[str(problem) for problem in found]}"


def test_there_are_enough_faults_and_every_check_has_one():
    assert len(FAULTS) >= LEAST_FAULTS
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.check for fault in FAULTS} == set(ALL)


@cache
def _rules_before(overlay: str, check: str) -> frozenset[str]:
    """The rules that an overlay breaks as it is."""
    return frozenset(problem.rule for problem in checks_of(overlay)[check](documents(overlay)))
