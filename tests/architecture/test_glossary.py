"""Names, docstrings, help and messages use the field's terms; `words_left.toml` lists the words still to be renamed.

`python tests/architecture/test_glossary.py` prints the table as it is.
"""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parents[2] / "src" / "gemmule"
LEFT = Path(__file__).with_name("words_left.toml")

# Names of our own, members as Class.name, and the field's term.
NAMES: dict[str, str] = {
    "Audience": "callbacks, Observer", "SILENT": "NullObserver", "Hooks": "callbacks", "tell": "log",
    "say": "log", "paper": "log_path", "deaf": "parameters_without_gradient", "ignorant": "initial_loss",
    "listening": "initial_loss", "excuse_or_stop": "skip_or_abort_nonfinite_step", "is_spike": "spike detector",
    "WARM": "warmup_steps", "_meet": "rendezvous", "arriving": "async device-to-host copy",
    "unfilled": "meta model", "apart": "redistribute", "ALONE": "single process", "alone": "single process",
    "Visibility": "AttentionMask", "sees": "attends", "reach": "window", "folded": "block_local",
    "Readout": "output head", "naive": "reference", "Span": "ByteRange", "Unit": "WorkUnit", "Fate": "Label",
    "fates": "labels", "Stamp": "FileVersion", "claim_stage": "stage cache", "Misread": "EncodingError",
    "ending_of": "suffix", "damage_explained": "read error", "Shelf": "TensorIndex", "survey": "tensor index",
    "dialects": "schema versions", "ABSENT": "defaults", "Witness": "PredictionLog",
    "Patient": "Model under test", "anatomy": "structure", "put_in_place": "atomic replace",
    "aside": "temporary file", "written_aside": "atomic write", "folder_written_aside": "atomic write",
    "told": "on_result", "waiting": "queue", "hiding": "exposed communication",
    "moving": "exposed communication", "sides": "backends", "rounds": "trials", "effort": "budget",
    "World.first": "is_main", "World.total": "all_reduce_sum", "World.agree": "broadcast",
    "World.patient": "control_group", "Recorder.learn": "capture", "Updater.expect": "allocate_state",
}  # fmt: skip

# The same for names that are common elsewhere, each in one package.
LOCAL_NAMES: dict[tuple[str, str], str] = {
    ("train", "mine"): "local_loss", ("train", "here"): "rank_batch_size", ("train", "trained"): "num_targets",
    ("train", "learned"): "step_ok", ("train", "measured"): "grad_norm", ("train", "factor"): "lr_scale",
    ("train", "Level"): "loss EMA", ("train", "probe"): "autotune", ("train", "whole"): "full_tensor",
    ("train", "put"): "place", ("model", "rule"): "AttentionMask",
    ("model", "table"): "dense mask", ("data", "note"): "manifest", ("data", "finish"): "commit",
    ("files", "held"): "directory lock", ("evaluate", "well"): "passed", ("evaluate", "ill"): "failed",
    ("data", "Part"): "IntermediateShard", ("runtime", "joined"): "process_group",
    ("train", "joined"): "process_group", ("evaluate", "patient"): "model under test",
    ("formats", "SETTLED"): "fixed fields",
}  # fmt: skip

# Phrases of docstrings, help and messages.
PHRASES: dict[str, str] = {
    r"ways? (?:there|back)\b|there and back": "forward pass, backward pass",
    r"\b(?:tokens|bytes|megabytes|steps|operations|rows|times|documents|seconds|words)(?:/s)? an? "
    r"(?:second|token|byte|step|row|minute|gigabyte)\b": "per second, per token",
    r"\b(?:matrix )?products\b": "matmul",
    r"\bturned operand": "transposed operand",
    r"\b(?:computed|computes?|computing) again\b": "recompute, activation checkpointing",
    r"\bfolded\b": "block-local",
    r"\breadout\b": "output head",
    r"\bnaive(?:ly)?\b": "reference",
    r"\blet it speak\b": "try it",
    r"\b(?:is|are) ill\b": "failed",
    r"\bgo(?:es|ing)? on\b": "resume, continue",
    r"\b(?:done|made|begun) anew\b": "redo, from scratch",
    r"\bhow often\b": "number of",
    r"\bof the moments\b": "seed of the kill times",
    r"\bwritten aside\b|\baside\b": "temporary file, atomic write",
    r"\bput in(?:to)? (?:its )?place\b": "atomic replace",
    r"\bthe words of a vocabulary\b|\bwords of the vocabulary\b": "vocabulary entries, ids",
}  # fmt: skip

# American spelling, also in names of files: what people search for.
BRITISH = re.compile(
    r"[a-z]*(?:quant|initial|parallel|optim|serial|normal|token|summar|synchron|minim|maxim)is(?:e|es|ed|ers?|ing|ation)\b",
    re.IGNORECASE,
)

