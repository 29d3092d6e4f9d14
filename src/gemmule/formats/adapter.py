"""Adapter folders in PEFT's layout: adapter_config.json, adapter_model.safetensors, and the SHA-256 of the base."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemmule.errors import ModelError, OutputError
from gemmule.files import atomic_folder
from gemmule.formats.config_json import read_json, write_json
from gemmule.formats.names import HUGGING_FACE, tensor_name_pairs
from gemmule.formats.safetensors_reader import (
    TEXT_PREFIXES,
    VISION_PREFIXES,
    opened,
    refuse,
    shown,
    split_slice_name,
)
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.lora import MATRICES, Full, LoRA, add_lora, changes_nothing, lora_of
from gemmule.reading import path_kind

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A file of our own, because peft warns of keys of adapter_config.json that it does not know.
BASE_FILE = "base.json"
PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"
# Our names of an adapter's tensors in a linear layer, and peft's.
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# Matrices by the names that Hugging Face's modules have, such as q_proj.
TARGETS = {HUGGING_FACE[f"blocks.{{}}.{name}.weight"].split(".")[-2]: name for name in MATRICES}
# Keys of adapter_config.json that are read, or that change nothing of what an adapter computes.
_READ = frozenset({
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora",
    "use_dora", "trainable_token_indices",
})  # fmt: skip
_HARMLESS = frozenset({
    "auto_mapping", "ensure_weight_tying", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
})  # fmt: skip
# First weights that leave the base as it was, unlike those of PiSSA or OLoRA.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_HASHED = 2**24  # elements that are hashed at once


class Base(NamedTuple):
    """The model that an adapter was trained on."""

    name: str  # folder, file, or owner/name of the Hub
    sha256: str | None = None  # as `weights_sha256`; None where it is not known


class AdapterConfig(NamedTuple):
    """What adapter_config.json says."""

    lora: LoRA
    base: str | None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return path_kind(folder / CONFIG) == "file"


def weights_sha256(model: Gemma3) -> str:
    """Return the SHA-256 of a plain model's weights: Hugging Face's names, shapes and fp32 values, in its order.

    It is the same for one file and several, and for a model in bf16 and its copy in fp32.
    """
    digest, state = hashlib.sha256(), model.state_dict()
    for ours, theirs in tensor_name_pairs(model.config.num_hidden_layers, model.config.tie_word_embeddings):
        values = state[ours].detach()
        digest.update(f"{theirs} {list(values.shape)}\n".encode())
        for part in values.flatten().split(_HASHED):
            digest.update(part.cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def adapter_names(config: Gemma3Config, lora: LoRA) -> Iterator[tuple[str, str]]:
    """Yield (our parameter, name in the folder) of every tensor of an adapter."""
    if lora.rows:
        yield "embedding.rows", f"{PREFIX}{HUGGING_FACE['embedding.weight'].removesuffix('weight')}{_ROWS}"
    for layer in range(config.num_hidden_layers):
        for target in lora.targets:
            theirs = HUGGING_FACE[f"blocks.{{}}.{target}.weight"].format(layer).removesuffix("weight")
            for ours, part in _PARTS.items():
                if ours != "magnitude" or lora.dora:
                    yield f"blocks.{layer}.{target}.{ours}", f"{PREFIX}{theirs}{part}"


def adapter_tensors(model: Gemma3, full: Full = lambda values: values) -> dict[str, Tensor]:
    """Return an adapter's tensors by their names in the folder, fp32."""
    parameters, lora = dict(model.named_parameters()), lora_of(model)
    assert lora is not None
    return {theirs: full(parameters[ours].detach()) for ours, theirs in adapter_names(model.config, lora)}


def save_adapter(lora: LoRA, tensors: Mapping[str, Tensor], base: Base, folder: Path) -> None:
    """Write an adapter into an existing folder, which peft, transformers and vLLM open."""
    values = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
    save_adapter_config(lora, base, folder)
    # safetensors writes files that only the owner can read.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)


