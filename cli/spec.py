"""Reading a specification, a rollout's or a fleet job's: YAML in, a model out, or every mistake at once with its line.

A document whose mistakes are taken out is checked again, so that a rule over several keys (waves that must grow, rates
that must be ordered) is told in the same run as a misspelt key elsewhere.
"""

import copy
import datetime
import re
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from domain.mistakes import Fault, faults_of, path_of
from models.errors import InvalidInputError, Mistake, NotFoundError, SpecError
from models.spec import RolloutSpec, WaveSpec

MAX_SPEC_BYTES = 4 * 1024 * 1024
"""Room for a target that names 100,000 devices."""
MAX_NODES = 250_000
"""Aliases can make a short document mean an endless one."""
MAX_BRACKETS = 50


Spec = TypeVar("Spec", bound=BaseModel)


@overload
def load_spec(path: Path) -> RolloutSpec: ...
@overload
def load_spec(path: Path, model: type[Spec]) -> Spec: ...
def load_spec(path: Path, model: type[BaseModel] = RolloutSpec) -> BaseModel:
    """The specification in a file; `model` is what it has to be.

    Raises:
        SpecError: every mistake in it, each with its line where it has one.
        NotFoundError, InvalidInputError: there is no such file, or it cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot read the specification {path}: there is no such file") from error
    except OSError as error:
        raise InvalidInputError(f"cannot read the specification {path}: {error.strerror}") from error
    return parse_spec(data, str(path), model)


@overload
def parse_spec(data: bytes, source: str) -> RolloutSpec: ...
@overload
def parse_spec(data: bytes, source: str, model: type[Spec]) -> Spec: ...
def parse_spec(data: bytes, source: str, model: type[BaseModel] = RolloutSpec) -> BaseModel:
    """The specification in these bytes; `source` is their name in errors. Raises SpecError."""
    document = _document(data, source)
    try:
        return model.model_validate(_plain(document))
    except _TooLargeError:
        raise SpecError(
            source, [Mistake("(document)", f"more than {MAX_NODES} values; are there aliases in it?")]
        ) from None
    except ValidationError:
        faults = [_placed(fault, document) for fault in _every_fault(_plain(document), model)]
        mistakes = [Mistake(path_of(fault.where), fault.message, _line(document, fault)) for fault in faults]
        raise SpecError(source, sorted(mistakes, key=lambda m: m.line or 0)) from None


M = TypeVar("M", bound=BaseModel)


def parse_model(data: bytes, source: str, model: type[M]) -> M:
    """A document of another kind, read as strictly. Raises SpecError with every mistake, each with its line."""
    document = _document(data, source)
    try:
        return model.model_validate(_plain(document))
    except _TooLargeError:
        raise SpecError(
            source, [Mistake("(document)", f"more than {MAX_NODES} values; are there aliases in it?")]
        ) from None
    except ValidationError as error:
        faults = faults_of(error, model)
        mistakes = [Mistake(path_of(f.where), f.message, _line(document, f)) for f in faults]
        raise SpecError(source, sorted(mistakes, key=lambda m: m.line or 0)) from None


def _document(data: bytes, source: str) -> CommentedMap:
    if len(data) > MAX_SPEC_BYTES:
        raise SpecError(source, [Mistake("(document)", f"{len(data)} bytes, expected at most {MAX_SPEC_BYTES}")])
    if _brackets(data) > MAX_BRACKETS:  # the reader would take a quarter of a minute to say so
        raise SpecError(source, [Mistake("(document)", f"brackets nested deeper than {MAX_BRACKETS}")])
    try:
        document = YAML(typ="rt").load(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SpecError(source, [Mistake("(document)", "not UTF-8", line)]) from error
    except DuplicateKeyError as error:
        mark = error.problem_mark
        found = str(error.problem).replace('"', "'")
        raise SpecError(source, [Mistake("(document)", found, mark.line + 1 if mark else None)]) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SpecError(
            source, [Mistake("(document)", _yaml_problem(error), mark.line + 1 if mark else None)]
        ) from error
    except (YAMLError, ValueError, RecursionError) as error:
        first = (str(error).strip() or "nested too deeply").splitlines()[0]
        raise SpecError(source, [Mistake("(document)", f"not YAML: {first}")]) from error
    if not isinstance(document, CommentedMap):
        found = "nothing" if document is None else type(document).__name__.replace("CommentedSeq", "a list")
        raise SpecError(source, [Mistake("(document)", f"expected keys and values as in 'name: ...', got {found}", 1)])
    return document


def _brackets(data: bytes) -> int:
    """How deep brackets are nested, those in text and comments included."""
    depth = deepest = 0
    for bracket in re.findall(rb"[\[{\]}]", data):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _yaml_problem(error: MarkedYAMLError) -> str:
    parts = [part for part in (error.context, error.problem) if part]
    return f"not YAML: {', '.join(parts)}"


class _TooLargeError(Exception):
    """More nodes than MAX_NODES; never leaves this module."""


def _plain(node: Any) -> Any:
    """The document in Python's own types."""
    left = MAX_NODES

    def plain(inner: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooLargeError
        if isinstance(inner, CommentedMap):
            return {_scalar(key): plain(value) for key, value in inner.items()}
        if isinstance(inner, CommentedSeq):
            return [plain(value) for value in inner]
        return _scalar(inner)

    try:
        return plain(node)
    except RecursionError:
        raise _TooLargeError from None


def _scalar(value: Any) -> Any:
    """YAML's scalars without what the reader remembers of their writing."""
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, TaggedScalar):
        return str(value.value)
    if isinstance(value, datetime.datetime):
        return datetime.datetime.fromisoformat(value.isoformat())
    return value


