"""`gemmule export MODEL`: write a model for other programs, and verify it there."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gemmule.cli.options import AdapterOption
from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.reading import local_path

if TYPE_CHECKING:
    from gemmule.formats.exports import Export


Format = Annotated[
    Literal["hf", "gguf", "ollama", "c", "program", "html", "web", "adapter"],
    typer.Option(help="Export format; adapter is PEFT's folder, all others have adapters merged."),
]
Dtype = Annotated[
    Literal["f32", "f16", "bf16", "int8", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"]
    | None,
    typer.Option(
        help="Data type of the weights. hf: f32, f16 or bf16, the default. gguf and ollama: all but int8; bf16 is the "
        "default, and the last four need llama.cpp. c, program, html and web: f32, bf16 or int8, the default.",
    ),
]
Target = Annotated[
    Literal["linux-x86_64", "linux-aarch64", "macos-aarch64", "macos-x86_64", "windows-x86_64"] | None,
    typer.Option(help="Machine that a program is for; without it this one, by its own C compiler."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Load the export with transformers or llama.cpp, run the program, or run the page in wasmtime "
        "and node; compare logits, and write a certificate. An existing export is verified if it equals what this "
        "command would write.",
    ),
]
# What runs an export to verify it; llama.cpp the others.
_RUNTIMES = {"hf": "transformers", "c": "program", "program": "program", "html": "wasmtime", "web": "wasmtime"}


def export(
    model: Annotated[
        str, typer.Argument(help="A model folder, run folder, .gguf file or owner/name of the Hugging Face Hub.")
    ],
    to: Format,
    out: Annotated[Path, typer.Option(help="Output file (gguf, program, html) or folder (hf, ollama, c, web).")],
    dtype: Dtype = None,
    target: Target = None,
    verify: Verify = False,
    adapter: AdapterOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object with the certificate at the end.")
    ] = False,
) -> None:
    """Export a model as a Hugging Face folder, as GGUF (llama.cpp, LM Studio, Ollama), a C program or a web page.

    Examples:

        gemmule export runs/story --to gguf --out story.gguf --dtype q8_0 --verify

        gemmule export runs/story --to hf --out story-hf

        gemmule export runs/story --to ollama --out story-ollama

        gemmule export runs/story --to c --out story-c

        gemmule export runs/story --to program --target windows-x86_64 --out story.exe

        gemmule export runs/story --to html --out story.html --verify

        gemmule export runs/story --to web --out site
    """
    from gemmule.evaluate.certificate import CertificateError, certify, check_runtime, describe, write_certificate
    from gemmule.formats.exports import (
        Export,
        certificate_path,
        check_export,
        default_dtype,
        output_exists,
        reopen,
    )
    from gemmule.formats.model_card import license_note, read_card
    from gemmule.formats.program import check_runnable
    from gemmule.model.finite import refuse_nonfinite_weights
    from gemmule.train.opening import load_with_path

    if to == "adapter":
        _export_adapter(model, out, [dtype, target, verify or None, adapter], as_json)
        return
    chosen, runtime = dtype or default_dtype(to), _RUNTIMES.get(to, "llama.cpp")
    if verify:
        check_runtime(runtime)
        check_runnable(to, target)
    present = verify and output_exists(out)
    check_export(to, out, chosen, exists=present, target=target)
    with Screen() as screen, logged_to(screen):
        network, tokenizer, found = load_with_path(model, adapters=adapter or ())
        refuse_nonfinite_weights(network, model)
        exported = Export(network, tokenizer, chosen, read_card(found), _name(model, found), target)
        if note := license_note(exported.card, model):
            screen.print(note)
        artefact = _write(exported, to, out, screen, present)
        summary: dict[str, Any] = {"artefact": str(artefact), "format": to, "dtype": chosen, "bytes": _size(artefact)}
        if verify:
            screen.progress("verifying", 0, None)
            certificate = certify(artefact, runtime, chosen, (network, tokenizer), reopen(artefact, tokenizer))
            proof = certificate_path(artefact)
            write_certificate(certificate, proof)
            screen.print(f"{describe(certificate)}\ncertificate: {proof}")
            summary |= certificate
            if not certificate["passed"]:
                raise CertificateError(f"{artefact}: the certificate failed; see {proof}")
    if as_json:
        print_json(summary)


def _export_adapter(model: str, out: Path, others: "list[object]", as_json: bool) -> None:
    """Write the folder of an adapter."""
    from gemmule.errors import ModelError, UserError
    from gemmule.formats.adapter import copy_adapter
    from gemmule.train.opening import find_adapter, load_with_path

    if any(others):
        raise UserError("--to adapter: writes tensors as they are, so it takes MODEL and --out alone")
    with Screen() as screen, logged_to(screen):
        if (found := find_adapter(model)) is None:
            raise ModelError(f"MODEL {model}: has no adapter; --to adapter is for the folder or the run of one")
        load_with_path(found)  # refuses what does not fit its base
        copy_adapter(found, out)
        screen.print(f"wrote {out}: an adapter, {_size(out) / 1e6:,.1f} MB")
    if as_json:
        print_json({"artefact": str(out), "format": "adapter", "bytes": _size(out)})


def _write(exported: "Export", to: str, out: Path, screen: Screen, present: bool) -> Path:
    """Write an export, or compare it with the one that is present; return what the other program loads."""
    from gemmule.errors import OutputError
    from gemmule.formats.exports import differing_files, export_model
    from gemmule.formats.program import PACKED

    if present:
        screen.progress("comparing with the existing export", 0, None)
        if others := differing_files(exported, to, out):
            difference = f"{others[0]} differs from this export; choose a new file or folder"
            raise OutputError(f"--out {out}: already exists, and {difference}")
        artefact = out / "model.gguf" if to == "ollama" else out
    else:
        artefact = export_model(exported, to, out)
        screen.print(f"wrote {artefact}: {exported.dtype}, {_size(artefact) / 1e6:,.1f} MB")
    if to == "ollama":
        screen.print(f"add it to Ollama:  ollama create {out.name} -f {out / 'Modelfile'}")
    if to == "c":
        screen.print(f"run it:  make -C {out} && {out / 'story'} {out / PACKED}")
    if to == "web":
        screen.print(f"look at it:  python3 -m http.server -d {out}")
    return artefact


def _name(model: str, found: Path) -> str:
    """Return the name of a model: of its run, folder or file, or on the Hub."""
    path = found.resolve() if local_path(model).exists() else Path(model)
    while path.name in ("model", "checkpoints") or path.name.startswith("step-"):
        path = path.parent
    return path.name.removesuffix(".gguf")


def _size(artefact: Path) -> int:
    files = artefact.iterdir() if artefact.is_dir() else [artefact]
    return sum(file.stat().st_size for file in files)
