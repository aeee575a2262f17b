"""Answers that are held to a JSON schema: what is a schema, what is refused, and that every answer keeps to it."""

import json
import random

import jsonschema
import numpy as np
import pytest
import standins
from conftest import SEED

from ms4.cli import loading, options
from ms4.models import constraint
from ms4.models.constraint import NEVER, Constraint, Grammar
from ms4.models.control import Control
from ms4.models.schema import SchemaError, read_schema

FIELDS = [
    ("name", {"name": "string"}),
    ("name, age int", {"name": "string", "age": "integer"}),
    ("x float,  ok bool ,", {"x": "number", "ok": "boolean"}),
    ("name: full, with title\nage int: in years", {"name": "string", "age": "integer"}),
]


@pytest.fixture(scope="module")
def tokenizer():
    return loading.open_tokenizer(options.DEMO)


@pytest.mark.parametrize("text, kinds", FIELDS)
def test_fields_are_a_schema(text, kinds):
    schema = read_schema(text)
    assert {name: field["type"] for name, field in schema["properties"].items()} == kinds
    assert schema["required"] == list(kinds) and schema["additionalProperties"] is False


def test_a_field_may_be_a_list_and_say_what_it_is():
    schema = read_schema("tags[]: at most three")
    assert schema["properties"]["tags"] == {
        "type": "array",
        "items": {"type": "string"},
        "description": "at most three",
    }


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "empty"),
        ("1x", "no field"),
        ("a colour", "colour is not one of"),
        ("a, a int", "twice"),
        (", ,", "no field"),
        ("{", "not JSON"),
        ("[1]", "JSON object"),
        ("[" * 100_000, "not JSON"),
        ("a" * (1 << 21), "bytes"),
    ],
)
def test_what_is_no_schema_is_said(text, says):
    with pytest.raises(SchemaError, match=says):
        read_schema(text)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "string"}},
        {"type": "objekt"},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "array", "uniqueItems": True},
    ],
)
def test_what_an_answer_cannot_be_held_to_is_refused_without_a_model(schema):
    with pytest.raises(SchemaError, match="no answer can be held"):
        Grammar(schema)


# --- every answer keeps to its schema, whatever the logits are


