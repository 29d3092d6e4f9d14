"""What may import what, and what importing may not do."""

import pkgutil
import re
import subprocess
import sys
import tomllib
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
OPTIONAL = {
    "datasets", "pyarrow", "zstandard", "matplotlib", "tensorboard", "transformers", "huggingface_hub", "ray", "wandb",
    "mlflow", "trackio", "fastapi", "uvicorn", "httptools", "prometheus_client",
}  # fmt: skip


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)


def loaded_after(program: str) -> set[str]:
    """Return the names of all top-level packages that a fresh interpreter has loaded after a program."""
    done = run(f"{program}\nimport sys\nsys.stderr.write(' '.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_the_wheel_holds_the_package_alone() -> None:
    """Benchmarks, peers' programs and fault injection are tools of ours; the command line is no library of theirs."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert table["tool"]["setuptools"]["packages"]["find"] == {"where": ["src"]}
    assert [path.name for path in (ROOT / "src").iterdir() if path.is_dir() and path.suffix != ".egg-info"] == [
        "gemmule"
    ]
    assert [name for name in MODULES if {"bench", "harness", "peers"} & set(name.split("."))] == []
    for script in (ROOT / "benchmarks").rglob("*.py"):
        assert not re.search(r"(from|import) gemmule\.cli", script.read_text(encoding="utf-8")), script


def test_layers_are_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    linter = pytest.importorskip("importlinter.cli", reason="import-linter is not installed")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)  # it would disable the loggers of other tests
    assert linter.lint_imports(no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "program",
    [
        "import gemmule",
        "import gemmule.tokenizer, gemmule.settings, gemmule.errors, gemmule.files",
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
        "import gemmule.formats.opening, gemmule.inference.engine, gemmule.inference.quantize\n"
        "from gemmule.model.config import Gemma3Config\n"
        "from gemmule.model.init import meta_model\n"
        "from gemmule.compiler import uncompiled\n"
        "assert meta_model(Gemma3Config(size='270m')).embedding.weight.is_meta\n"
        "with uncompiled(): pass\n"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    assert done.returncode == 0, done.stderr
    slow = {"torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "torch.distributed.tensor"}
    assert slow & set(done.stderr.split()) == set()


@pytest.fixture(scope="module")
def growing() -> list[list[str]]:
    """The modules loaded after torch's checkpoints, then after the training loop, and after everything."""
    everything = [name for name in MODULES if not name.startswith("gemmule.serve.")]  # an extra of its own
    imports = ["torch.distributed.checkpoint", "gemmule.train.loop", ", ".join(everything)]
    done = run("import sys\n" + "".join(f"import {names}\nprint(*sys.modules, file=sys.stderr)\n" for names in imports))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return [line.split() for line in done.stderr.splitlines()]


def test_importing_everything_is_silent_and_loads_nothing_optional(growing: list[list[str]]) -> None:
    torch_takes, _, loaded = ({name.partition(".")[0] for name in names} for names in growing)
    assert OPTIONAL & loaded <= torch_takes, "what torch takes where it finds it"


def test_the_closure_of_the_training_loop_is_an_evenings_reading(growing: list[list[str]]) -> None:
    """Ceilings that are only ever lowered."""
    closure = [name for name in growing[1] if name.partition(".")[0] == "gemmule"]
    files = [ROOT / "src" / Path(*name.split(".")) for name in closure]
    lines = sum(lines_of(file / "__init__.py" if file.is_dir() else file.with_suffix(".py")) for file in files)
    assert "gemmule.model.gemma3" in closure
    assert len(closure) <= 35
    assert lines <= 4000


def test_one_training_step_reads_in_five_files() -> None:
    """The files that docs/architecture.md names for a step; the aim is 1,000 lines, and the ceiling is only lowered."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("## One training step, in five files\n")[1].split("\n## ")[0]
    files = re.findall(r"^\d\. `([\w/]+\.py)`", section, re.MULTILINE)
    assert len(files) == 5
    assert sum(lines_of(ROOT / "src" / "gemmule" / file) for file in files) <= 1000


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())
