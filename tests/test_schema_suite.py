"""The official test suite of JSON Schema, held against what `--schema` takes.

The suite comes with the source of the PyPI package jsonschema and is not in this repository: pip fetches that package
into build/, unless build/schema-suite is there already (with the folders draft2020-12 and draft7).
"""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import SEED

from ms4.cli import loading, options
from ms4.models.constraint import NEVER, Constraint, Grammar
from ms4.models.control import Control
from ms4.models.schema import SchemaError

pytestmark = pytest.mark.rare

BUILD = Path(__file__).parent.parent / "build" / "schema-suite"
DRAFTS = {
    "draft2020-12": (jsonschema.Draft202012Validator, "https://json-schema.org/draft/2020-12/schema"),
    "draft7": (jsonschema.Draft7Validator, "http://json-schema.org/draft-07/schema#"),
}
# The validator knows Python's regular expressions only: no \p, and another \w than ECMA 262.
UNLIKE_PYTHON = "ecmascript-regex"
MOST_TOKENS = 400


@pytest.fixture(scope="module")
def suite():
    """Folder of the suite."""
    if not BUILD.exists():
        fetch = ("pip", "download", "-q", "--no-deps", "--no-binary", "jsonschema", "jsonschema", "-d", BUILD.parent)
        if subprocess.run([sys.executable, "-m", *fetch]).returncode:
            pytest.skip("pip cannot fetch the source of jsonschema")
        newest = max(BUILD.parent.glob("jsonschema-*.tar.gz"), key=os.path.getmtime)
        with tarfile.open(newest) as tar:
            wanted = [m for m in tar.getmembers() if m.isfile() and "/json/tests/" in m.name]
            for member in wanted:
                path = BUILD / member.name.partition("/json/tests/")[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    return BUILD


def schemas(suite):
    """(draft, file, schema) of every case; each schema says its draft, as it may mean another thing in another one."""
    for draft, (_, uri) in DRAFTS.items():
        for path in sorted((suite / draft).rglob("*.json")):
            if UNLIKE_PYTHON in path.name:
                continue
            for case in json.loads(path.read_text("utf-8")):
                schema = case["schema"]
                if isinstance(schema, dict):
                    schema = {"$schema": uri, **schema}
                yield draft, path.name, schema


def kept_together(suite):
    """Pairs of schemas of the suite that can be kept to, as the fields of an object and the items of a list."""
    alone = [s for draft, _, s in schemas(suite) if draft == "draft2020-12" and isinstance(s, dict)]
    alone = [{k: v for k, v in s.items() if k != "$schema"} for s in alone if not set(map(str, s)) & {"$id", "$defs"}]
    alone = [s for s in alone if "$ref" not in json.dumps(s) and is_kept(s)]
    rng = np.random.default_rng(SEED)
    for _ in range(700):
        a, b, c = (alone[i] for i in rng.integers(0, len(alone), 3))
        fields = {"a": a, "b": {"type": "array", "items": b, "maxItems": 2}, "c": c}
        yield {"type": "object", "properties": fields, "required": ["a"], "additionalProperties": False}


def is_kept(schema):
    try:
        Grammar(schema)
    except SchemaError:
        return False
    return True


def answer(grammar, tokenizer, seed):
    """What random logits write; it ends as soon as it may.  None after MOST_TOKENS."""
    constraint, rng, ids = Constraint(grammar, tokenizer), np.random.default_rng(seed), []
    while len(ids) < MOST_TOKENS:
        logits = constraint.narrow(rng.standard_normal(tokenizer.n_used).astype(np.float32))
        id = int(logits.argmax()) if logits[Control.EOS] <= NEVER else int(Control.EOS)
        constraint.take(id)
        if id == Control.EOS:
            return tokenizer.decode(ids).decode()
        ids.append(id)
    return None


def is_multiple(error: jsonschema.ValidationError) -> bool:
    """The validator divides floats: 65.4091 is no multiple of 0.0001 for it."""
    if error.validator != "multipleOf":
        return False
    return Fraction(repr(error.instance)) % Fraction(repr(error.validator_value)) == 0


def test_every_schema_of_the_suite_is_kept_to_or_refused(suite):
    tokenizer = loading.open_tokenizer(options.DEMO)
    counts, wrong = Counter(), []
    alone = ((DRAFTS[draft][0], name, schema) for draft, name, schema in schemas(suite))
    together = ((jsonschema.Draft202012Validator, "together", schema) for schema in kept_together(suite))
    for validator, name, schema in (case for cases in (alone, together) for case in cases):
        try:
            grammar = Grammar(schema)
        except SchemaError:
            counts["refused"] += 1
            continue
        counts["kept"] += 1
        text = answer(grammar, tokenizer, SEED + counts["kept"])
        if text is None:
            counts["not ended"] += 1
            continue
        counts["answers"] += 1
        try:
            errors = validator(schema, format_checker=validator.FORMAT_CHECKER).iter_errors(json.loads(text))
            wrong += [(name, schema, text, e.message) for e in errors if not is_multiple(e)]
        except ValueError as error:
            wrong.append((name, schema, text, str(error)))
    print(dict(counts))
    assert not wrong, wrong[:5]
    assert counts["kept"] >= 1000 and counts["answers"] > 0.9 * counts["kept"]
