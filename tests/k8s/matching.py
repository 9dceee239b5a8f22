"""Labels and what selects them, in Kubernetes' words and in Ray's."""

from collections.abc import Mapping


def selects(selector: object, labels: Mapping[str, str]) -> bool:
    """Whether a Kubernetes LabelSelector selects the labels; an empty one selects everything."""
    if not isinstance(selector, dict):
        return True
    wanted, expressions = selector.get("matchLabels") or {}, selector.get("matchExpressions") or []
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _holds(expression, labels) for expression in expressions
    )


def ray_selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a Ray label_selector selects a node's labels: `value`, `!value`, `in(a,b)` or `!in(a,b)` for each key."""
    return all(_ray_holds(str(wanted), labels.get(key)) for key, wanted in selector.items())


def _holds(expression: Mapping[str, object], labels: Mapping[str, str]) -> bool:
    key, values = str(expression.get("key")), expression.get("values") or []
    assert isinstance(values, list)
    match expression.get("operator"):
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    return False


def _ray_holds(wanted: str, value: str | None) -> bool:
    negated, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    values = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    return (value in [one.strip() for one in values]) != negated
