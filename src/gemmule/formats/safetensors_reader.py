"""The tensors of a Hugging Face folder: in one file or in shards, of a text model or of a multimodal one."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemmule.errors import ModelError
from gemmule.formats.config_json import read_json
from gemmule.formats.names import foreign_names
from gemmule.model.gemma3 import Gemma3

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What multimodal checkpoints, of the first layout and of the present one, put before the names of a text model.
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

# The number formats that are read; Gemma 3's residual stream exceeds F16's range, so that is computed in fp32.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Stored(NamedTuple):
    """A tensor that lies in a file."""

    file: Path
    name: str  # in the file
    dtype: str
    shape: list[int]
    # Where it was written in pieces by several processes: they, in the order of their rows.
    pieces: "tuple[Stored, ...]" = ()


class Shelf(NamedTuple):
    """What a folder's headers say of its tensors; nothing is read of the tensors themselves."""

    origin: Path  # the file to name when something is amiss
    tensors: dict[str, Stored]  # by their names in a text model
    vision: list[str]


def survey(folder: Path) -> Shelf:
    """Find every tensor of a folder; ModelError where a file is missing or damaged or a tensor is there twice."""
    sharded = not (folder / WEIGHTS).exists() and (folder / INDEX).exists()
    declared = _read_index(folder / INDEX) if sharded else {}
    shelf = Shelf(folder / (INDEX if sharded else WEIGHTS), {}, [])
    placed: dict[str, str] = {}
    pieces: dict[str, list[tuple[int, Stored]]] = {}
    for file in sorted({folder / name for name in declared.values()} or {folder / WEIGHTS}):
        with _opened(file) as mapped:
            for name in mapped.keys():  # noqa: SIM118 - not a dict
                if name in placed:
                    raise ModelError(f"{file}: holds {_shown([name])}, which {placed[name]} holds too")
                placed[name] = file.name
                if name.startswith(VISION_PREFIXES):
                    shelf.vision.append(name)
                    continue
                header = mapped.get_slice(name)
                stored = Stored(file, name, header.get_dtype(), header.get_shape())
                base, first = split_piece_name(name)
                if base != name:
                    pieces.setdefault(_text_name(base), []).append((first, stored))
                    continue
                if (twin := shelf.tensors.setdefault(_text_name(name), stored)) is not stored:
                    raise ModelError(f"{file}: {_shown([name])} and {_shown([twin.name])} are the same tensor, twice")
    if sharded and placed != declared:
        astray = sorted(name for name, _ in placed.items() ^ declared.items())
        raise ModelError(f"{shelf.origin}: disagrees with the files about {_shown(dict.fromkeys(astray))}")
    for name, parts in pieces.items():
        if name in shelf.tensors:
            raise ModelError(f"{shelf.origin}: {_shown([name])} is there whole and in pieces")
        shelf.tensors[name] = _joined(name, sorted(parts), shelf.origin)
    return shelf


def piece_name(name: str, first: int, shape: Sequence[int], whole: Sequence[int]) -> str:
    """Name rows of a tensor, from `first` on, as they are stored; all of them have the tensor's own name."""
    return name if list(shape) == list(whole) else f"{name}[{first}:{first + shape[0]}]"


def split_piece_name(stored: str) -> tuple[str, int]:
    """Return the tensor's name and the piece's first row."""
    piece = re.fullmatch(r"(.+)\[(\d{1,12}):\d{1,12}\]", stored, re.ASCII)
    return (piece[1], int(piece[2])) if piece else (stored, 0)


def _joined(name: str, parts: list[tuple[int, Stored]], origin: Path) -> Stored:
    """Put pieces together, whose rows must follow each other without a gap."""
    rows, kind = 0, (parts[0][1].dtype, parts[0][1].shape[1:])
    for first, part in parts:
        if first != rows or not part.shape or (part.dtype, part.shape[1:]) != kind:
            raise ModelError(f"{origin}: the pieces of {_shown([name])} do not fit together at row {rows}")
        rows += part.shape[0]
    return Stored(parts[0][1].file, name, kind[0], [rows, *kind[1]], tuple(part for _, part in parts))


