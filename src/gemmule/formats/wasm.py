"""`step.wasm`, the engine's C files as WebAssembly: python -m gemmule.formats.wasm OUT.

The compiler is the one pinned in constraints.txt, so that the same files give the same bytes.
"""

import subprocess
import sys
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from gemmule.errors import MissingExtra, ModelError
from gemmule.files import atomic_write
from gemmule.processes import python_module_command

EXPORTED = ("step", "workspace_floats", "draw_token", "draw_bytes", "malloc", "free")
_SOURCES = ("inference/native/step.c", "inference/native/sample.c", "formats/run/draw.c", "formats/run/draw.h")
# As in inference/native/library.py; no relaxed SIMD, whose results differ between machines, and no threads.
_FLAGS = (
    "-target", "wasm32-wasi", "-mexec-model=reactor", "-msimd128", "-O3", "-std=gnu11", "-D_GNU_SOURCE",
    "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-Wno-unknown-pragmas",
    "-Wl,--strip-all", *(f"-Wl,--export={name}" for name in EXPORTED),
)  # fmt: skip


def build_wasm(out: Path) -> None:
    """Compile step.c and sample.c to WebAssembly; MissingExtra without ziglang, ModelError where it fails."""
    sources = [files("gemmule").joinpath(name) for name in _SOURCES]
    if find_spec("ziglang") is None:
        raise MissingExtra("ziglang", "program", "compiling step.wasm")
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            (Path(folder) / source.name).write_bytes(source.read_bytes())
        command = python_module_command("ziglang", "cc", *_FLAGS, "step.c", "draw.c", "-o", "out.wasm")
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        if ended.returncode:
            raise ModelError(f"zig cc did not compile step.wasm: {ended.stderr.strip()[:500]}")
        with atomic_write(out) as temporary:
            temporary.write_bytes((Path(folder) / "out.wasm").read_bytes())


if __name__ == "__main__":
    build_wasm(Path(sys.argv[1]))
