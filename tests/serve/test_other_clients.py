"""Clients of others, unchanged: LangChain, the llm command, curl, lm-evaluation-harness."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serving

from gemmule.evaluate.lm_eval.model import register
from sentences import SENTENCES

README = Path(__file__).parents[2] / "README.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def langchain() -> Any:
    return pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")


def test_langchain_completes_streams_and_batches(server: Served, langchain: Any) -> None:
    model = langchain.OpenAI(base_url=server.url, api_key="none", model="tiny", max_tokens=9, seed=1, max_retries=0)
    text = model.invoke("Mia found")
    assert text == server.complete(prompt="Mia found", max_tokens=9, seed=1, temperature=0.7).json["choices"][0]["text"]
    assert "".join(model.stream("Mia found")) == text
    assert model.batch(["Mia found", "Tom"])[0] == text


def test_langchain_chats_streams_and_batches(server: Served, langchain: Any) -> None:
    model = langchain.ChatOpenAI(base_url=server.url, api_key="none", model="tiny", max_tokens=9, seed=1, max_retries=0)
    reply = model.invoke([("system", "Be kind."), ("user", "Who are you?")])
    assert reply.usage_metadata["output_tokens"] > 0
    streamed = "".join(chunk.content for chunk in model.stream([("system", "Be kind."), ("user", "Who are you?")]))
    assert streamed == reply.content
    batch = model.batch(["Who are you?", "Why?"])
    assert len(batch) == 2
    again = model.invoke([("user", "Who are you?"), reply, ("user", "Why?")])
    assert isinstance(again.content, str)


def test_the_llm_command_asks_and_continues(server: Served, tmp_path: Path) -> None:
    pytest.importorskip("llm", reason="llm is not installed")
    models = [
        {"model_id": "tiny", "model_name": "tiny", "api_base": server.url},
        {"model_id": "tiny-text", "model_name": "tiny", "api_base": server.url, "completion": True},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models), encoding="utf-8")

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = llm("-m", "tiny", "-o", "max_tokens", "9", "-o", "seed", "1", "Who are you?")
    assert first.strip() == server.chat(max_tokens=9, seed=1).json["choices"][0]["message"]["content"].strip()
    assert llm("-m", "tiny", "--no-stream", "-o", "max_tokens", "9", "-o", "seed", "1", "Who are you?") == first
    llm("-c", "-o", "max_tokens", "9", "Why?")
    assert llm("-m", "tiny-text", "-o", "max_tokens", "9", "Mia found")


def curl_commands() -> list[str]:
    """Return the commands with curl of the README."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", README.read_text(encoding="utf-8"), re.MULTILINE)
    return [block.strip() for block in blocks if "curl " in block]


def test_the_commands_with_curl_in_the_readme_work(model_folder: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert curl_commands()
    with serving(model_folder, chat=True) as server:
        for command in curl_commands():
            here = command.replace("http://localhost:8000", server.server.address).replace('"story"', '"tiny"')
            done = subprocess.run(["bash", "-ec", here], capture_output=True, text=True, check=False, timeout=300)
            assert done.returncode == 0, done.stderr
            assert '"choices"' in done.stdout, done.stdout


@pytest.fixture(scope="module")
def harness(server: Served, model_folder: Path) -> Iterator[Any]:
    """lm-evaluation-harness' client of a server."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("tenacity", reason="lm_eval's API models are not installed: pip install 'lm_eval[api]'")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{server.url}/completions",
        model="tiny",
        tokenizer=str(model_folder),
        tokenizer_backend="huggingface",
        add_bos_token=True,
        batch_size=4,
        max_length=256,
    )


@pytest.mark.filterwarnings("default")
def test_the_harness_gets_our_own_log_likelihoods(harness: Any, model_folder: Path) -> None:
    from lm_eval.api.instance import Instance

    own = register()(str(model_folder), device="cpu")
    pairs = [(text[: len(text) // 2].rstrip(), text[len(text) // 2 :]) for text in SENTENCES[:8]]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (theirs, greedy), (ours, _) in zip(harness.loglikelihood(requests), own.loglikelihood(requests), strict=True):
        assert theirs == pytest.approx(ours, abs=1e-3)
        assert isinstance(greedy, bool)
