"""The compiled file is made once, loaded from nobody else's hands, and made again where it is damaged."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemmule.errors import DeviceError
from gemmule.inference import engine
from gemmule.inference.engine import stream_tokens
from gemmule.inference.native import library
from gemmule.inference.native.library import load_library
from gemmule.inference.runners import Decoding
from gemmule.inference.sampling import REFERENCE, SamplingSettings
from tiny import lively_model, tiny_config

needs_compiler = pytest.mark.skipif(isinstance(load_library(), str), reason="no C compiler here")
GREEDY = SamplingSettings(temperature=0)


COMPILE = library._compile
COMPILED: dict[tuple[object, ...], tuple[bytes, bool]] = {}


def compile_once(compiler: list[str], target: Path, source: Path) -> bool:
    """Compile as the library does; what the same compiler has made already is written again."""
    key = (*compiler, Path(compiler[0]).stat().st_mtime_ns, source)
    if key not in COMPILED:
        has_openmp = COMPILE(compiler, target, source)
        COMPILED[key] = target.read_bytes(), has_openmp
    content, has_openmp = COMPILED[key]
    target.write_bytes(content)
    return has_openmp


def tokens_of(way: Decoding) -> list[list[int | None]]:
    model = lively_model(tiny_config(num_hidden_layers=2))
    return list(stream_tokens(model, [[2, 40, 41]], 5, frozenset(), GREEDY, decoding=way))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a cache that holds nothing yet; only step.c is compiled, and by each compiler once."""
    monkeypatch.setattr(engine, "make_sampler", lambda device: REFERENCE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in library.FLAGS))  # quick
    monkeypatch.setattr(library, "_compile", compile_once)
    load_library.cache_clear()
    yield tmp_path / "cache" / "gemmule"
    load_library.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where it was compiled to, each time."""
    targets: list[Path] = []
    real = library._compile
    monkeypatch.setattr(library, "_compile", lambda *given: targets.append(given[1]) or real(*given))
    return targets


def load_again() -> None:
    load_library.cache_clear()
    assert tokens_of("native") == tokens_of("plain")


def replace_content(file: Path, content: bytes) -> None:
    """Put another file in its place, for this process has mapped the present one into memory."""
    file.unlink()
    file.write_bytes(content)
    file.chmod(0o700)


def script(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a shell script the compiler."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return str(path)


def test_without_a_compiler_the_plain_way_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert tokens_of("auto") == tokens_of("plain")
    words = "decoding 'native': no C compiler .no-such-compiler. was found; use 'plain' or 'auto'"
    with pytest.raises(DeviceError, match=words):
        tokens_of("native")


def test_a_compiler_that_fails_is_quoted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path / "cc", "echo 'step.c: out of luck' >&2\nexit 1", monkeypatch)
    with pytest.raises(DeviceError, match=f"decoding 'native': {compiler} did not compile it: step.c: out of luck"):
        tokens_of("native")


def test_a_compiler_that_takes_too_long_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "cc", "exec sleep 30", monkeypatch)
    monkeypatch.setattr(library, "TIMEOUT", 0.1)
    with pytest.raises(DeviceError, match=r"cc did not compile it: it took longer than 0.1 seconds; use 'plain'"):
        tokens_of("native")


def test_a_compiler_that_is_not_a_command_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc '-O2")
    with pytest.raises(DeviceError, match=r"CC = \"gcc '-O2\" is not a command: No closing quotation"):
        tokens_of("native")


@needs_compiler
@pytest.mark.parametrize("given", [" ", "cc -pthread", "env 'cc' -DX='a b'"])
def test_a_compiler_may_have_arguments_as_in_make(given: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", given)
    load_again()


@needs_compiler
def test_it_is_compiled_once(folder: Path, compiled: list[Path]) -> None:
    for _ in range(2):
        load_again()
    assert len(compiled) == 1
    assert [file.suffix for file in folder.iterdir()] == [".so"]


@needs_compiler
def test_the_cache_is_this_users_alone(folder: Path, compiled: list[Path]) -> None:
    before = os.umask(0)
    try:
        load_again()
    finally:
        os.umask(before)
    for path in (folder.parent, folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


@needs_compiler
@pytest.mark.parametrize("kept", [0, 1000])
def test_a_file_that_was_cut_is_made_again(kept: int, folder: Path, compiled: list[Path]) -> None:
    """To load half of a file kills the process."""
    load_again()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    replace_content(file, content[:kept])
    load_again()
    assert len(compiled) == 2
    assert [kept.read_bytes() for kept in folder.iterdir()] == [content]


@needs_compiler
def test_a_file_with_a_changed_byte_is_made_again(folder: Path, compiled: list[Path]) -> None:
    load_again()
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    replace_content(file, bytes(content))
    load_again()
    assert len(compiled) == 2


@needs_compiler
@pytest.mark.parametrize("mode", [0o722, 0o720])
def test_a_file_that_others_may_write_is_not_loaded(mode: int, folder: Path, compiled: list[Path]) -> None:
    load_again()
    (file,) = folder.iterdir()
    file.chmod(mode)
    load_again()
    assert len(compiled) == 2
    assert next(folder.iterdir()).stat().st_mode & 0o022 == 0


@needs_compiler
def test_a_folder_that_others_may_write_is_closed_to_them(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    load_again()
    assert folder.stat().st_mode & 0o077 == 0


@needs_compiler
def test_what_another_user_owns_is_not_loaded(
    folder: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_again()
    monkeypatch.setattr(os, "getuid", lambda: 4321)  # to whom the files do not belong
    load_again()
    assert len(compiled) == 2
    assert len(list(folder.iterdir())) == 1, "nothing was written there either"
    assert not compiled[1].parent.exists(), "a folder for this process alone"


@needs_compiler
def test_links_are_not_followed(folder: Path, compiled: list[Path], tmp_path: Path) -> None:
    load_again()
    (file,) = folder.iterdir()
    file.rename(tmp_path / "elsewhere.so")
    file.symlink_to(tmp_path / "elsewhere.so")
    load_again()
    assert len(compiled) == 2
    folder.rename(tmp_path / "other")
    folder.symlink_to(tmp_path / "other")
    load_again()
    assert len(compiled) == 3


@needs_compiler
def test_a_relative_cache_folder_is_ignored(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG specification has it: code would be loaded from the working folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    load_again()
    assert not Path("here").exists()
    assert len(list((tmp_path / "home" / ".cache" / "gemmule").iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("home", ["/proc/no-home", "/dev/null"])
def test_without_a_place_for_a_cache_it_is_compiled_for_this_process(
    home: str, folder: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    load_again()
    load_again()
    assert len(compiled) == 2


@needs_compiler
def test_a_full_disk_leaves_nothing_and_is_no_obstacle(
    folder: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library, "sync", full)
    load_again()
    assert list(folder.iterdir()) == []


@needs_compiler
def test_what_a_kill_left_is_removed(folder: Path) -> None:
    folder.mkdir(parents=True)
    old, new = folder / ".partial-old", folder / ".partial-new"
    for file in (old, new):
        file.touch()
    os.utime(old, (1, 1))
    load_again()
    assert not old.exists()
    assert new.exists(), "another process may be writing it"


NO_OPENMP = 'case "$*" in *-fopenmp*|*-mprefer*) echo unknown >&2; exit 1;; esac\nexec cc "$@"'


@needs_compiler
def test_a_compiler_that_knows_few_options_will_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "cc", NO_OPENMP, monkeypatch)
    load_again()


@needs_compiler
def test_what_was_compiled_without_openmp_is_tried_again_after_a_day(
    folder: Path, tmp_path: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "cc", NO_OPENMP, monkeypatch)
    for _ in range(2):
        load_again()
    assert len(compiled) == 1
    yesterday = time.time() - library.SERIAL_LIFETIME - 1
    os.utime(next(folder.iterdir()), (yesterday, yesterday))
    script(tmp_path / "cc", 'exec cc "$@"', monkeypatch)  # now there is OpenMP
    for _ in range(2):
        load_again()
    assert len(compiled) == 2
    symbols = subprocess.run(["grep", "-c", "omp_get", *folder.iterdir()], capture_output=True, check=False)
    assert symbols.returncode == 0
