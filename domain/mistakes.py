"""Pydantic's errors in our words: what was expected, what came, and for an unknown key the one probably meant.

>>> nearest("wavse", ["waves", "gate"])
'waves'
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

_SHOWN_CHARS = 72


@dataclass(frozen=True, slots=True)
class Fault:
    """One error of a validation: where in the document, and what. `is_key`: the key itself is wrong, not its value."""

    where: tuple[str | int, ...]
    message: str
    is_key: bool = False


def faults_of(error: ValidationError, model: type[BaseModel] | None = None) -> Iterator[Fault]:
    """Every fault of a validation, in the document's order.

    Args:
        error: what pydantic raised.
        model: the model validated, so that an unknown key at its top or in its nested models can be set right.
    """
    seen: set[tuple[str | int, ...]] = set()
    details = error.errors(include_url=False)
    for detail in details:
        where = tuple(detail["loc"])
        if detail["type"] == "too_short" and any(d["loc"][: len(where)] == where and d is not detail for d in details):
            continue  # pydantic counts only the items without faults of their own
        if where not in seen:
            seen.add(where)
            yield _fault(where, dict(detail), model)


def path_of(where: Iterable[str | int]) -> str:
    """`waves[1].size`."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "(document)"


def shown(value: Any) -> str:
    """A value for a message: its `repr`, so that no control character reaches a terminal, and not too much of it."""
    if value is None:
        return "nothing"
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text)} characters)"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _fault(where: tuple[str | int, ...], detail: dict[str, Any], model: type[BaseModel] | None) -> Fault:
    kind, value = detail["type"], detail.get("input")
    if kind == "missing":
        return Fault(where, "is missing", is_key=True)
    if kind == "extra_forbidden":
        return Fault(where, _unknown_key(where, model), is_key=True)
    if kind == "value_error":
        return Fault(where, str(detail["ctx"]["error"]))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return Fault(where, f"expected keys and values, got {shown(value)}")
    if kind in ("tuple_type", "list_type"):
        return Fault(where, f"expected a list, got {shown(value)}")
    if kind in ("too_short", "too_long"):
        context = detail["ctx"]
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return Fault(where, f"expected {bound}, got {context['actual_length']}")
    if kind == "invalid_key":
        return Fault(where, f"expected text as a key, got {shown(value)}", is_key=True)
    if kind == "string_type":
        return Fault(where, f"expected text, got {shown(value)}{_quote_hint(value)}")
    message = str(detail["msg"])
    expected = message.replace("Input should be ", "expected ", 1).replace("String should ", "expected text to ", 1)
    return Fault(where, f"{expected}, got {shown(value)}")


def _quote_hint(value: Any) -> str:
    return "; put it in quotes" if isinstance(value, bool | int | float) or hasattr(value, "isoformat") else ""


def _unknown_key(where: tuple[str | int, ...], model: type[BaseModel] | None) -> str:
    known = known_keys(where[:-1], model)
    if not known:
        return "unknown key"
    meant = nearest(str(where[-1]), known)
    return f"unknown key; did you mean '{meant}'?" if meant else f"unknown key, expected one of {', '.join(known)}"


def known_keys(where: tuple[str | int, ...], model: type[BaseModel] | None) -> list[str]:
    """The keys that may stand at a place in a document of this model; none where anything may."""
    for part in where:
        if isinstance(part, int):
            continue
        if model is None or part not in model.model_fields:
            return []
        model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _model_in(inner)) is not None:
            return found
    return None