def _placed(fault: Fault, document: CommentedMap) -> Fault:
    """A rule over several keys says first which of them it is about: that is where the mistake is shown."""
    key, colon, message = fault.message.partition(": ")
    if fault.where or not colon or key not in document:
        return fault
    return Fault((key,), message)


def _every_fault(document: dict[str, Any], model: type[BaseModel]) -> list[Fault]:
    """Faults of the document, then of what remains when they are taken out, until nothing new is found."""
    found: dict[tuple[str | int, ...], Fault] = {}
    remaining = copy.deepcopy(document)
    while new := [fault for fault in _faults(remaining, model) if not _is_known(fault, found)]:
        for fault in new:
            found[fault.where] = fault
            _take_out(remaining, fault.where)
    broken = {where[1] for where in found if where[:1] == ("waves",) and len(where) > 1}
    if broken and isinstance(remaining.get("waves"), list):
        remaining["waves"] = [wave for i, wave in enumerate(remaining["waves"]) if i not in broken or _is_wave(wave)]
        found.update({fault.where: fault for fault in _faults(remaining, model) if fault.where == ("waves",)})
    return list(found.values())


def _is_wave(wave: Any) -> bool:
    try:
        WaveSpec.model_validate(wave)
    except ValidationError:
        return False
    return True


def _faults(document: dict[str, Any], model: type[BaseModel]) -> list[Fault]:
    try:
        model.model_validate(document)
    except ValidationError as error:
        return list(faults_of(error, model))
    return []


def _is_known(fault: Fault, found: dict[tuple[str | int, ...], Fault]) -> bool:
    """Told already; or only there because the value that was at fault has been taken out."""
    return fault.where in found or (
        fault.message == "is missing" and any(w[: len(fault.where)] == fault.where for w in found)
    )


def _take_out(document: Any, where: tuple[str | int, ...]) -> None:
    parent = document
    for part in where[:-1]:
        try:
            parent = parent[part]
        except (KeyError, IndexError, TypeError):
            return
    if where and isinstance(parent, dict):
        parent.pop(where[-1], None)


def _line(document: CommentedMap, fault: Fault) -> int | None:
    """The line of the key (where that is wrong) or of its value; of what contains it where it is missing."""
    node: Any = document
    line: int = document.lc.line + 1
    for depth, part in enumerate(fault.where):
        is_last = depth == len(fault.where) - 1
        try:
            position = node.lc.data[part]  # of a map: line and column of the key, then of the value
            named = isinstance(node, CommentedMap) and not (is_last and fault.is_key)
            line = int(position[2 if named else 0]) + 1
            node = node[part]
        except (KeyError, IndexError, TypeError, AttributeError):
            return line
    return line