# Terms by which a newcomer searches; each occurs in a name, a docstring, help or a message.
FIELD_TERMS = (
    "KV cache", "prefill", "decode", "gradient accumulation", "micro-batch", "sequence length",
    "sliding-window attention", "attention mask", "block-local attention", "backward pass", "forward pass",
    "activation checkpointing", "data parallel", "sharded", "rank", "all-reduce", "broadcast", "learning rate",
    "warmup", "weight decay", "gradient norm", "throughput", "deduplication", "atomic write", "deterministic",
    "left padding", "logits", "tied embeddings", "peak memory", "CUDA graph",
)  # fmt: skip


class Source(NamedTuple):
    """What a reader meets in a file: its name, identifiers, members as Class.name, and text."""

    package: str
    names: frozenset[str]
    text: str


def identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name
            case ast.FunctionDef(name=name):
                yield name
            case ast.ClassDef(name=owner, body=body):
                yield owner
                for member in body:
                    target = member.target if isinstance(member, ast.AnnAssign) else None
                    if isinstance(member, ast.FunctionDef):
                        yield f"{owner}.{member.name}"
                    elif isinstance(target, ast.Name):
                        yield f"{owner}.{target.id}"
            case ast.keyword(arg=str(name)):
                yield name


def words_of(tree: ast.AST) -> str:
    """Return docstrings, help and messages; a string without a space is a key or a name on disk."""
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return "\n".join(re.sub(r"\s+", " ", string) for string in strings if " " in string.strip())


@cache
def sources() -> tuple[Source, ...]:
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = path.relative_to(SOURCES).parts[0].removesuffix(".py")
        tells_stories = "storybook" in path.parts  # its words are a corpus
        text = (ast.get_docstring(tree) or "") if tells_stories else words_of(tree)
        found.append(Source(package, frozenset([path.stem, *identifiers(tree)]), text))
    return tuple(found)


def private_words() -> dict[str, dict[str, str]]:
    """Return the words of our own that each package uses, with the field's terms."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for source in sources():
        words = found[source.package]
        bare = source.names | {name.strip("_") for name in source.names}
        words |= {name: term for name, term in NAMES.items() if name in bare}
        words |= {
            name: term for (package, name), term in LOCAL_NAMES.items() if package == source.package and name in bare
        }
        prose = source.text.replace("`", "")
        for phrase, term in PHRASES.items():
            words |= {match[0].lower(): term for match in re.finditer(phrase, prose, re.IGNORECASE)}
        spelled = " ".join([prose, *(name.replace("_", " ") for name in source.names)])
        words |= {match[0].lower(): "-iz-" for match in BRITISH.finditer(spelled)}
    return {package: words for package, words in found.items() if words}


def missing_terms() -> set[str]:
    """Return the field's terms that occur nowhere."""
    everything = "\n".join(" ".join([source.text, *source.names]) for source in sources()).lower()
    plain = re.sub(r"[\s_-]+", " ", everything)
    return {term for term in FIELD_TERMS if re.sub(r"[\s_-]+", " ", term.lower()) not in plain}


def left() -> dict[str, set[str]]:
    table = tomllib.loads(LEFT.read_text(encoding="utf-8"))
    return {name: set(words) for name, words in table.items()}


def test_no_package_uses_a_word_of_our_own() -> None:
    allowed = left()
    new = [
        f"{package}: {word} -> {term}"
        for package, words in private_words().items()
        for word, term in words.items()
        if word not in allowed.get(package, set())
    ]
    assert new == []


def test_the_terms_of_the_field_occur() -> None:
    assert missing_terms() - left()["missing"] == set()


def test_what_was_renamed_is_removed_from_the_list() -> None:
    present = {package: set(words) for package, words in private_words().items()} | {"missing": missing_terms()}
    stale = {package: words - present.get(package, set()) for package, words in left().items()}
    assert {package: sorted(words) for package, words in stale.items() if words} == {}, f"remove from {LEFT.name}"


def test_the_search_finds_what_it_looks_for() -> None:
    tree = ast.parse(
        'class World:\n    first: bool\n    def agree(self, say): "Goes the way back, at 3 tokens a second."'
    )
    assert {"World", "World.first", "World.agree", "say"} <= set(identifiers(tree))
    said = words_of(tree)
    assert sum(bool(re.search(phrase, said, re.IGNORECASE)) for phrase in PHRASES) == 2


def current() -> str:
    """Return the table of words left, as TOML."""
    lines = ["# What is left to rename, per package; this list only ever gets shorter (test_glossary.py).", ""]
    for package, words in sorted([*private_words().items(), ("missing", missing_terms())]):
        lines += [f"{package} = [", *(f'    "{word}",' for word in sorted(words)), "]"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(current())
