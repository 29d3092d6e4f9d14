"""Export formats: write a model for other programs, and load the export again."""

import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from gemmule.errors import ModelError, OutputError
from gemmule.files import as_output_error, atomic_folder, atomic_write, sha256
from gemmule.formats.folder import load_folder, save_folder
from gemmule.formats.gguf import load_gguf, runtime_caveats, save_gguf
from gemmule.formats.gguf_file import is_gguf, library
from gemmule.formats.k_quants import KINDS, check_quantizer, quantize
from gemmule.formats.model_card import NO_CARD, ModelCard, write_card
from gemmule.formats.packed import DTYPES as PACKED_DTYPES
from gemmule.formats.packed import load_packed
from gemmule.formats.page import is_page, load_page, page_digest, save_page, save_site
from gemmule.formats.program import PACKED, check_compiler, write_program, write_sources
from gemmule.model.finite import refuse_nonfinite_weights
from gemmule.model.gemma3 import Gemma3
from gemmule.reading import path_kind, require_utf8
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import END, START

log = logging.getLogger(__name__)

# dtypes of a Hugging Face folder.
_FOLDER_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_FP16_LARGEST = torch.finfo(torch.float16).max
# The largest weight per dtype; a quantized block has a scale in fp16 times an integer.
_LARGEST = {
    "f32": torch.finfo(torch.float32).max, "bf16": torch.finfo(torch.bfloat16).max, "f16": _FP16_LARGEST,
    "int8": torch.finfo(torch.float32).max,
    "q8_0": _FP16_LARGEST * 127, "q5_0": _FP16_LARGEST * 16, "q4_0": _FP16_LARGEST * 8,
}  # fmt: skip
_GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", *KINDS)
# What a format is called, and what its weights may be.
_DTYPES: dict[str, tuple[str, Collection[str]]] = {
    "hf": ("a Hugging Face folder", _FOLDER_DTYPES),
    "gguf": ("GGUF", _GGUF_DTYPES),
    "ollama": ("GGUF", _GGUF_DTYPES),
    "c": ("a C program", PACKED_DTYPES),
    "program": ("a C program", PACKED_DTYPES),
    "html": ("a page", PACKED_DTYPES),
    "web": ("a page", PACKED_DTYPES),
}
CERTIFICATE = "certificate.json"


class Export(NamedTuple):
    """A model to export, with its model card."""

    model: Gemma3
    tokenizer: Tokenizer
    dtype: str
    card: ModelCard = NO_CARD
    name: str | None = None  # used where the card has none
    target: str | None = None  # of a program; None is this machine


def check_export(to: str, out: Path, dtype: str, *, exists: bool = False, target: str | None = None) -> None:
    """Validate the options of an export before the model is loaded: dtype, libraries, compiler, output path.

    `exists` allows an export at `out`. Raises ModelError, MissingExtra, DeviceError or OutputError.
    """
    kind, dtypes = _DTYPES[to]
    if dtype not in dtypes:
        raise ModelError(f"--dtype {dtype}: {kind} takes {', '.join(dtypes)}")
    if target is not None and to != "program":
        raise ModelError(f"--target {target}: is for --to program, and this is --to {to}")
    if to == "hf":
        require_utf8(out, lambda message: OutputError(f"--out {message}"))
    elif to == "program":
        check_compiler(target)
    elif to in ("gguf", "ollama"):
        library()
        if dtype in KINDS:
            check_quantizer(dtype)
    if not exists and output_exists(out):
        raise OutputError(f"--out {out}: already exists; choose a new file or folder")


def default_dtype(to: str) -> str:
    """Return the dtype of an export where none is given."""
    return "int8" if _DTYPES[to][1] is PACKED_DTYPES else "bf16"


def output_exists(out: Path) -> bool:
    """Whether a path exists and is not an empty folder."""
    kind = path_kind(out, OutputError)
    with as_output_error(out):
        return out.is_symlink() if kind is None else kind != "folder" or any(out.iterdir())


def export_model(export: Export, to: str, out: Path) -> Path:
    """Write a model in one of the formats of EXPORTS; returns the file or folder that the other program loads.

    Raises as `check_export`, and ModelError for weights outside of the range of the dtype.
    """
    check_export(to, out, export.dtype, target=export.target)
    refuse_nonfinite_weights(export.model)
    _check_range(export, to)
    return EXPORTS[to](export, out)


def differing_files(export: Export, to: str, out: Path) -> list[str]:
    """Return the files of an existing export that differ from a new export, certificates excluded."""
    with as_output_error(out), TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
        fresh = Path(folder) / out.name
        export_model(export, to, fresh)
        mine, theirs = dict(_digests(fresh)), dict(_digests(out))
    return sorted({name for name, _ in mine.items() ^ theirs.items() if not name.endswith(CERTIFICATE)})


def _digests(place: Path) -> Iterator[tuple[str, str]]:
    for file in [place] if place.is_file() else sorted(place.iterdir()):
        if is_page(file):
            yield file.name, page_digest(file)
        else:
            yield file.name, sha256(file) if file.is_file() else "folder"


