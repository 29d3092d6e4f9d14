"""A model written for others: the formats, and how each is read back."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from gemmule.errors import ModelError, OutputError
from gemmule.files import folder_written_aside, written_aside
from gemmule.formats.folder import load_folder, save_folder
from gemmule.formats.gguf import lint, load_gguf, save_gguf
from gemmule.formats.k_quants import KINDS, quantise
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer

Say = Callable[[str], None]
# Torch's types of a Hugging Face folder.
_FOLDER_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def export_model(model: Gemma3, tokenizer: Tokenizer, to: str, out: Path, dtype: str, say: Say) -> Path:
    """Write a model in one of EXPORTS; returns the file or folder that the other program opens.

    Raises OutputError where `out` holds something already, ModelError for a dtype that format or weights refuse.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"--out {out}: is there already; name a new file or folder")
    if dtype == "f16":
        _check_range(model)
    return EXPORTS[to](model, tokenizer, out, dtype, say)


def reopen(artefact: Path) -> tuple[Gemma3, Tokenizer]:
    """Open an export again, in fp32."""
    model, tokenizer = load_folder(artefact) if artefact.is_dir() else load_gguf(artefact)
    return model.float(), tokenizer


def certificate_path(artefact: Path) -> Path:
    """Return where the certificate of an export lies: in the folder, or beside the file."""
    return (
        artefact / "certificate.json" if artefact.is_dir() else artefact.with_name(f"{artefact.stem}.certificate.json")
    )


def _export_folder(model: Gemma3, tokenizer: Tokenizer, out: Path, dtype: str, _say: Say) -> Path:
    if dtype not in _FOLDER_DTYPES:
        raise ModelError(f"--dtype {dtype}: a Hugging Face folder takes {', '.join(_FOLDER_DTYPES)}")
    with folder_written_aside(out) as folder:
        save_folder(model, tokenizer, folder, _FOLDER_DTYPES[dtype])
    return out


def _export_gguf(model: Gemma3, tokenizer: Tokenizer, out: Path, dtype: str, say: Say) -> Path:
    for remark in lint(model.config):
        say(f"note: {remark}")
    if dtype in KINDS:
        with written_aside(out) as aside, TemporaryDirectory(dir=out.parent) as folder:
            whole = Path(folder) / "model.gguf"
            save_gguf(model, tokenizer, whole, "f32", say)
            quantise(whole, aside, dtype)
    else:
        save_gguf(model, tokenizer, out, dtype, say)
    return out


def _export_ollama(model: Gemma3, tokenizer: Tokenizer, out: Path, dtype: str, say: Say) -> Path:
    with folder_written_aside(out) as folder:
        _export_gguf(model, tokenizer, folder / "model.gguf", dtype, say)
        (folder / "Modelfile").write_text(modelfile(model, tokenizer), encoding="utf-8")
    say(f"make it known to Ollama:  ollama create {out.name} -f {out / 'Modelfile'}")
    return out / "model.gguf"


def modelfile(model: Gemma3, tokenizer: Tokenizer) -> str:
    """Return Ollama's description of a model: a chat where the tokenizer has a chat template, else plain text."""
    lines = ["FROM ./model.gguf"]
    if tokenizer.chat_template is not None:
        turn = "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}<end_of_turn>\n"
        lines.append(f'TEMPLATE """{turn}<start_of_turn>model\n{{{{ .Response }}}}<end_of_turn>\n"""')
        lines.append('PARAMETER stop "<end_of_turn>"')
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    reach = min(model.config.max_position_embeddings, 8192)
    lines += [f"PARAMETER num_ctx {reach}", "PARAMETER temperature 0.7", "PARAMETER min_p 0.1"]
    return "\n".join(lines) + "\n"


def _check_range(model: Gemma3) -> None:
    largest = max((p.abs().max().item(), name) for name, p in model.named_parameters())
    if largest[0] > torch.finfo(torch.float16).max:
        raise ModelError(f"--dtype f16: {largest[1]} reaches {largest[0]:.0f}, beyond fp16's range; use bf16")


EXPORTS: dict[str, Callable[[Gemma3, Tokenizer, Path, str, Say], Path]] = {
    "hf": _export_folder,
    "gguf": _export_gguf,
    "ollama": _export_ollama,
}
