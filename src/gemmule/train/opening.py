"""Open any MODEL, run folders and adapters included."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from gemmule.errors import ModelError, UserError
from gemmule.formats.adapter import base_sha256, is_adapter, load_adapter, read_adapter_config, weights_sha256
from gemmule.formats.opening import find_model, open_model
from gemmule.model.gemma3 import Gemma3
from gemmule.model.lora import merge
from gemmule.reading import local_path, path_kind
from gemmule.run_folder import RECIPE_FILE
from gemmule.runtime import choose_device
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.tokenizer import TOKENIZER_FILE

T = TypeVar("T")
_DEEPEST = 8  # adapters on adapters


class Opened(NamedTuple):
    """A model on the CPU, and the folder or file that it was opened from."""

    model: Gemma3
    tokenizer: Tokenizer
    path: Path


def load_with_path(
    model: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    adapters: Sequence[str | Path] = (),
) -> tuple[Gemma3, Tokenizer, Path]:
    """Open a MODEL as `gemmule.load` does, and return also the folder or file that it was opened from.

    What is downloaded and ignored is logged. `dtype` is the one of the weights, by default as stored. Where MODEL is an
    adapter, its base is opened. It and all `adapters` are merged in fp32 and rounded once, to the dtype.
    """
    target, folders = choose_device(device), [_adapter_folder(adapter) for adapter in adapters]
    opened = _open(model, lambda found: _merged(found, folders, dtype))
    return opened.model.to(target), opened.tokenizer, opened.path


def open_unmerged(model: str | Path, adapters: Sequence[str | Path] = ()) -> Gemma3 | None:
    """Open a MODEL in fp32 with its last adapter beside the weights, not merged; None where it has no adapter."""
    folders = [_adapter_folder(adapter) for adapter in adapters]

    def beside(found: Path) -> Gemma3 | None:
        base, used = _base(found, folders)
        if not used:
            return None
        plain = _merge_all(base.model, used[:-1], torch.float32).float()
        load_adapter(used[-1], plain)
        return plain.eval()

    return _open(model, beside)


def find_adapter(model: str | Path) -> Path | None:
    """Return the folder of the adapter that a MODEL is; of a run its final adapter, else its newest checkpoint's."""
    final = local_path(model) / "adapter"
    found = final if path_kind(final) == "folder" and is_adapter(final) else _open(model, lambda path: path)
    return found if is_adapter(found) else None


def _open(model: str | Path, action: Callable[[Path], T]) -> T:
    """Call the action with the folder or file of a MODEL; of a run it is the newest good checkpoint."""
    run = local_path(model)
    path_kind(run, lambda message: ModelError(f"MODEL {message}"))
    is_run = path_kind(run / RECIPE_FILE, ModelError) and not path_kind(run / "config.json", ModelError)
    if not is_run:
        return action(find_model(model))
    from gemmule.train.checkpoint import checkpoints, newest_checkpoint  # slow to load, so only where it is needed

    while True:
        present = checkpoints(run)
        newest, damage = newest_checkpoint(run, weights_only=True)
        try:
            if newest is None:
                damaged = "".join(f"; {each}" for each in damage)
                raise ModelError(f"MODEL {run}: a run without a good checkpoint yet{damaged}")
            return action(newest)
        except (UserError, OSError) as error:
            if checkpoints(run) == present:
                message = f"MODEL {run}: cannot be read: {error}"
                raise (error if isinstance(error, UserError) else ModelError(message)) from None
            # The run is being trained: it has written another checkpoint, and removed this one.


def _merged(found: Path, adapters: Sequence[Path], dtype: torch.dtype | None, depth: int = 0) -> Opened:
    if not adapters and not is_adapter(found):
        return Opened(*open_model(found, dtype), found)
    base, folders = _base(found, adapters, depth)
    model = _merge_all(base.model, folders, dtype or base.model.embedding.weight.dtype)
    last = folders[-1]
    has_tokenizer = path_kind(last / TOKENIZER_FILE, ModelError) is not None
    return Opened(model.eval(), Tokenizer.load(last) if has_tokenizer else base.tokenizer, found)


def _merge_all(model: Gemma3, folders: Sequence[Path], dtype: torch.dtype) -> Gemma3:
    """Merge adapters one after another in fp32, and round to `dtype` at the end."""
    for folder in folders:
        load_adapter(folder, model)
        model = merge(model, dtype if folder == folders[-1] else torch.float32)
    return model


def _base(found: Path, adapters: Sequence[Path], depth: int = 0) -> tuple[Opened, list[Path]]:
    """Open the plain model below all adapters, in its stored dtype, and list them; ModelError if one is of another."""
    if not is_adapter(found):
        base, folders = Opened(*open_model(found), found), [*adapters]
    else:
        name, folders = read_adapter_config(found).base, [found, *adapters]
        advice = f"open it beside its base: MODEL --adapter {found}"
        if name is None:
            raise ModelError(f"{found}: does not name its base; {advice}")
        if depth == _DEEPEST:
            raise ModelError(f"{found}: its base is an adapter, and so on, {_DEEPEST} times")
        try:
            base = _open(name, lambda inner: _merged(inner, (), None, depth + 1))
        except UserError as error:
            raise ModelError(f"{found}: its base cannot be opened: {error}; {advice}") from None
    _check_together(folders)
    known = {folder: sha256 for folder in folders if (sha256 := base_sha256(folder))}
    if known:
        own = weights_sha256(base.model)
        for folder, sha256 in known.items():
            if sha256 != own:
                raise ModelError(
                    f"{folder}: was trained on another base than {base.path}: the SHA-256 of its weights is "
                    f"{sha256[:12]}..., and not {own[:12]}...; name the model that it was trained on"
                )
    return base, folders


def _check_together(folders: Sequence[Path]) -> None:
    """Refuse adapters that do not add up."""
    kinds = [(folder, read_adapter_config(folder).lora) for folder in folders]
    rows: dict[int, Path] = {}
    for folder, lora in kinds:
        if lora.dora and len(kinds) > 1:
            raise ModelError(f"{folder}: is a DoRA, which does not add up with other adapters; open it alone")
        for row in lora.rows:
            if row in rows:
                raise ModelError(f"{folder}: replaces the embedding of token {row}, which {rows[row]} does too")
            rows[row] = folder
    if len({*folders}) < len(folders):
        raise ModelError(f"--adapter {folders[-1]}: is given twice")


def _adapter_folder(name: str | Path) -> Path:
    """Return the folder of an adapter, downloaded from the Hub where no such path exists."""
    found = find_model(name)
    if path_kind(found) == "folder" and path_kind(found / RECIPE_FILE) and is_adapter(found / "adapter"):
        found /= "adapter"  # of a run
    if path_kind(found) != "folder" or not is_adapter(found):
        raise ModelError(f"--adapter {name}: has no adapter_config.json; name the folder of an adapter")
    return found