def save_adapter_config(lora: LoRA, base: Base, folder: Path) -> None:
    """Write adapter_config.json, and base.json with the SHA-256 of the base's weights where that is known."""
    theirs = {ours: name for name, ours in TARGETS.items()}
    table = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "revision": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(theirs[target] for target in lora.targets),
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
        "trainable_token_indices": list(lora.rows) or None,
    }
    write_json(folder / CONFIG, table)
    if base.sha256:
        write_json(folder / BASE_FILE, {"weights_sha256": base.sha256})


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json; ModelError names what this model cannot have."""
    path = folder / CONFIG
    table = read_json(path)

    def problem(key: str, advice: str) -> ModelError:
        return ModelError(f"{path}: {key} = {json.dumps(table.get(key))[:80]}: {advice}")

    if table.get("peft_type") != "LORA":
        raise problem("peft_type", "only LORA is supported")
    if table.get("bias", "none") != "none":
        raise problem("bias", 'only "none" is supported, because no layer of Gemma 3 has a bias')
    if table.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise problem("init_lora_weights", "changes the base, so it is not supported; save it as plain LoRA with peft")
    for key in table.keys() - _READ - _HARMLESS - {"bias", "init_lora_weights"}:
        if table[key]:
            raise problem(key, "is not supported; merge the adapter with peft, and name the merged model")
    if not isinstance(rank := table.get("r"), int) or isinstance(rank, bool) or rank < 1:
        raise problem("r", "must be a whole number at least 1")
    alpha, dropout, base = table.get("lora_alpha"), table.get("lora_dropout", 0.0), table.get("base_model_name_or_path")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        raise problem("lora_alpha", "must be a number above 0")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise problem("lora_dropout", "must be a number at least 0 and below 1")
    if base is not None and not isinstance(base, str):
        raise problem("base_model_name_or_path", "must be a folder or owner/name")
    rows = table.get("trainable_token_indices") or []
    rows = rows.get("embed_tokens") if isinstance(rows, dict) and len(rows) == 1 else rows
    if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows) or len({*rows}) < len(rows):
        raise problem("trainable_token_indices", "must be a list of different ids of tokens of embed_tokens")
    targets = table.get("target_modules")
    if isinstance(targets, list):
        if unknown := [name for name in targets if str(name).rpartition(".")[2] not in TARGETS]:
            raise problem("target_modules", f"{shown(map(str, unknown))} is none of {', '.join(TARGETS)}")
        chosen = {TARGETS[str(name).rpartition(".")[2]] for name in targets}
    elif targets == "all-linear":
        chosen = set(MATRICES)
    else:
        raise problem("target_modules", "must be a list of modules such as q_proj")
    if not chosen:
        raise problem("target_modules", "must name at least one module")
    flags = (bool(table.get("use_rslora")), bool(table.get("use_dora")))
    kept = tuple(name for name in MATRICES if name in chosen)
    return AdapterConfig(LoRA(rank, float(alpha), kept, float(dropout), *flags, tuple(rows)), base or None)


def copy_adapter(folder: Path, out: Path) -> None:
    """Write the folder of an adapter anew, without what a checkpoint has beside it."""
    check_adapter_output(out)
    with atomic_folder(out, last=CONFIG) as target:
        for file in sorted(folder.iterdir()):
            if not file.name.startswith(("optimizer", "state.json")) and file.is_file():
                shutil.copyfile(file, target / file.name)


def check_adapter_output(out: Path) -> None:
    """Raise OutputError where something is at the path."""
    if path_kind(out, OutputError) == "file" or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"--out {out}: already exists; choose a new folder")


def load_adapter(folder: Path, model: Gemma3) -> None:
    """Put the adapter of a folder on a plain model, every tensor used exactly once.

    ModelError names missing, unexpected and misshapen tensors, and an adapter that changes nothing.
    """
    lora, tensors, config = read_adapter_config(folder).lora, _read_tensors(folder), model.config
    if lora.rows and not config.tie_word_embeddings:
        raise ModelError(f"{folder / CONFIG}: trainable_token_indices: the head of this model is not its embedding")
    if beyond := [row for row in lora.rows if row >= config.vocab_size]:
        raise ModelError(f"{folder / CONFIG}: trainable_token_indices: the model has no token {beyond[0]}")
    add_lora(model, lora)
    names, parameters = dict(adapter_names(config, lora)), dict(model.named_parameters())
    wanted = {theirs: ours for ours, theirs in names.items()}
    missing, unexpected = [name for name in wanted if name not in tensors], [n for n in tensors if n not in wanted]
    beside = f"; found instead {shown(unexpected)}" if unexpected else ""
    refuse(folder / WEIGHTS, "lacks", missing, beside)
    refuse(folder / WEIGHTS, f"has tensors that {CONFIG} or the base does not ask for:", unexpected)
    wrong = [
        f"{theirs} is {list(tensors[theirs].shape)}, not {list(parameters[ours].shape)}"
        for theirs, ours in wanted.items()
        if tensors[theirs].shape != parameters[ours].shape
    ]
    refuse(folder / WEIGHTS, f"does not fit {CONFIG} and the base:", wrong)
    with torch.no_grad():
        for theirs, ours in wanted.items():
            parameters[ours].copy_(tensors[theirs])
    broken = [theirs for theirs, ours in wanted.items() if not bool(parameters[ours].isfinite().all())]
    refuse(folder / WEIGHTS, "has values that are not finite in", broken)
    if changes_nothing(model):
        raise ModelError(f"{folder / WEIGHTS}: changes nothing: every lora_B is 0, as before training")


def base_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of the base's weights, where the adapter was written with it."""
    file = folder / BASE_FILE
    if path_kind(file) is None:
        return None
    found = read_json(file).get("weights_sha256")
    if not isinstance(found, str):
        raise ModelError(f"{file}: damaged: has no weights_sha256; remove it to open the adapter without a check")
    return found