def random_schema(rng, depth=0):
    """A schema out of the kinds that can be kept to, small enough that random logits come to an end."""
    kinds = ["integer", "boolean", "null", "enum", "const", "number", "string"]
    if depth < 3:
        kinds += ["object", "array", "anyOf", "ref"]
    kind = rng.choice(kinds)
    if kind == "integer":
        low = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(100)}
    if kind == "number":
        return {"type": "number", "exclusiveMinimum": rng.randrange(-5, 5), "maximum": rng.randrange(6, 90)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": rng.sample(["red", "grün", 1, 2.5, None, True, 'a "quote"', "\u6771"], rng.randrange(1, 5))}
    if kind == "const":
        return {"const": rng.choice(["x", 3, {"a": [1]}, None])}
    if kind == "string":
        form = rng.choice(
            [{"pattern": "^[a-c]{1,4}$"}, {"maxLength": 6}, {"format": "date"}, {"minLength": 2, "maxLength": 4}]
        )
        return {"type": "string", **form}
    if kind == "array":
        least = rng.randrange(3)
        return {
            "type": "array",
            "items": random_schema(rng, depth + 1),
            "minItems": least,
            "maxItems": least + rng.randrange(3),
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    names = rng.sample(["name", "age", "tags", "note", "id", "größe"], rng.randrange(1, 5))
    fields = {name: random_schema(rng, depth + 1) for name in names}
    made = {
        "type": "object",
        "properties": fields,
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
        "additionalProperties": False,
    }
    if kind == "ref" and not depth:
        return {"$defs": {"part": made}, "type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2}
    return made


def answer(schema, tokenizer, rng):
    """An answer of a model that knows nothing: random logits.  None if it does not end within 1,000 tokens."""
    constraint = Constraint(Grammar(schema), tokenizer)
    ids = []
    while len(ids) < 1000:
        logits = constraint.narrow(rng.standard_normal(tokenizer.n_used).astype(np.float32))
        id = int(logits.argmax())
        assert logits[id] > NEVER
        constraint.take(id)
        if id == Control.EOS:
            assert constraint.complete
            return tokenizer.decode(ids).decode()
        ids.append(id)
    assert not constraint.complete or schema.get("type") != "object"
    return None


def keep_to_it(n, tokenizer):
    done = 0
    for i in range(n):
        schema = random_schema(random.Random(SEED + i))
        text = answer(schema, tokenizer, np.random.default_rng(SEED + i))
        if text is None:
            continue
        done += 1
        value = json.loads(text)
        jsonschema.Draft202012Validator(schema).validate(value)
        assert json.dumps(value, ensure_ascii=False).count("\n") == 0
    assert done > 0.9 * n


def test_every_answer_keeps_to_its_schema(tokenizer):
    keep_to_it(40, tokenizer)


@pytest.mark.slow
def test_a_thousand_answers_keep_to_their_schemas(tokenizer):
    keep_to_it(1000, tokenizer)


def test_a_thought_may_come_first_and_only_there(tokenizer):
    logits = np.zeros(tokenizer.n_used, np.float32)
    constraint = Constraint(Grammar({"type": "boolean"}), tokenizer, may_think=True)
    assert constraint.narrow(logits)[Control.THINK] == 0
    constraint.take(Control.THINK)
    assert constraint.narrow(logits)[Control.THINK] == NEVER
    free = Constraint(Grammar({"type": "boolean"}), tokenizer)
    assert free.narrow(logits)[Control.THINK] == NEVER


def test_a_vocabulary_is_opened_once_for_all_answers_that_begin_together(monkeypatch):
    opened = []

    class Counted(constraint.Pieces):
        def __init__(self, tokenizer):
            opened.append(tokenizer)
            super().__init__(tokenizer)

    monkeypatch.setattr(constraint, "Pieces", Counted)
    few = standins.few_tokens()
    grammars = [Grammar({"type": "boolean"}), Grammar({"enum": ["a", "b"]})]
    together = [Constraint(grammar, few) for grammar in grammars * 2]
    logits = np.zeros(few.n_used, np.float32)
    spelled = [{few.piece(int(id)) for id in np.flatnonzero(one.narrow(logits) == 0)} for one in together]
    assert opened == [few] and spelled[:2] == spelled[2:] and spelled[0] == {b"t", b"f"} and spelled[1] == {b'"'}


# --- the command


def test_run_gives_json_that_fits(ms4):
    code, out, err = ms4("run", "-q", "--schema", "colour: of the sky, n bool", "--max-tokens", 400, "--greedy", "sky?")
    if code == 0:
        assert set(json.loads(out)) == {"colour", "n"}
    else:
        assert code == 4 and "does not complete the schema" in err


def test_thoughts_are_free_and_the_answer_is_held(ms4):
    code, out, _ = ms4("run", "--schema", '{"enum": ["yes", "no"]}', "-r", "high", "--format", "json", "Is 7 odd?")
    message = json.loads(out)["choices"][0]["message"]
    assert code == 0 and json.loads(message["content"]) in ("yes", "no")
    assert message["reasoning_content"]


def test_an_answer_that_is_cut_ends_in_4(ms4):
    code, out, err = ms4("run", "-q", "--json-object", "-n", 1, "hi")
    assert code == 4 and out == "{\n" or out == '{"\n'
    assert err == "ms4: error: the answer does not complete the schema: --max-tokens cut it\n"


def test_a_schema_is_refused_before_anything_else(ms4, tmp_path):
    code, out, err = ms4("run", "-m", tmp_path / "none.gguf", "--schema", '{"not": {}}', "hi")
    assert (code, out) == (2, "") and "no answer can be held to this schema" in err
    (tmp_path / "s.json").write_text('{"type": "objekt"}')
    code, out, err = ms4("run", "--schema", tmp_path / "s.json", "hi")
    assert (code, out) == (2, "") and "objekt" in err


@pytest.mark.parametrize("other", [["--prefill", "x"], ["--json-object"], ["-x"]])
def test_what_does_not_go_together(ms4, other):
    code, out, err = ms4("run", "--schema", "a", *other, "hi")
    assert (code, out) == (2, "") and "exclude each other" in err


def test_logprobs_are_those_of_the_model(ms4):
    _, out, _ = ms4("run", "--format", "json", "--greedy", "-n", 1, "--logprobs", 3, "--json-object", "hi")
    held = json.loads(out)["choices"][0]["logprobs"]["content"][0]
    _, out, _ = ms4("run", "--format", "json", "--greedy", "-n", 1, "--logprobs", 3, "hi")
    free = json.loads(out)["choices"][0]["logprobs"]["content"][0]
    assert held["top_logprobs"] == free["top_logprobs"] and held["logprob"] <= free["logprob"]
