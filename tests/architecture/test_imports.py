"""What may import what, and what importing may not do."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import gemmule

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gemmule.__path__, "gemmule.")
    if not module.name.endswith("__main__")
)
# Loaded only by the function that uses them, so that nobody needs them who does not.
OPTIONAL = {"datasets", "pyarrow", "zstandard", "matplotlib", "tensorboard", "transformers", "huggingface_hub", "ray"}


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)


def loaded_after(program: str) -> set[str]:
    """Return the names of all top-level packages that a fresh interpreter has loaded after a program."""
    done = run(f"{program}\nimport sys\nsys.stderr.write(' '.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_layers_are_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    linter = pytest.importorskip("importlinter.cli", reason="import-linter is not installed")
    monkeypatch.chdir(ROOT)
    assert linter.lint_imports(no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "program",
    [
        "import gemmule",
        "import gemmule.tokenizer, gemmule.recipe, gemmule.errors, gemmule.files",
        "import gemmule.data.prepare",
        "import gemmule.cli.main",
        "from typer.testing import CliRunner\nfrom gemmule.cli.main import build_app, COMMANDS\n"
        "for words in [['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)]:\n"
        "    assert CliRunner().invoke(build_app(), words).exit_code == 0",
    ],
    ids=["gemmule", "tokenizer and recipes", "preparing data", "command line", "help"],
)
def test_torch_is_not_loaded_by(program: str) -> None:
    loaded = loaded_after(program)
    assert "gemmule" in loaded
    assert "torch" not in loaded


def test_opening_and_generating_load_no_compiler_and_no_shards() -> None:
    """Each takes a second, before the first token."""
    done = run(
        "import sys\n"
        "import gemmule.formats.opening, gemmule.generate.engine, gemmule.generate.weights\n"
        "from gemmule.model.config import Gemma3Config\n"
        "from gemmule.model.initialise import unfilled\n"
        "from gemmule.runtime import uncompiled\n"
        "assert unfilled(Gemma3Config(size='270m')).embedding.weight.is_meta\n"
        "with uncompiled(): pass\n"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    assert done.returncode == 0, done.stderr
    slow = {"torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.tensor"}
    assert slow & set(done.stderr.split()) == set()


def test_importing_everything_is_silent_and_loads_nothing_optional() -> None:
    done = run(f"import {', '.join(MODULES)}\nimport sys\nsys.stderr.write(' '.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert OPTIONAL & loaded <= loaded_after(
        "import torch.distributed.checkpoint"
    )  # what torch takes where it finds it


def test_training_needs_few_modules() -> None:
    """The import closure of training; a reader's evening."""
    done = run("import gemmule.train.run, sys\nsys.stderr.write(' '.join(sys.modules))")
    closure = [name for name in done.stderr.split() if name.partition(".")[0] == "gemmule"]
    files = [ROOT / "src" / Path(*name.split(".")) for name in closure]
    lines = sum(
        len((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text().splitlines())
        for file in files
    )
    assert "gemmule.model.gemma3" in closure
    assert lines <= 5100  # 4,500 was the aim; several processes, their checkpoints and fast paths took the rest


def test_generate_can_be_called_whatever_was_imported_before() -> None:
    done = run(f"import {', '.join(MODULES)}\nimport gemmule\nassert callable(gemmule.generate), gemmule.generate")
    assert done.returncode == 0, done.stderr
