import shutil
import tomllib
from pathlib import Path

import pytest
import torch

import gemmule
from gemmule.errors import DeviceError, ModelError
from gemmule.train import checkpoint
from gemmule.train.checkpoint import checkpoints
from gemmule.train.opening import load_with_path

ROOT = Path(__file__).parents[1]


def test_load_opens_a_model_folder_ready_to_predict(tiny_run: Path) -> None:
    model, tokenizer = gemmule.load(tiny_run / "model")
    assert not model.training
    ids = tokenizer.encode("Once upon a time")
    assert ids[0] == tokenizer.bos_id
    logits = model(torch.tensor([ids]))
    assert logits.shape == (1, len(ids), tokenizer.vocab_size)
    assert logits.dtype == torch.float32


def test_load_takes_text_for_a_path(tiny_run: Path) -> None:
    assert gemmule.load(str(tiny_run / "model"))[0].config == gemmule.load(tiny_run / "model")[0].config


def same_weights(one: Path, other: Path) -> bool:
    first, second = (gemmule.load(place)[0].state_dict() for place in (one, other))
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_run_folder_stands_for_its_newest_good_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    newest, before = checkpoints(run)
    assert same_weights(run, newest)
    assert not same_weights(newest, before)
    (newest / "model.safetensors").write_bytes(b"damaged")
    assert same_weights(run, before)


def test_a_run_without_checkpoints_is_explained(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ModelError, match=r"run: a run without a good checkpoint yet$"):
        gemmule.load(run)


def test_a_device_that_is_not_there_is_explained(tiny_run: Path) -> None:
    with pytest.raises(DeviceError, match="device 'tpu'"):
        gemmule.load(tiny_run, device="tpu")


def test_generate_can_be_called_again_and_again_and_streams_one_event_a_token(tiny_run: Path) -> None:
    model, tokenizer = gemmule.load(tiny_run)
    for _ in range(2):
        events = list(gemmule.generate(model, tokenizer, "Once upon a time", max_new_tokens=6, seed=1))
        assert [event.finish for event in events] == [None] * 5 + ["length"]
        text = "".join(event.text for event in events)
        assert text == tokenizer.decode([event.token for event in events])


def test_a_name_that_is_not_there_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'gemmule' has no attribute 'lode'"):
        gemmule.lode  # noqa: B018


def test_a_run_that_is_being_trained_can_be_opened(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    newest, before = checkpoints(run)
    next_one = newest.rename(tmp_path / newest.name)
    verify = checkpoint.verify_checkpoint

    def verify_and_lose(folder: Path, data: str | None, weights_only: bool) -> object:
        position = verify(folder, data, weights_only)
        if folder == before:  # the next one is written and this one removed, before it is opened
            next_one.rename(newest)
            shutil.rmtree(before)
        return position

    monkeypatch.setattr(checkpoint, "verify_checkpoint", verify_and_lose)
    assert load_with_path(run)[2] == newest


def test_opening_a_run_reads_no_optimizer_state(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    newest = checkpoints(run)[0]
    (newest / "optimizer.safetensors").unlink()
    assert load_with_path(run)[2] == newest


def test_a_damaged_checkpoint_of_a_run_that_stands_still_is_explained(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for folder in checkpoints(run):
        (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"a run without a good checkpoint yet; .*damaged.*; .*damaged"):
        gemmule.load(run)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("loop", "Too many levels of symbolic links"), ("a\0b", "null character")],
)
def test_a_name_that_cannot_be_looked_at_is_explained(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelError, match=reason):
        gemmule.load(tmp_path / name)


def test_a_closed_folder_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def refuse(self: Path, **options: bool) -> object:
        if self.parent == tmp_path / "closed":
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **options)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(ModelError, match=r"closed/recipe\.toml: cannot be read: Permission denied"):
        gemmule.load(tmp_path / "closed")


def test_a_folder_of_runs_names_them(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("over", "story"):
        (tmp_path / name).symlink_to(tiny_run)
    (tmp_path / "small.gguf").touch()
    with pytest.raises(
        ModelError,
        match=f"is not a model but a folder of models: over, story, small.gguf; name one, such as {tmp_path}/over",
    ):
        gemmule.load(tmp_path)


def test_every_data_file_is_in_the_wheel() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    package = ROOT / "src" / "gemmule"
    shipped = {
        file for pattern in config["tool"]["setuptools"]["package-data"]["gemmule"] for file in package.glob(pattern)
    }
    data = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert data == shipped