def read_survey(
    shelf: Shelf, model: Gemma3, dtype: torch.dtype | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, Tensor]:
    """Read the weights that a model needs under its own names, every stored tensor used exactly once.

    They are of the given dtype, or else of the stored one where that is a single one other than F16, or else fp32.
    What keeps its dtype is mapped into memory, the rest is converted tensor by tensor. ModelError names what is
    missing, left over or misshapen.
    """
    config, stored = model.config, dict(shelf.tensors)
    repeated = stored.pop(HEAD, None) if config.tie_word_embeddings else None
    wanted = {theirs: ours for ours, theirs in foreign_names(config.num_hidden_layers, config.tie_word_embeddings)}
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    present = {name: tensor for name, tensor in stored.items() if name in wanted}
    _refuse(shelf.origin, "lacks", [name for name in wanted if name not in stored])
    _refuse(shelf.origin, "has also", [tensor.name for name, tensor in stored.items() if name not in wanted])
    misshapen = ((tensor, shapes[wanted[name]]) for name, tensor in present.items())
    wrong = [f"{tensor.name} is {tensor.shape}, not {shape}" for tensor, shape in misshapen if tensor.shape != shape]
    _refuse(shelf.origin, "does not fit config.json:", wrong)
    foreign = [f"{tensor.name} is {tensor.dtype}" for tensor in present.values() if tensor.dtype not in DTYPES]
    _refuse(shelf.origin, f"is not of {', '.join(DTYPES)}:", foreign)
    kinds = {DTYPES[tensor.dtype] for tensor in present.values()}
    chosen = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)
    if repeated is not None:
        _check_repeated(repeated, present[EMBEDDING])
    if shelf.vision:
        total = len(shelf.vision) + len(shelf.tensors)
        say(f"left aside the vision part, {len(shelf.vision)} of {total} tensors; Gemmule takes the text model")
    return {wanted[name]: tensor for name, tensor in _read(present, chosen)}


def _read(tensors: dict[str, Stored], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor in a dtype."""
    for file in sorted({stored.file for stored in tensors.values()}):
        with _opened(file) as mapped:
            for name, stored in tensors.items():
                if stored.file != file or stored.pieces:
                    continue
                tensor = mapped.get_tensor(stored.name)
                if tensor.dtype != dtype:
                    # By a mapping of its own: what was read through it is given back with it.
                    with _opened(file) as own:
                        tensor = own.get_tensor(stored.name).to(dtype)
                yield name, tensor
    for name, stored in tensors.items():
        if stored.pieces:
            parts = {part.name: part for part in stored.pieces}
            yield name, torch.cat([part for _, part in sorted(_read(parts, dtype), key=_row)])


def _row(piece: tuple[str, Tensor]) -> int:
    return split_piece_name(piece[0])[1]


def _check_repeated(head: Stored, embedding: Stored) -> None:
    """Refuse a head that config.json calls the embedding, but that is not."""
    with _opened(head.file) as one, _opened(embedding.file) as other:
        same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and torch.equal(
            one.get_tensor(head.name).view(torch.uint8), other.get_tensor(embedding.name).view(torch.uint8)
        )
    if not same:
        words = f"{head.name} differs from {embedding.name}, although config.json has tie_word_embeddings = true"
        raise ModelError(f"{head.file}: {words}; set it to false to use both")


def _text_name(name: str) -> str:
    for prefix, plain in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor; a file's name is a plain one, so that nothing outside of the folder is opened."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{path}: has no weight_map, which says in which file each tensor is")
    for file in files.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file, re.ASCII):
            raise ModelError(f"{path}: weight_map names {file!r:.80}, not a .safetensors file of this folder")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Map a file; the library compares all sizes and places in its header with the file before it does."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file; a model folder has config.json and {WEIGHTS} or all its shards"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged or not a safetensors file: {error}") from None


def _refuse(origin: Path, what: str, names: list[str]) -> None:
    if names:
        raise ModelError(f"{origin}: {what} {_shown(names)}")


def _shown(names: Iterable[str]) -> str:
    """List the first names; one that could not be read on a line is escaped."""
    listed = list(names)
    first = [name if name.isprintable() else repr(name) for name in listed[:5]]
    return ", ".join(first) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
