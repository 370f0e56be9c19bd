"""Constraints of llguidance: rollback, exact decoding with draft trees, and errors."""

from __future__ import annotations

import re
from dataclasses import replace
from shutil import copy

import numpy as np
import pytest
from byte_tokens import END, SPECIAL, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from scripted_model import reference_model, scripted_model
from servers import check_error, serving

from treeflash.config import METHODS, DecodeConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.sampling import unpack
from treeflash.serving.message_parser import ResponseTemplate
from treeflash.serving.response_templates import TOOL_CALL_PARSERS
from treeflash.testing.models import write_drafter, write_target
from treeflash.testing.pairs import repeated
from treeflash.text.grammar import Grammar, GrammarCompiler, GrammarError
from treeflash.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Rhine", "Rhône"]},
        "long": {"type": "boolean"},
        "depths": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["name", "long"],
    "additionalProperties": False,
}
LIST = 'start: "[" (item ("," item)*)? "]"\nitem: /[0-9]{1,3}/'
GBNF = 'root ::= "yes" | "no" ("!" | "?")*'
WIDE = {"budget": 128, "top_m": 24, "top_k_children": 96}
"""Trees in which a random drafter is right now and then."""
GRAMMARS = {
    "json": Grammar.json(SCHEMA),
    "regex": Grammar.regex(r"[ab]+/\d{2}"),
    "choice": Grammar.choice(["Rhein", "Rhône", 'a "quoted" \\ text']),
    "lark": Grammar.lark(LIST),
    "gbnf": Grammar.lark_or_gbnf(GBNF),
    "after": Grammar.json(SCHEMA).prepend("thought", rule=r"thought[lazy]: /(?s:.*)<\/t>/"),
}


PATTERNS = {
    "regex": r"[ab]+/\d{2}",
    "choice": r'Rhein|Rhône|a "quoted" \\ text',
    "lark": r"\[(\d{1,3}(,\d{1,3})*)?\]",
    "gbnf": "yes|no[!?]*",
}
"""What the texts of some grammars are."""


@pytest.fixture(scope="module")
def word_model(smollm2, tmp_path_factory):
    """A pair of random weights with a real vocabulary, whose tokens cross a grammar's parts."""
    target, drafter = (tmp_path_factory.mktemp(name) for name in ("target", "drafter"))
    tokenizer = Tokenizer.from_folder(smollm2)
    write_target(target, "llama", seed=3, vocab_size=tokenizer.size)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        copy(smollm2 / name, target)
    write_drafter(drafter, target, seed=4)
    return reference_model(target, drafter)


@pytest.mark.parametrize("name", GRAMMARS)
def test_rollback_gives_the_masks_of_a_new_matcher(compiler, model, name):
    """Along random texts, beyond end tokens too."""
    rng, make = np.random.default_rng(0), compiler.compile(GRAMMARS[name])
    vocab_size = model.backend.vocab_size
    constraint, tokens, whole = make(), [], []
    for _ in range(120):
        if tokens and rng.random() < 0.25:
            count = int(rng.integers(1, min(len(tokens), 4) + 1))
            constraint.rollback(count)
            del tokens[-count:]
        else:
            found = np.flatnonzero(unpack(constraint.allowed()[None], vocab_size)[0])
            end = [token for token in found if token in model.tokenizer.stop_token_ids]
            token = int(rng.choice(end if end and rng.random() < 0.5 else found))
            if token in end and not set(end) & set(tokens):
                whole.append(model.tokenizer.decode(tokens))
            constraint.advance(token)
            tokens.append(token)
        fresh = make()
        for token in tokens:
            fresh.advance(token)
        np.testing.assert_array_equal(constraint.allowed(), fresh.allowed())
    assert whole or name in ("json", "after"), "the text never reached the end"
    for text in whole:
        assert re.fullmatch(PATTERNS.get(name, "(?s).*"), text), text


def test_another_text_of_equal_length_has_its_own_mask(compiler, model):
    """After a rollback, llguidance would give the mask of the first text again."""
    encode = model.tokenizer.encode

    def masks(*texts):
        constraint = compiler.compile(GRAMMARS["json"])()
        for text in texts:
            for token in encode(text):
                constraint.advance(token)
            yield constraint.allowed()
            constraint.rollback(len(encode(text)))

    _, after_a_rollback = masks('{ "name"\n', '{"name":\n')
    (alone,) = masks('{"name":\n')
    assert np.array_equal(after_a_rollback, alone)


