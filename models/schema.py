"""What `--schema` takes to a JSON schema: a schema, or a short list of fields such as 'name, age int'.

Owns the short form.  Whether a schema can be kept to is the business of `ms4.models.constraint`.
"""

from __future__ import annotations

import json
import re
from typing import Any

OBJECT: dict[str, Any] = {"type": "object"}  # any JSON object
KINDS = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "float": "number",
    "number": "number",
    "bool": "boolean",
    "boolean": "boolean",
}
FIELD = re.compile(r"(?P<name>[^\W\d][\w-]*)(?P<list>\[\])?(?:\s+(?P<kind>\w+))?(?:\s*:\s*(?P<about>.*))?", re.DOTALL)
MOST_BYTES = 1 << 20


class SchemaError(ValueError):
    """This is no schema, or none that an answer can be held to; the message is one sentence."""


def read_schema(text: str) -> Any:
    """The schema that a text stands for: JSON, or fields.  SchemaError if it is neither."""
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise SchemaError(f"a schema of more than {MOST_BYTES} bytes")
    text = text.strip()
    if not text:
        raise SchemaError("the schema is empty")
    if not text.startswith(("{", "[", '"')) and text not in ("true", "false"):
        return from_fields(text)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise SchemaError('a schema is a JSON object, such as {"type": "object"}')
    return schema


def from_fields(text: str) -> dict[str, Any]:
    """An object of fields, all of them required: 'name, age int, tags[]: at most three'.

    A field is a name, [] for a list of such, a kind (str, int, float or bool; else str) and, after a colon, what it
    means.  Fields stand on lines of their own or, all on one line, between commas.
    """
    parts = [part.strip() for part in (text.splitlines() if "\n" in text else text.split(","))]
    properties: dict[str, Any] = {}
    for part in filter(None, parts):
        match = FIELD.fullmatch(part)
        if not match:
            raise SchemaError(f"{part[:40]!r} is no field such as name, age int or tags[]: about them")
        kind = match["kind"] or "str"
        if kind not in KINDS:
            raise SchemaError(f"field {match['name']}: {kind} is not one of str, int, float, bool")
        if match["name"] in properties:
            raise SchemaError(f"field {match['name']} is there twice")
        field: dict[str, Any] = {"type": KINDS[kind]}
        if match["list"]:
            field = {"type": "array", "items": field}
        if match["about"]:
            field["description"] = match["about"].strip()
        properties[match["name"]] = field
    if not properties:
        raise SchemaError("the schema has no field")
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
