"""No tensor takes its dtype from torch.set_default_dtype, which loaders of other libraries change for a while."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[2] / "src" / "gemmule").rglob("*.py"))
CREATORS = {"empty", "zeros", "ones", "full", "tensor", "rand", "randn", "linspace", "logspace", "eye", "scalar_tensor"}


def creations_without_dtype(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) != "torch":
            continue
        given = {keyword.arg for keyword in node.keywords}
        floats = [ast.unparse(argument).lstrip("-") for argument in node.args[1:]]
        two_floats = node.func.attr == "where" and all("." in text and text[0] in "0123456789m" for text in floats)
        if (node.func.attr in CREATORS and "dtype" not in given) or two_floats:
            yield node


def test_every_tensor_states_its_dtype() -> None:
    found = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path in SOURCES
        for node in creations_without_dtype(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_the_search_finds_what_it_looks_for() -> None:
    code = "torch.zeros(3); torch.zeros(3, dtype=x); torch.where(a, 0.0, -math.inf); torch.where(a, b, 0.0); np.ones(3)"
    assert len(list(creations_without_dtype(ast.parse(code)))) == 2
