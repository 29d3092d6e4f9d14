"""`gemmule export MODEL`: write a model for other programs, and verify it there."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gemmule.cli.screen import Screen, logged_to, print_json
from gemmule.reading import local_path


def export(
    model: Annotated[
        str, typer.Argument(help="A model folder, run folder, .gguf file or owner/name of the Hugging Face Hub.")
    ],
    to: Annotated[Literal["hf", "gguf", "ollama"], typer.Option(help="Export format.")],
    out: Annotated[Path, typer.Option(help="Output file (gguf) or folder (hf, ollama).")],
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"],
        typer.Option(help="Data type of the weights: hf takes the first three; the last four need llama.cpp."),
    ] = "bf16",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the export with transformers or llama.cpp, compare logits, and write a certificate. An existing "
            "export is verified if it equals what this command would write.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object with the certificate at the end.")
    ] = False,
) -> None:
    """Export a model as a Hugging Face folder, a GGUF file (llama.cpp, LM Studio) or a folder for Ollama.

    Examples:

        gemmule export runs/story --to gguf --out story.gguf --dtype q8_0 --verify

        gemmule export runs/story --to hf --out story-hf

        gemmule export runs/story --to ollama --out story-ollama
    """
    from gemmule.errors import OutputError
    from gemmule.evaluate.certificate import CertificateError, certify, check_runtime, describe, write_certificate
    from gemmule.formats.exports import (
        Export,
        certificate_path,
        check_export,
        differing_files,
        export_model,
        output_exists,
        reopen,
    )
    from gemmule.formats.model_card import license_note, read_card
    from gemmule.model.finite import refuse_nonfinite_weights
    from gemmule.train.opening import load_with_path

    runtime = "transformers" if to == "hf" else "llama.cpp"
    if verify:
        check_runtime(runtime)
    present, advice = verify and output_exists(out), "choose a new file or folder"
    check_export(to, out, dtype, exists=present)
    with Screen() as screen, logged_to(screen):
        network, tokenizer, found = load_with_path(model)
        refuse_nonfinite_weights(network, model)
        exported = Export(network, tokenizer, dtype, read_card(found), _name(model, found))
        if note := license_note(exported.card, model):
            screen.print(note)
        if present:
            screen.progress("comparing with the existing export", 0, None)
            if others := differing_files(exported, to, out):
                raise OutputError(f"--out {out}: already exists, and {others[0]} differs from this export; {advice}")
            artefact = out / "model.gguf" if to == "ollama" else out
        else:
            artefact = export_model(exported, to, out)
            screen.print(f"wrote {artefact}: {dtype}, {_size(artefact) / 1e6:,.1f} MB")
        if to == "ollama":
            screen.print(f"add it to Ollama:  ollama create {out.name} -f {out / 'Modelfile'}")
        summary: dict[str, Any] = {"artefact": str(artefact), "format": to, "dtype": dtype, "bytes": _size(artefact)}
        if verify:
            screen.progress("verifying", 0, None)
            certificate = certify(artefact, runtime, dtype, (network, tokenizer), reopen(artefact))
            proof = certificate_path(artefact)
            write_certificate(certificate, proof)
            screen.print(f"{describe(certificate)}\ncertificate: {proof}")
            summary |= certificate
            if not certificate["passed"]:
                raise CertificateError(f"{artefact}: the certificate failed; see {proof}")
    if as_json:
        print_json(summary)


def _name(model: str, found: Path) -> str:
    """Return the name of a model: of its run, folder or file, or on the Hub."""
    path = found.resolve() if local_path(model).exists() else Path(model)
    while path.name in ("model", "checkpoints") or path.name.startswith("step-"):
        path = path.parent
    return path.name.removesuffix(".gguf")


def _size(artefact: Path) -> int:
    files = artefact.iterdir() if artefact.is_dir() else [artefact]
    return sum(file.stat().st_size for file in files)
