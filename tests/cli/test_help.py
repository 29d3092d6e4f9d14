import subprocess
import sys

import pytest

import gemmule as package
from gemmule.cli.main import COMMANDS
from runs import gemmule


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_says_what_it_does_with_examples(name: str) -> None:
    ended = gemmule(name, "--help")
    assert ended.code == 0
    text = " ".join(ended.out.split())
    assert (COMMANDS[name].__doc__ or "").splitlines()[0] in text
    assert f"gemmule {name}" in text.split("Examples", 1)[1]


def test_help_lists_every_command() -> None:
    ended = gemmule("--help")
    assert all(f" {name} " in ended.out for name in COMMANDS)
    assert "gemmule train recipes/story.toml" in ended.out


def test_version_is_the_packages() -> None:
    assert gemmule("--version") == (0, f"gemmule {package.__version__}\n", "")


def test_python_m_gemmule_is_the_command() -> None:
    command = [sys.executable, "-m", "gemmule", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("gemmule ")


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["train", "x.toml", "--oot", "y"], ["generate", "--seed", "x"]]
)
def test_a_command_line_that_makes_no_sense_ends_with_2(arguments: list[str]) -> None:
    assert gemmule(*arguments).code == 2


def test_help_of_train_names_the_list_of_settings() -> None:
    text = " ".join(gemmule("train", "--help").out.replace("│", "").split())
    assert "gemmule settings lists every key, as docs/settings.md does" in text
