"""`gemmule export MODEL`: carry a model elsewhere, with proof."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gemmule.cli.screen import Screen, print_json


def export(
    model: Annotated[str, typer.Argument(help="A model folder, run folder, .gguf file or owner/name.")],
    to: Annotated[Literal["hf", "gguf", "ollama"], typer.Option(help="The format.")],
    out: Annotated[Path, typer.Option(help="The file (gguf) or folder (hf, ollama) to write.")],
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"],
        typer.Option(help="How weights are stored: hf takes the first three, the last four need llama.cpp."),
    ] = "bf16",
    verify: Annotated[
        bool, typer.Option("--verify", help="Reopen it with transformers or llama.cpp, compare, write a certificate.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as a JSON object last.")] = False,
) -> None:
    """Write a model as a Hugging Face folder, a GGUF file (llama.cpp, LM Studio) or a folder for Ollama.

    Examples:

        gemmule export runs/story --to gguf --out story.gguf --dtype q8_0 --verify

        gemmule export runs/story --to hf --out story-hf

        gemmule export runs/story --to ollama --out story-ollama
    """
    import gemmule
    from gemmule.evaluate.certificate import CertificateError, certify, describe, write_certificate
    from gemmule.formats.exports import certificate_path, export_model, reopen

    exported = gemmule.load(model)
    with Screen() as screen:
        artefact = export_model(*exported, to, out, dtype, screen.say)
        screen.say(f"{artefact} is written")
        summary: dict[str, Any] = {"artefact": str(artefact), "format": to, "dtype": dtype}
        if verify:
            screen.progress("verifying", 0, None)
            runtime = "transformers" if to == "hf" else "llama.cpp"
            certificate = certify(artefact, runtime, dtype, exported, reopen(artefact))
            proof = certificate_path(artefact)
            write_certificate(certificate, proof)
            screen.say(f"{describe(certificate)}\n{proof} says so")
            summary |= certificate
            if not certificate["passed"]:
                raise CertificateError(f"{artefact}: the certificate failed; see {proof}")
    if as_json:
        print_json(json.dumps(summary))
