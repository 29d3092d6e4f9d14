"""Safetensors of a Hugging Face folder: index and load one file or shards, of a text or a multimodal model."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemmule.errors import ModelError
from gemmule.formats.config_json import read_json
from gemmule.formats.names import tensor_name_pairs
from gemmule.model.gemma3 import Gemma3
from gemmule.reading import IS_LFS_POINTER, is_lfs_pointer, path_kind, require_utf8

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Name prefixes of the text model in multimodal checkpoints, in the first and the present layout.
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

# Prefixes of wrapper modules of training programs (torch.compile, FSDP, checkpointing; DDP and peft).
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER_PREFIXES = ("module.", "base_model.")

# Supported dtypes; fp16 weights are loaded as fp32, because Gemma 3's residual stream exceeds the range of fp16.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class StoredTensor(NamedTuple):
    """Header of one tensor in a file."""

    file: Path
    name: str  # in the file
    dtype: str
    shape: list[int]
    # Row slices of a tensor that several ranks wrote, in order.
    slices: "tuple[StoredTensor, ...]" = ()


class TensorIndex(NamedTuple):
    """Headers of all tensors in a folder, without their data."""

    origin: Path  # the file named in errors
    tensors: dict[str, StoredTensor]  # by Hugging Face's name in a text model
    vision: list[str]
    prefix: str = ""  # removed from the names


def read_tensor_index(folder: Path) -> TensorIndex:
    """Index every tensor of a folder; ModelError for a missing or damaged file or a duplicate tensor."""
    sharded = path_kind(folder / WEIGHTS, ModelError) is None and path_kind(folder / INDEX, ModelError) is not None
    declared = _read_index(folder / INDEX) if sharded else {}
    origin = folder / (INDEX if sharded else WEIGHTS)
    placed: dict[str, StoredTensor] = {}
    for file in sorted({folder / name for name in declared.values()} or {folder / WEIGHTS}):
        with opened(file) as mapped:
            for name in mapped.keys():  # noqa: SIM118 - not a dict
                if name in placed:
                    raise ModelError(f"{file}: holds {shown([name])}, which {placed[name].file.name} holds too")
                header = mapped.get_slice(name)
                placed[name] = StoredTensor(file, name, header.get_dtype(), header.get_shape())
    if sharded and (found := {name: stored.file.name for name, stored in placed.items()}) != declared:
        astray = sorted(name for name, _ in found.items() ^ declared.items())
        raise ModelError(f"{origin}: disagrees with the files about {shown(dict.fromkeys(astray))}")
    prefix = _outer_prefix(placed)
    index = TensorIndex(origin, {}, [], prefix)
    slices: dict[str, list[tuple[int, StoredTensor]]] = {}
    for name, stored in placed.items():
        base, first = split_slice_name(name)
        plain = _text_name(WRAPPERS.sub("", base).removeprefix(prefix))
        if plain.startswith(VISION_PREFIXES):
            index.vision.append(name)
        elif base != name:
            slices.setdefault(plain, []).append((first, stored))
        elif (twin := index.tensors.setdefault(plain, stored)) is not stored:
            raise ModelError(f"{stored.file}: {shown([name])} and {shown([twin.name])} are the same tensor")
    for name, parts in slices.items():
        if name in index.tensors:
            raise ModelError(f"{index.origin}: {shown([name])} is stored both whole and in slices")
        index.tensors[name] = _concatenate(name, sorted(parts), index.origin)
    return index


def _outer_prefix(names: Iterable[str]) -> str:
    """Return the common prefix of all names that comes from a wrapper around the model."""
    plain, prefix = [WRAPPERS.sub("", name) for name in names], ""
    while plain and (found := next((each for each in OUTER_PREFIXES if _all_begin(plain, prefix + each)), "")):
        prefix += found
    # Adapters of the peft library hold the whole model in a module of that name.
    inner = (prefix + "model.model.", prefix + "model.lm_head.")
    return prefix + "model." if prefix and _all_begin(plain, *inner) else prefix


def _all_begin(names: Iterable[str], *prefixes: str) -> bool:
    return all(name.startswith(prefixes) for name in names)


def slice_name(name: str, first: int, shape: Sequence[int], whole: Sequence[int]) -> str:
    """Return the stored name of a row slice that begins at `first`; a whole tensor keeps its name."""
    return name if list(shape) == list(whole) else f"{name}[{first}:{first + shape[0]}]"


def split_slice_name(stored: str) -> tuple[str, int]:
    """Return the tensor's name and the first row of the slice."""
    found = re.fullmatch(r"(.+)\[(\d{1,12}):\d{1,12}\]", stored, re.ASCII)
    return (found[1], int(found[2])) if found else (stored, 0)