@pytest.mark.parametrize(
    "text", ['a "quoted" text', "one \\ two", "\\\\", "\\n", "a line\nand another", "delete \x7f"]
)
@pytest.mark.parametrize("form", [Grammar.choice, lambda texts: Grammar.regex(re.escape(*texts))])
def test_a_choice_is_taken_literally(compiler, model, form, text):
    constraint, tokens = compiler.compile(form([text]))(), []
    while True:
        found = np.flatnonzero(unpack(constraint.allowed()[None], model.backend.vocab_size)[0])
        if set(found) & set(model.tokenizer.stop_token_ids):
            break
        tokens.append(int(found[0]))
        constraint.advance(tokens[-1])
    assert model.tokenizer.decode(tokens) == text


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("parser", ["hermes", "gemma4", "deepseek_v3"])
def test_reasoning_may_precede_a_form(tmp_path, parser, special, begun):
    """Its ends are texts of a vocabulary, or begin and end with its special tokens."""
    template = ResponseTemplate(TOOL_CALL_PARSERS[parser])
    opening, close = template.reasoning_ends(begun=False)
    names = [opening[: opening.index(">") + 1], close] if special else []
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path, more=names))
    tokenizer = Tokenizer(tokenizer.transformers, frozenset({END}))
    compiler = GrammarCompiler(tokenizer, tokenizer.size)
    grammar = template.prepend_reasoning(Grammar.choice(["yes"]), tokenizer, begun=begun)
    make = compiler.compile(grammar)
    begin = "" if begun else opening
    texts = [f"{begin}{thought}{close}\nyes" for thought in ("", "Why? {}\n")]
    for text in texts if begun else ["yes", *texts]:
        constraint = make()
        for token in [*tokenizer.encode_continuation(text), END]:
            assert unpack(constraint.allowed()[None], tokenizer.size)[0, token], text
            constraint.advance(token)


def test_answers_do_not_share_a_matcher(compiler):
    make = compiler.compile(GRAMMARS["choice"])
    first, second = make(), make()
    before = second.allowed().copy()
    first.advance(int(np.flatnonzero(unpack(first.allowed()[None], 300)[0])[0]))
    np.testing.assert_array_equal(second.allowed(), before)


def decode(backend, make, config):
    """Texts of all methods, in one batch with an unconstrained one."""
    scheduler = Scheduler(backend)
    texts = {}
    for method in METHODS:
        one = DecodeConfig(**{**config, "method": method})
        request = Request(prompt_ids=[5, 6, 7], config=one, constraint=make())
        texts[scheduler.submit(request)] = []
    scheduler.submit(Request(prompt_ids=[9, 8], config=DecodeConfig(**config)))
    for request_id, step in scheduler.run():
        assert not isinstance(step, Exception), step
        if request_id in texts:
            texts[request_id] += step.tokens
    return list(texts.values())


names = st.text('ab Ä"\\', min_size=1, max_size=5)
leaves = st.one_of(
    st.sampled_from(["boolean", "integer", "null", "number", "string"]).map(lambda x: {"type": x}),
    st.lists(names, min_size=1, max_size=3).map(lambda texts: {"enum": texts}),
    st.just({"type": "string", "format": "date"}),
)


def objects(values):
    """Strategies for schemas of lists, and of objects in which some keys may be left out."""
    lists = values.map(lambda items: {"type": "array", "items": items, "maxItems": 2})
    properties = st.dictionaries(names, values, max_size=3)
    return lists | properties.map(
        lambda found: {"type": "object", "properties": found, "required": sorted(found)[:2]}
    )


schemas = st.recursive(leaves, objects, max_leaves=6)


