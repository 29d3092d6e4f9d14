import shutil
from pathlib import Path

import pytest
import torch

import gemmule
from gemmule.errors import DeviceError, ModelError
from gemmule.train.checkpoint import checkpoints


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
