"""What commands print arrives, whatever the encoding of standard output; JSON is JSON."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemmule.cli.screen import print_json

PRINTS = """
import sys
from gemmule.cli.main import prepare_streams
from gemmule.cli.screen import print_json
prepare_streams()
print_json({"prompt": sys.argv[1]}) if len(sys.argv) > 2 else print(sys.argv[1])
"""


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=os.environ | variables, capture_output=True, check=False)


def test_characters_that_the_output_lacks_are_escaped_by_commands(tiny_run: Path) -> None:
    command = ["-m", "gemmule", "generate", tiny_run, "--prompt", "Zoé 見\U0001f984", "--max-new-tokens", 2]
    ended = run(*command, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.startswith(rb"Zo\xe9 \u898b\U0001f984")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, rb"Zo\xe9 \u898b"),
        ({"PYTHONIOENCODING": "cp1252"}, b"Zo\xe9 \\u898b"),
        ({"PYTHONIOENCODING": "utf-8"}, "Zoé 見".encode()),
        ({"PYTHONIOENCODING": "ascii:strict"}, rb"Zo\xe9 \u898b"),
    ],
)
def test_characters_that_the_output_lacks_are_escaped(variables: dict[str, str], expected: bytes) -> None:
    ended = run("-c", PRINTS, "Zoé 見", **variables)
    assert (ended.stdout, ended.stderr, ended.returncode) == (expected + b"\n", b"", 0)


def test_json_is_escaped_only_where_the_output_lacks_characters() -> None:
    plain, escaped = (run("-c", PRINTS, "Zoé 見", "json", PYTHONIOENCODING=encoding) for encoding in ("utf-8", "ascii"))
    assert plain.stdout == '{"prompt": "Zoé 見"}\n'.encode()
    assert escaped.stdout == b'{"prompt": "Zo\\u00e9 \\u898b"}\n'


@pytest.mark.parametrize("redirected", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_is_no_failure(redirected: str) -> None:
    command = ["sh", "-c", f'"$0" -c "$1" Tom json {redirected}', sys.executable, PRINTS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            {"loss": math.nan, "more": [1.5, math.inf, {"low": -math.inf}]},
            {"loss": None, "more": [1.5, None, {"low": None}]},
        ),
        (
            {"pair": (math.nan, 2), "yes": True, "none": None, "text": "NaN"},
            {"pair": [None, 2], "yes": True, "none": None, "text": "NaN"},
        ),
        ({"name": "caf\udce9"}, {"name": "caf\udce9"}),
    ],
)
def test_json_has_no_numbers_that_json_does_not_have(
    value: dict[str, Any], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    print_json(value)
    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == expected
