"""Fetching from the Hub: what the library is asked for, and what each of its refusals is called here."""

import errno
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gemmule.errors import MissingExtra, ModelError, OutputError, UserError
from gemmule.formats.hub import FILES, fetch

huggingface_hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
NAME = "google/gemma-3-270m"


def answer(monkeypatch: pytest.MonkeyPatch, result: str | BaseException) -> list[tuple[str, dict[str, Any]]]:
    """Let the library answer so; return what it was asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def refusal(kind: str) -> Exception:
    """Make one of the library's errors as it makes them: from an answer of the server, which has many lines."""
    error: Exception = getattr(huggingface_hub.errors, kind).__new__(getattr(huggingface_hub.errors, kind))
    error.args = (f"401 Client Error. (Request ID: Root=1-x;y)\n\n{kind} for url https://huggingface.co/api/models/x.",)
    return error


def test_what_a_model_folder_needs_is_fetched_and_nothing_else(
    messages: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = answer(monkeypatch, str(tmp_path))
    assert fetch(NAME) == tmp_path
    assert asked == [(NAME, {"allow_patterns": FILES})]
    assert messages == [f"downloading {NAME} from the Hugging Face Hub (cached files are reused)"]
    kept = huggingface_hub.utils.filter_repo_objects(
        [
            "README.md", "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
            "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.json",
            "tokenizer.model", "tokenizer_config.json", "original/model.pth", "training_args.bin",
        ],
        allow_patterns=FILES,
    )  # fmt: skip
    assert list(kept) == [
        "README.md", "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "GatedRepoError",
            f"its license must be accepted first: open https://huggingface.co/{NAME}, accept it, then run  hf auth",
        ),
        ("RepositoryNotFoundError", "no such folder, and no such model on the Hugging Face Hub; check the name"),
        ("HFValidationError", "no such folder, and no such model on the Hugging Face Hub; check the name"),
        ("LocalEntryNotFoundError", "it cannot be downloaded from the Hugging Face Hub (401 Client Error."),
        ("HfHubHTTPError", "it cannot be downloaded from the Hugging Face Hub (401 Client Error."),
    ],
)
def test_a_refusal_says_in_one_sentence_what_to_do(monkeypatch: pytest.MonkeyPatch, kind: str, words: str) -> None:
    answer(monkeypatch, refusal(kind))
    with pytest.raises(ModelError, match=re.escape(f"{NAME}: ") + ".*" + re.escape(words)) as refused:
        fetch(NAME)
    assert "\n" not in str(refused.value)


class TransportError(Exception):
    """Of a family that the library does not name."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Name or service not known"), "Name or service not known"),
        (TimeoutError(), "TimeoutError"),
        (TransportError("peer closed connection\nwithout a word"), "peer closed connection"),
    ],
)
def test_a_network_that_fails_keeps_what_has_arrived(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    answer(monkeypatch, error)
    with pytest.raises(ModelError, match=rf"\({reason}\); try again, the download resumes$"):
        fetch(NAME)


def test_a_full_disk_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OutputError, match="no space left on the device"):
        fetch(NAME)


def test_ctrl_c_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME)


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'gemmule[hub]'")) as refused:
        fetch(NAME)
    assert isinstance(refused.value, UserError)
