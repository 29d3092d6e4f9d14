"""What the documentation points at exists: files, headings, commands and their options, make targets."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from gemmule.cli.main import build_app
from gemmule.fields import settings_of
from gemmule.train.recipe import Recipe
from runs import gemmule

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
# Written by a run, or by the reader.
MADE = ("runs/", "my", ".venv", "dist/", "build/")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def headings(page: Path) -> set[str]:
    """Return the anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines(text: str) -> Iterator[str]:
    """Yield the shell commands of indented and fenced blocks and of `inline code`, continued lines joined."""
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        fenced ^= line.lstrip().startswith("```")
        command = re.match(r"\s*(?:\$ )?(?:torchrun .* -m )?((?:gemmule|make|python benchmarks/\S+) .*)", line)
        if command and (fenced or line.startswith("    ")):
            yield command[1]
        yield from re.findall(r"`((?:gemmule|make) [^`]+)`", line)


def complaints(line: str) -> Iterator[str]:
    """Say what in a command line does not exist."""
    program, name, *rest = re.split(r"\s{2,}|#|[|;]", line)[0].split()
    if program == "python":
        yield from complaints_of_script(ROOT / name, rest)
        return
    if program == "make":
        if name not in TARGETS and "=" not in name:
            yield f"make has no target {name}"
        return
    group = typer.main.get_command(build_app())
    assert isinstance(group, typer.core.TyperGroup)
    if name.startswith("-"):
        return
    if name not in group.commands:
        yield f"gemmule has no command {name}"
        return
    options = {option for parameter in group.commands[name].params for option in parameter.opts} | {"--help", "-h"}
    for word in rest:
        option = word.strip("[]").partition("=")[0]
        if option.startswith("--") and option.rstrip(".") not in options:
            yield f"gemmule {name} has no option {option}"
        if word.startswith("recipes/") and not (ROOT / word).exists():
            yield f"there is no {word}"


def complaints_of_script(script: Path, words: list[str]) -> Iterator[str]:
    """Say what of a benchmark's command line does not exist; comparative benchmarks share a parser."""
    if not script.exists():
        yield f"there is no {script.name}"
        return
    sources = script.read_text(encoding="utf-8"), (script.parent / "harness" / "command.py").read_text(encoding="utf-8")
    for option in (word.partition("=")[0].strip("[]") for word in words if word.startswith("--")):
        if not any(f'"{option}"' in source for source in sources):
            yield f"{script.name} has no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in headings(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    lines = command_lines(page.read_text(encoding="utf-8"))
    assert [complaint for line in lines for complaint in complaints(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_it_names_exist(page: Path) -> None:
    """Paths with a folder in `code`: from the root, from the package, or from the page."""
    places = (ROOT, ROOT / "src" / "gemmule", page.parent)
    for path in re.findall(r"`([\w.-]+/[\w./-]+\.(?:py|md|toml|json|txt))`", page.read_text(encoding="utf-8")):
        if not path.startswith(MADE):
            assert any((place / path).exists() for place in places), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_wraps_at_100_columns(page: Path) -> None:
    """Tables, code and what has no space to break at may be longer."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fenced ^= line.lstrip().startswith("```")
        code = fenced or line.startswith("    ") or line.lstrip().startswith("|")
        unbreakable = re.sub(r"`[^`]*`|!?\[[^\]]*\]\([^)]*\)", lambda found: "x" * len(found[0]), line)
        words = unbreakable.removeprefix("> ").split()
        if len(line) > 100 and not code:
            assert len(words) < 2 or (words[0] in "-" and len(words) == 2), f"{name_of(page)}, line {number}"


def test_the_page_of_settings_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == gemmule("settings", "--markdown").out, "make docs"


def test_every_setting_is_described_in_a_phrase() -> None:
    for setting in settings_of(Recipe):
        assert setting.meaning, setting.key
        assert setting.meaning[:1].islower() or setting.meaning.startswith(("AdamW", "Muon")), setting
        assert not setting.meaning.endswith("."), setting


def test_complaints_are_made() -> None:
    assert list(complaints("gemmule train recipes/story.toml --set data.train=x --out runs/a")) == []
    assert list(complaints("gemmule trian recipes/story.toml")) == ["gemmule has no command trian"]
    assert list(complaints("gemmule train recipes/stroy.toml --oot x")) == [
        "there is no recipes/stroy.toml",
        "gemmule train has no option --oot",
    ]
    assert list(complaints("make story")) == []
    assert list(complaints("python benchmarks/train.py --peer transformers")) == []
    assert list(complaints("python benchmarks/train.py --peers x")) == ["train.py has no option --peers"]
    assert list(complaints("python benchmarks/trian.py --peer x")) == ["there is no trian.py"]
    assert list(complaints("make storey")) == ["make has no target storey"]
    assert list(
        command_lines(
            "    gemmule train \\\n  --json\nuse `make test`\nmake things\n    torchrun -x 2 -m gemmule plan x"
        )
    ) == [
        "gemmule train    --json",
        "make test",
        "gemmule plan x",
    ]