def _files(folder: Path) -> list[Path]:
    """Return the files of the tensors: one, or one of each rank that wrote a checkpoint."""
    plain, pickled = folder / WEIGHTS, folder / "adapter_model.bin"
    if path_kind(plain) or not (files := sorted(folder.glob("adapter_model-*-of-*.safetensors"))):
        if not path_kind(plain):
            advice = f"; save {pickled.name} as safetensors with peft" if path_kind(pickled) else ""
            raise ModelError(f"{plain}: no such file; an adapter folder has {CONFIG} and {WEIGHTS}{advice}")
        return [plain]
    return files


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors by their names in a text model, row slices joined."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in _files(folder):
        with opened(file) as mapped:
            for name in mapped.keys():  # noqa: SIM118 - not a dict
                plain, first = split_slice_name(_text_name(name, file))
                parts.setdefault(plain, []).append((first, mapped.get_tensor(name)))
    for name, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        ends = [first + len(tensor) for first, tensor in pieces[:-1]]
        if [first for first, _ in pieces] != [0, *ends]:
            raise ModelError(f"{folder}: the slices of {shown([name])} do not join")
    return {name: torch.cat([tensor for _, tensor in pieces]) for name, pieces in parts.items()}


def _text_name(name: str, file: Path) -> str:
    """Remove the prefix of the text model in a multimodal one; refuse an adapter of the vision encoder."""
    inner = name.removeprefix(PREFIX)
    if inner.startswith(VISION_PREFIXES):
        raise ModelError(f"{file}: adapts the vision encoder ({shown([name])}), and Gemmule has the text model only")
    for prefix, plain in TEXT_PREFIXES.items():
        if inner.startswith(prefix):
            return PREFIX + plain + inner.removeprefix(prefix)
    return name