@repeated
@given(seed=st.integers(0, 10**6), schemas=st.lists(schemas, min_size=2, max_size=4))
@pytest.mark.sample(1)
@pytest.mark.parametrize("alphabet", ["bytes", "words"])
def test_schedules_of_grammars_equal_plain_decoding(request, alphabet, seed, schemas):
    """Sequences of random grammars, methods and budgets join and leave; all learn from all."""
    model = request.getfixturevalue("model" if alphabet == "bytes" else "word_model")
    rng = np.random.default_rng(seed)
    grammars = [*GRAMMARS.values(), *map(Grammar.json, schemas)]
    scheduler, ends = Scheduler(model.backend), model.tokenizer.stop_token_ids
    started, found, left = [], {}, set()
    for _ in range(60):
        if len(started) < 6 and rng.random() < 0.3:
            make = model.grammars.compile(grammars[rng.integers(len(grammars))])
            config = DecodeConfig(
                method=METHODS[rng.integers(len(METHODS))],
                budget=(1, 3, 12, 40, "auto")[rng.integers(5)],
                suffix=bool(rng.random() < 0.5),
                max_tokens=int(rng.integers(1, 60)),
                stop_token_ids=ends,
                sampling=SamplingConfig(temperature=float(rng.integers(2)), seed=seed),
            )
            new = Request(prompt_ids=[5, 6, 7], config=config, constraint=make())
            started.append((new, make))
            found[scheduler.submit(new)] = []
        elif started and rng.random() < 0.03:
            cancelled, _ = started[rng.integers(len(started))]
            scheduler.cancel(cancelled)
            left.add(cancelled)
        for decoded, step in scheduler.step():
            assert not isinstance(step, Exception), step
            found[decoded] += step.tokens
    for decoded, step in scheduler.run():
        assert not isinstance(step, Exception), step
        found[decoded] += step.tokens
    for decoded, make in started:
        plain = replace(decoded.config, method="ar")
        again = Request(prompt_ids=[5, 6, 7], config=plain, constraint=make())
        steps = Scheduler(model.backend).decode([again])
        expected = [token for _, step in steps for token in step.tokens]
        tokens = found[decoded]
        assert tokens == (expected[: len(tokens)] if decoded in left else expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_grammar_forces_is_drafted(compiler, model, method):
    """After its first token the text has no choice but its digits and its end, the last draft."""
    make = compiler.compile(
        Grammar.regex(r"(forced|text) goes on for long: \d\d, and then it ends")
    )
    config = DecodeConfig(
        method=method,
        budget=16,
        suffix=False,
        max_tokens=60,
        stop_token_ids=model.tokenizer.stop_token_ids,
    )
    request = Request(prompt_ids=[5, 6, 7], config=config, constraint=make())
    steps = [step for _, step in Scheduler(model.backend).decode([request])]
    tokens = [token for step in steps for token in step.tokens]
    assert re.fullmatch(r"(forced|text) goes .*ends", model.tokenizer.decode(tokens))
    assert len(tokens) > 40
    assert len(steps) == len(tokens) if method == "ar" else len(steps) < 10
    parents = [step.tree.tokens[step.tree.parents[1:]] for step in steps if step.tree is not None]
    assert config.stop_token_ids.isdisjoint(np.concatenate(parents).tolist())


def test_a_complete_text_ends_whatever_tokens_end_others(compiler, model):
    make, ends = compiler.compile(GRAMMARS["choice"]), model.tokenizer.stop_token_ids
    config = {**WIDE, "max_tokens": 110, "stop_token_ids": ends}
    texts = decode(model.backend, make, config)
    assert texts[0][-1] in ends
    for others in (frozenset(), frozenset({model.backend.vocab_size - 1})):
        assert decode(model.backend, make, {**config, "stop_token_ids": others}) == texts


def test_without_rollback_texts_differ(compiler, model):
    """The laws above notice a broken constraint."""

    class Broken:
        end_tokens = frozenset()

        def __init__(self, constraint):
            self.allowed, self.advance = constraint.allowed, constraint.advance

        def rollback(self, tokens):
            pass

    make = compiler.compile(GRAMMARS["json"])
    config = {**WIDE, "max_tokens": 40, "stop_token_ids": model.tokenizer.stop_token_ids}

    def equal():
        plain, *others = decode(model.backend, lambda: Broken(make()), config)
        assert others == [plain] * len(others)

    with pytest.raises(AssertionError):
        equal()


def test_errors_do_not_show_the_state_of_the_parser(compiler, model):
    """Clients read them."""
    constraint = compiler.compile(GRAMMARS["choice"])()
    (token,) = model.tokenizer.encode("#")
    with pytest.raises(GrammarError) as caught:
        constraint.advance(token)
    assert not re.search(r"[<⟦\n]|Tokens|lexer_cost|slices", str(caught.value))


def test_special_tokens_are_not_text(compiler, model):
    """The target cannot write an end token as a part of a string."""
    constraint = compiler.compile(Grammar.json({"type": "string"}))()
    for token in model.tokenizer.encode('"'):
        constraint.advance(token)
    allowed = unpack(constraint.allowed()[None], model.backend.vocab_size)[0]
    assert not allowed[: len(SPECIAL)].any()


def test_a_tokenizer_without_bytes_is_refused(tmp_path):
    """Its decoder only joins tokens, so llguidance does not know their bytes."""
    model = scripted_model(tmp_path, {"<|hello|>": ["Hi"]}, "<|hello|>")
    with serving(model) as server:
        response = server.chat(response_format={"type": "json_object"})
        check_error(response, 400, "llguidance cannot read its tokenizer")
        assert server.chat().json()["choices"][0]["message"]["content"] == "Hi"
