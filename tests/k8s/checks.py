"""All checks by name, and which overlay has to pass which."""

import bounds
import capacity
import drain
import flows
import hardening
import kuberay_rules
import objects
import pins
import podsecurity
import production
import references
import schemas
import serve_rules
import wiring
from manifests import Check

EVERYWHERE: dict[str, Check] = {
    "objects": objects.check,
    "schemas": schemas.check,
    "kuberay_rules": kuberay_rules.check,
    "serve_rules": serve_rules.check,
    "wiring": wiring.check,
    "references": references.check,
    "bounds": bounds.check,
    "capacity": capacity.check,
    "drain": drain.check,
    "podsecurity": podsecurity.check,
    "hardening": hardening.check,
    "flows": flows.check,
    "pins": pins.check,
}
ONLY_IN: dict[str, dict[str, Check]] = {"prod": {"production": production.check}}
ALL = EVERYWHERE | {name: check for extra in ONLY_IN.values() for name, check in extra.items()}


def checks_of(overlay: str) -> dict[str, Check]:
    return EVERYWHERE | ONLY_IN.get(overlay, {})