def _concatenate(name: str, parts: list[tuple[int, StoredTensor]], origin: Path) -> StoredTensor:
    """Concatenate row slices; ModelError where rows are missing or overlap."""
    rows, kind = 0, (parts[0][1].dtype, parts[0][1].shape[1:])
    for first, part in parts:
        if first != rows or not part.shape or (part.dtype, part.shape[1:]) != kind:
            raise ModelError(f"{origin}: the slices of {shown([name])} do not join at row {rows}")
        rows += part.shape[0]
    return StoredTensor(parts[0][1].file, name, kind[0], [rows, *kind[1]], tuple(part for _, part in parts))


def load_tensors(index: TensorIndex, model: Gemma3, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Load the state dict of a model, every stored tensor used exactly once.

    The dtype is the given one, else the stored one where all tensors share it and it is not fp16, else fp32. Tensors
    that keep their dtype are memory-mapped, the others are converted one by one. ModelError names missing, unexpected
    and misshapen tensors.
    """
    config, stored = model.config, dict(index.tensors)
    repeated = stored.pop(HEAD, None) if config.tie_word_embeddings else None
    wanted = {theirs: ours for ours, theirs in tensor_name_pairs(config.num_hidden_layers, config.tie_word_embeddings)}
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    present = {name: tensor for name, tensor in stored.items() if name in wanted}
    missing = [name for name in wanted if name not in stored]
    unexpected = [tensor.name for name, tensor in stored.items() if name not in wanted]
    refuse(index.origin, "lacks", missing, f"; found instead {shown(unexpected)}" if unexpected else "")
    refuse(index.origin, "has unexpected tensors:", unexpected)
    misshapen = ((tensor, shapes[wanted[name]]) for name, tensor in present.items())
    wrong = [f"{tensor.name} is {tensor.shape}, not {shape}" for tensor, shape in misshapen if tensor.shape != shape]
    refuse(index.origin, "does not fit config.json:", wrong)
    foreign = [f"{tensor.name} is {tensor.dtype}" for tensor in present.values() if tensor.dtype not in DTYPES]
    refuse(index.origin, f"is not of {', '.join(DTYPES)}:", foreign)
    kinds = {DTYPES[tensor.dtype] for tensor in present.values()}
    chosen = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)
    if repeated is not None:
        _check_repeated(repeated, present[EMBEDDING])
    if index.prefix:
        log.info(f"removed the prefix {index.prefix!r} from all tensor names")
    if index.vision:
        total = len(index.vision) + len(index.tensors)
        log.info(f"skipped the vision encoder, {len(index.vision)} of {total} tensors; Gemmule loads the text model")
    return {wanted[name]: tensor for name, tensor in _read(present, chosen)}


def _read(tensors: dict[str, StoredTensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor, converted to a dtype."""
    for file in sorted({stored.file for stored in tensors.values()}):
        with opened(file) as mapped:
            for name, stored in tensors.items():
                if stored.file != file or stored.slices:
                    continue
                tensor = mapped.get_tensor(stored.name)
                if tensor.dtype != dtype:
                    # A separate mapping: its pages are released after the conversion.
                    with opened(file) as own:
                        tensor = own.get_tensor(stored.name).to(dtype)
                yield name, tensor
    for name, stored in tensors.items():
        if stored.slices:
            parts = {part.name: part for part in stored.slices}
            yield name, torch.cat([part for _, part in sorted(_read(parts, dtype), key=_row)])


def _row(part: tuple[str, Tensor]) -> int:
    return split_slice_name(part[0])[1]


def _check_repeated(head: StoredTensor, embedding: StoredTensor) -> None:
    """Refuse a stored head that differs from the embedding although config.json ties them."""
    with opened(head.file) as one, opened(embedding.file) as other:
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
    """Return the file of each tensor; paths outside of the folder are refused."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{path}: has no weight_map (tensor name to file)")
    for file in files.values():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file, re.ASCII):
            raise ModelError(f"{path}: weight_map names {file!r:.80}, not a .safetensors file of this folder")
    return files


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Memory-map a file; the library validates all sizes and offsets of the header first."""
    if (kind := path_kind(path, ModelError)) in (None, "other"):  # opening a pipe would block
        what = "no such file" if kind is None else "not a regular file"
        raise ModelError(f"{path}: {what}; a model folder has config.json and {WEIGHTS} or all its shards")
    require_utf8(path, ModelError)
    try:
        with path.open("rb") as file:  # the library reports every error as a missing file
            if is_lfs_pointer(file.read(64)):
                raise ModelError(f"{path}: {IS_LFS_POINTER}")
        with safe_open(path, framework="pt") as mapped:
            yield mapped
    except (OSError, RuntimeError) as error:  # torch's, of a file that went while it was being mapped
        raise ModelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged or not a safetensors file: {error}") from None


def refuse(origin: Path, what: str, names: list[str], more: str = "") -> None:
    """Raise ModelError where there are names."""
    if names:
        raise ModelError(f"{origin}: {what} {shown(names)}{more}")


def shown(names: Iterable[str]) -> str:
    """List the first five names, unprintable ones escaped."""
    listed = list(names)
    first = [name if name.isprintable() else repr(name) for name in listed[:5]]
    return ", ".join(first) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
