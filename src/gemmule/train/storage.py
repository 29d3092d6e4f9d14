"""How torch.distributed.checkpoint keeps tensors here: safetensors files, one a process and kind, and nothing pickled.

A process alone writes `model.safetensors` under Hugging Face's names, or of an adapter `adapter_model.safetensors`
under peft's, and `optimizer.safetensors`; process 2 of 4 writes `model-00002-of-00004.safetensors`. A tensor of which a
process has rows 8 to 16 is kept as `NAME[8:16]`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from gemmule.files import as_output_error, create_temporary_folder, partial_folder, sha256, sync
from gemmule.formats.adapter import PREFIX
from gemmule.formats.safetensors_reader import slice_name, split_slice_name

KINDS = ("model", "optimizer", "adapter_model")


def kind_of(name: str) -> str:
    """Return the kind of file that a tensor goes to; what an optimizer remembers is named `parameter/quantity`."""
    return "optimizer" if "/" in name else "adapter_model" if name.startswith(PREFIX) else "model"


class _Plain:
    """What torch's interface asks of both, and neither needs."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew; there is nothing to forget."""

    def prepare_local_plan(self, plan: Any) -> Any:
        """Take the plan as it is."""
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        """Refuse to be chosen by a name."""
        return False


class Writer(_Plain, StorageWriter):
    """Writes each process's part beside a folder; `finish` then gets the sha256 of every file by its name.

    Where that fails for want of space or rights, OutputError names the folder.
    """

    def __init__(self, folder: Path, finish: Callable[[dict[str, str]], None]) -> None:
        self._folder, self._aside, self._finish = folder, partial_folder(folder), finish

    def set_up_storage_writer(self, *_: Any, **__: Any) -> None:
        """Make the folder; every process may, so that none depends on when it sees another's."""
        with as_output_error(self._folder):
            create_temporary_folder(self._aside)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each process its place among those that write."""
        places = [f"-{number:05d}-of-{len(plans):05d}" if len(plans) > 1 else "" for number in range(1, len(plans) + 1)]
        return [dataclasses.replace(plan, storage_data=place) for plan, place in zip(plans, places, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors of this process, a file for each kind."""
        results: list[WriteResult] = []
        for kind in KINDS:
            items = [item for item in plan.items if kind_of(item.index.fqn) == kind]
            if not items:
                continue
            tensors: dict[str, Tensor] = {}
            for item in items:
                assert item.tensor_data is not None
                values = planner.resolve_data(item)
                assert isinstance(values, Tensor)
                chunk = item.tensor_data.chunk
                first = chunk.offsets[0] if chunk.offsets else 0
                name = slice_name(item.index.fqn, first, chunk.sizes, item.tensor_data.size)
                tensors[name] = values.detach().cpu().contiguous()
            file = self._aside / f"{kind}{plan.storage_data}.safetensors"
            with as_output_error(self._folder):
                save_file(tensors, file, metadata={"format": "pt"})
                file.chmod(self._aside.stat().st_mode & 0o666)  # the library lets nobody but the owner read it
                sync(file)
                written = (file.name, sha256(file))
            results += [WriteResult(item.index, item.tensor_storage_size() or 0, written) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        """Hand over what was written, on one process and when all have written; the files say where each tensor is."""
        self._finish(dict(sorted({result.storage_data for part in results for result in part})))


class Reader(_Plain, StorageReader):
    """Reads what any number of processes wrote, each process the rows that it needs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._place: dict[MetadataIndex, tuple[Path, str]] = {}

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Learn from the headers which tensors there are and where their pieces lie."""
        found: dict[str, STORAGE_TYPES] = {}
        for file, stored, dtype, shape in headers(self._folder):
            name, first = split_slice_name(stored)
            offsets = torch.Size([first, *[0] * (len(shape) - 1)] if shape else [])
            kept = found.setdefault(name, TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), []))
            assert isinstance(kept, TensorStorageMetadata)
            kept.chunks.append(ChunkStorageMetadata(offsets, torch.Size(shape)))
            if shape:
                kept.size = torch.Size([max(kept.size[0], first + shape[0]), *shape[1:]])
            self._place[MetadataIndex(name, offsets)] = (file, stored)
        return Metadata(found)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read rows into their tensors, file by file."""
        wanted: dict[Path, list[Any]] = {}
        for item in plan.items:
            wanted.setdefault(self._place[item.storage_index][0], []).append(item)
        for file, items in wanted.items():
            with safe_open(file, framework="pt") as mapped:
                for item in items:
                    place = planner.resolve_tensor(item)
                    rows = mapped.get_slice(self._place[item.storage_index][1])
                    cut = tuple(
                        slice(first, first + length)
                        for first, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    place.detach().copy_(rows[cut] if cut else mapped.get_tensor(item.storage_index.fqn))
                    planner.commit_tensor(item, place)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Be ready since the metadata was read."""

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take the plans as they are."""
        return plans


def headers(folder: Path) -> Iterator[tuple[Path, str, torch.dtype, list[int]]]:
    """Yield (file, name, dtype, shape) of every tensor and piece of a tensor in a checkpoint."""
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    for file in sorted(file for kind in KINDS for file in folder.glob(f"{kind}*.safetensors")):
        with safe_open(file, framework="pt") as mapped:
            for name in mapped.keys():  # noqa: SIM118 - not a dict
                header = mapped.get_slice(name)
                yield file, name, dtypes[header.get_dtype()], header.get_shape()
