"""JSON schemas: their objects, which are closed, and the schemas that a value may follow.

By the standard an object may have any other keys too. Small models then invent keys until the
answer is cut off, so llama.cpp and Ollama close the objects of a schema that does not say
otherwise, and users expect that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import unquote

OTHER_KEYS = ("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames")
"""Keywords by which an object itself says which other keys it may have."""
COMBINED = ("allOf", "anyOf", "oneOf")
"""Keywords with lists of schemas for the same value."""
NAMED_VALUES = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords with schemas of other values, by name."""
VALUES = ("additionalProperties", "items", "prefixItems", "additionalItems")
"""Keywords with a schema of other values, or a list of schemas."""
MOST_PARTS = 64
"""Most schemas that are read for one value, and most values whose types are."""
NAMES_OF_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
"""Names of the types of values but texts."""


def close_objects(schema: Any) -> None:
    """Close the objects of a schema, in place, that have `properties` and allow no others.

    An object may consist of several schemas: its own keywords, those in `allOf`, `anyOf` and
    `oneOf`, and the one that it refers to. It is closed as a whole. A reference that cannot be
    followed leaves it open.
    """
    if isinstance(schema, dict):
        _Closing(schema).run()


@dataclass
class _Keys:
    """What the schemas of one object say about its keys."""

    names: dict[str, None] = field(default_factory=dict)  # in their order
    has_properties: bool = False
    has_others: bool = False  # whether a keyword of `OTHER_KEYS` is there, or may be

    @property
    def are_known(self) -> bool:
        return self.has_properties or bool(self.names)


class _Closing:
    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema
        self._original = _copy(schema)  # what references mean while the schema changes
        self._open: dict[str, str] = {}  # references to copies that are not closed, by reference
        # Schemas to visit, and whether each is closed by itself. They may be nested, and refer to
        # each other, deeper than Python's stack.
        self._waiting: list[tuple[Any, bool]] = [(schema, True)]

    def run(self) -> None:
        while self._waiting:
            part, closes = self._waiting.pop()
            if isinstance(part, dict):
                self._visit(part, closes)

    def _visit(self, part: dict[str, Any], closes: bool) -> None:
        for name in NAMED_VALUES:
            if isinstance(values := part.get(name), dict):
                self._waiting += ((value, True) for value in values.values())
        for name in VALUES:
            value = part.get(name)
            self._waiting += ((x, True) for x in (value if isinstance(value, list) else [value]))
        closes = closes and self._close(part)
        if not closes and "$ref" in part:
            self._open_reference(part)
        for name in COMBINED:
            self._waiting += ((x, closes) for x in _schemas(part, name))

    def _close(self, part: dict[str, Any]) -> bool:
        """Close an object as a whole, if need be; returns whether its parts are closed instead."""
        own = {name: x for name, x in part.items() if name not in (*COMBINED, "$ref")}
        groups = [[x] for x in _schemas(part, "allOf")]
        groups += [group for name in ("anyOf", "oneOf") if (group := [*_schemas(part, name)])]
        groups += [[{"$ref": part["$ref"]}]] if "$ref" in part else []
        if not self._keys([own]).are_known and (
            len(groups) <= 1 or sum(self._keys(group).are_known for group in groups) <= 1
        ):
            return True
        keys, given = self._keys([part]), part.get("properties", {})
        if keys.has_properties and not keys.has_others and isinstance(given, dict):
            part["properties"] = given | {x: True for x in keys.names if x not in given}
            part["additionalProperties"] = False
        return False

    def _keys(self, parts: Sequence[Any]) -> _Keys:
        """Gather what schemas, and the parts of them, say about the keys of an object."""
        found, followed = _Keys(), set()
        waiting = [*reversed(parts)]
        while waiting:
            part = waiting.pop()
            if not isinstance(part, dict):
                continue
            for name in ("properties", "required"):
                if isinstance(names := part.get(name), dict | list):
                    found.names |= dict.fromkeys(x for x in names if isinstance(x, str))
            found.has_properties |= isinstance(part.get("properties"), dict)
            found.has_others |= any(name in part for name in OTHER_KEYS)
            if (reference := part.get("$ref")) is not None and str(reference) not in followed:
                followed.add(str(reference))
                target = target_of(reference, self._original)
                found.has_others |= target is None
                waiting.append(target)
            waiting += reversed([x for name in COMBINED for x in _schemas(part, name)])
        return found

    def _open_reference(self, part: dict[str, Any]) -> None:
        """Let a part of a larger object refer to a copy that is not closed."""
        reference, target = part["$ref"], target_of(part["$ref"], self._original)
        if not self._keys([target]).has_properties:
            return  # nothing of the target is closed
        if reference not in self._open:
            definitions = self._schema.setdefault("$defs", {})
            name = f"open-{len(self._open)}"
            while name in definitions:
                name += "-"
            definitions[name] = _copy(target)
            self._waiting.append((definitions[name], False))
            self._open[reference] = f"#/$defs/{name}"
        part["$ref"] = self._open[reference]


def target_of(reference: Any, root: Any) -> Any:
    """Return the schema that a reference within `root` means; None for other references."""
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        return None
    target: Any = root
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
            target = target[int(name)]
        elif isinstance(target, dict) and name in target:
            target = target[name]
        else:
            return None
    return target


@dataclass
class SchemaReader:
    """Tells which values a schema within `root` allows, where references are followed.

    Requests bring any schema, so a value's is read up to `MOST_PARTS` parts.
    """

    root: Any
    _targets: dict[str, Any] = field(default_factory=dict)

    def alternatives(self, schema: Any) -> list[dict[str, Any]]:
        """Return the schemas of which a value follows one; an empty one allows any value."""
        found, waiting = list[dict[str, Any]](), [schema]
        for _ in range(MOST_PARTS):
            if not waiting:
                return found
            part = waiting.pop(0)
            if not isinstance(part, dict):
                part = {}
            parts = list(islice(self._parts(part), MOST_PARTS))
            waiting[:0] = parts
            found += [] if parts else [part]
        return [{}]

    def types(self, schema: Any) -> list[str]:
        """Return the names of the types that a value may have; none if the schema does not say."""
        found: list[Any] = []
        for part in self.alternatives(schema):
            types = part.get("type", [])
            if not types:
                values = chosen_values(part) or ()
                types = [NAMES_OF_TYPES.get(type(x), "string") for x in values[:MOST_PARTS]]
            found += types[:MOST_PARTS] if isinstance(types, list) else [types]
            found += ["null"] if part.get("nullable") is True else []
        return list(dict.fromkeys(x for x in found if isinstance(x, str)))

    def _parts(self, part: dict[str, Any]) -> Iterator[Any]:
        """Yield the schemas of which a value follows one instead of this one."""
        reference = part.get("$ref")
        if isinstance(reference, str):
            if reference not in self._targets:
                self._targets[reference] = target_of(reference, self.root)
            yield self._targets[reference]
            return
        for name in ("anyOf", "oneOf"):
            yield from _schemas(part, name)
        if "type" not in part and isinstance(both := part.get("allOf"), list) and len(both) == 1:
            yield from both


def chosen_values(part: dict[str, Any]) -> list[Any] | None:
    """Return the values that a schema lists; None if it lists none."""
    if "const" in part:
        return [part["const"]]
    values = part.get("enum")
    return values if isinstance(values, list) else None


def _schemas(part: dict[str, Any], name: str) -> Iterator[Any]:
    """Yield the schemas of a keyword of `COMBINED`."""
    value = part.get(name)
    yield from value if isinstance(value, list) else ()


def _copy(schema: Any) -> Any:
    return json.loads(json.dumps(schema))