def reopen(artefact: Path, tokenizer: Tokenizer) -> tuple[Gemma3, Tokenizer]:
    """Load an export in fp32.

    A packed file has the arrays of a tokenizer, which programs read, and no tokenizer.json: then it is the one given.
    """
    if is_page(artefact):
        return load_page(artefact).model, tokenizer
    if artefact.is_dir():
        if (artefact / PACKED).exists():
            return load_packed(artefact / PACKED).model, tokenizer
        model, tokenizer = load_folder(artefact)
    elif is_gguf(artefact):
        model, tokenizer = load_gguf(artefact)
    else:
        return load_packed(artefact).model, tokenizer
    return model.float(), tokenizer


def certificate_path(artefact: Path) -> Path:
    """Return the path of an export's certificate: in the folder, or next to the file."""
    return artefact / CERTIFICATE if artefact.is_dir() else artefact.with_name(f"{artefact.stem}.{CERTIFICATE}")


def _export_folder(export: Export, out: Path) -> Path:
    with atomic_folder(out, last="config.json") as folder:
        write_card(export.card, folder)
        save_folder(export.model, export.tokenizer, folder, _FOLDER_DTYPES[export.dtype])
    return out


def _export_gguf(export: Export, out: Path) -> Path:
    model, tokenizer, dtype, card = export[:4]
    for caveat in runtime_caveats(model.config):
        log.info(f"note: {caveat}")
    card = card._replace(name=_title(export, out))
    if dtype in KINDS:
        # A fixed name, so that the next export replaces the file of a killed one.
        unquantized = out.with_name(f".{out.name}.f32")
        with atomic_write(out) as temporary:
            try:
                save_gguf(model, tokenizer, unquantized, "f32", card)
                quantize(unquantized, temporary, dtype)
            finally:
                unquantized.unlink(missing_ok=True)
    else:
        save_gguf(model, tokenizer, out, dtype, card)
    return out


def _export_ollama(export: Export, out: Path) -> Path:
    with atomic_folder(out, last="Modelfile") as folder:
        named = export._replace(name=export.name or out.name)
        _export_gguf(named, folder / "model.gguf")
        (folder / "Modelfile").write_text(modelfile(export.model, export.tokenizer), encoding="utf-8")
    if export.tokenizer.chat_template is not None and not _has_gemma_turns(export.tokenizer.chat_template):
        log.info("note: the chat template is not Gemma's; Ollama uses the most similar one that it knows")
    return out / "model.gguf"


def _export_c(export: Export, out: Path) -> Path:
    with atomic_folder(out, last="Makefile") as folder:
        write_sources(export.model, export.tokenizer, folder, export.dtype, _title(export, out))
    return out


def _export_program(export: Export, out: Path) -> Path:
    name = _title(export, out)
    write_program(export.model, export.tokenizer, out, export.dtype, name, export.target)
    return out


def _export_html(export: Export, out: Path) -> Path:
    save_page(export.model, export.tokenizer, out, export.dtype, _title(export, out), export.card.license)
    return out


def _export_web(export: Export, out: Path) -> Path:
    save_site(export.model, export.tokenizer, out, export.dtype, _title(export, out), export.card.license)
    return out


def _title(export: Export, out: Path) -> str:
    return export.card.name or export.name or out.stem


def modelfile(model: Gemma3, tokenizer: Tokenizer) -> str:
    """Return the Modelfile for Ollama: chat where the tokenizer has a chat template, else completion.

    Ollama has its own template language. Gemma's turns are translated; for any other template Ollama chooses one of its
    own by the template in the GGUF file.
    """
    lines = ["FROM ./model.gguf"]
    template = tokenizer.chat_template
    if template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif _has_gemma_turns(template):
        turn = f"{START}user\n{{{{ if .System }}}}{{{{ .System }}}}\n\n{{{{ end }}}}{{{{ .Prompt }}}}{END}\n"
        lines.append(f'TEMPLATE """{turn}{START}model\n{{{{ .Response }}}}{END}\n"""')
        lines.append(f'PARAMETER stop "{END}"')
    context = min(model.config.max_position_embeddings, 8192)
    lines += [f"PARAMETER num_ctx {context}", "PARAMETER temperature 0.7", "PARAMETER min_p 0.1"]
    return "\n".join(lines) + "\n"


def _has_gemma_turns(template: str) -> bool:
    return START in template and END in template


def _check_range(export: Export, to: str) -> None:
    """Refuse weights that would overflow to infinity in a dtype."""
    limit = _LARGEST.get(export.dtype, _FP16_LARGEST)
    rounded = [(name, p) for name, p in export.model.named_parameters() if to == "hf" or p.ndim > 1]
    largest, name = max((p.abs().max().item(), name) for name, p in rounded)
    if largest > limit:
        raise ModelError(
            f"--dtype {export.dtype}: {name} has the value {largest:.4g}, outside of the range of {limit:.4g}; use f32"
        )


EXPORTS: dict[str, Callable[[Export, Path], Path]] = {
    "hf": _export_folder,
    "gguf": _export_gguf,
    "ollama": _export_ollama,
    "c": _export_c,
    "program": _export_program,
    "html": _export_html,
    "web": _export_web,
}
