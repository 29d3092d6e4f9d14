"""The page: what is written can be cut out of it again, and runtime.js does in node what Gemmule does."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gemmule.errors import ModelError
from gemmule.evaluate.certificate import difficult_strings
from gemmule.formats import page
from gemmule.formats.packed import save_packed
from gemmule.formats.page import page_digest, read_page, save_page, save_site, write_certificate_text
from gemmule.formats.wasm import build_wasm
from gemmule.inference.sampling import STORYTELLING, uniform
from gemmule.inference.text_stream import TextStream
from gemmule.tokenizer import Tokenizer
from gemmule.tokenizer.chat import CHAT_TEMPLATE, render_chat
from runs import gemmule
from tiny import lively_model, tiny_config

RUN = Path(page.__file__).with_name("run")
MODEL = lively_model(tiny_config(vocab_size=400))
MARKUP = "</script><b>a & b"


@pytest.fixture
def packed(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_packed(MODEL, tiny_tokenizer, tmp_path / "packed", "int8", "x")
    return tmp_path / "packed"


def test_the_page_holds_runtime_wasm_and_model(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "EMBEDDED_PART", 3000)
    monkeypatch.setattr(page, "FETCHED_PART", 4096)
    save_packed(MODEL, tiny_tokenizer, tmp_path / "packed", "int8", MARKUP)
    save_page(MODEL, tiny_tokenizer, tmp_path / "page.html", "int8", MARKUP, "gemma")
    save_site(MODEL, tiny_tokenizer, tmp_path / "site", "int8", MARKUP, None)
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "page.html", "site"}
    for artefact in (tmp_path / "page.html", tmp_path / "site"):
        held = read_page(artefact)
        assert held.packed == (tmp_path / "packed").read_bytes()
        assert held.wasm == (RUN / "step.wasm").read_bytes()
        assert held.runtime == (RUN / "runtime.js").read_text(encoding="utf-8").strip()
    parts = sorted((tmp_path / "site").glob("model-*.bin"))
    assert len(parts) > 2
    for part in parts:
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        assert part.stem.endswith(digest[:8])
        assert part.stat().st_size <= 4096
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("part-") > 2
    assert MARKUP not in text
    assert "&lt;/script&gt;&lt;b&gt;a &amp; b" in text
    assert "License: gemma" in text


def test_the_policy_lets_nothing_out(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_page(MODEL, tiny_tokenizer, tmp_path / "page.html", "int8", "x", None)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert found is not None
    policy = dict(rule.split(" ", 1) for rule in found[1].replace("&#39;", "'").split("; "))
    assert (policy["default-src"], policy["connect-src"], policy["worker-src"]) == ("'none'", "'none'", "blob:")
    scripts = re.findall(r"<script(?: id=\"runtime\")?>(.*?)</script>", text, re.DOTALL)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy["script-src"]
    assert len(scripts) == 2
    assert "http:" not in text
    assert "https:" not in text


def test_runtime_and_wasm_are_small() -> None:
    assert (RUN / "runtime.js").stat().st_size <= 60_000
    assert (RUN / "step.wasm").stat().st_size <= 80_000


def test_the_controls_begin_with_the_defaults_of_the_commands() -> None:
    defaults = {name: value for name, _, value, _, _ in page._SETTINGS}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        assert float(defaults[name]) == getattr(STORYTELLING, name)


def test_a_certificate_is_shown_and_is_no_part_of_the_digest(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    save_page(MODEL, tiny_tokenizer, file, "int8", "x", None)
    fresh, digest = file.read_bytes(), page_digest(file)
    write_certificate_text(file, f"passed {MARKUP}")
    assert file.read_bytes() != fresh
    assert page_digest(file) == digest
    assert "\\u003c/script>" in file.read_text(encoding="utf-8")
    write_certificate_text(file, None)
    assert file.read_bytes() == fresh


def test_a_model_too_large_for_one_file_is_refused(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "LARGEST_PAGE", 10_000)
    with pytest.raises(ModelError, match=r"--to html: the weights have .* in int8, .*; use --to web"):
        save_page(MODEL, tiny_tokenizer, tmp_path / "page.html", "int8", "x", None)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_page_is_named(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    save_page(MODEL, tiny_tokenizer, file, "int8", "x", None)
    file.write_text(file.read_text(encoding="utf-8").replace('id="part-0"', 'id="part-9"'), encoding="utf-8")
    with pytest.raises(ModelError, match=r"page.html: is damaged: it has no element part-0"):
        read_page(file)


@pytest.mark.slow
def test_the_shipped_wasm_is_made_from_the_sources(tmp_path: Path) -> None:
    pytest.importorskip("ziglang", reason="the extra program is not installed")
    build_wasm(tmp_path / "step.wasm")
    assert (tmp_path / "step.wasm").read_bytes() == (RUN / "step.wasm").read_bytes(), "make wasm"


# ---- runtime.js in node ----

JOB = """
const vm = require("vm"), fs = require("fs"), job = JSON.parse(fs.readFileSync(0, "utf8"));
vm.runInThisContext(fs.readFileSync(job.runtime, "utf8"));
const open = async () => {
  const file = fs.readFileSync(job.packed);
  const model = await vm.runInThisContext("Model").make(fs.readFileSync(job.wasm), file.length);
  model.write(0, file);
  model.open();
  return model;
};
"""


def run_in_node(script: str, packed: Path, **job: Any) -> Any:
    """Run the body of an asynchronous function, which returns what is printed as JSON."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    files = {"runtime": str(RUN / "runtime.js"), "wasm": str(RUN / "step.wasm"), "packed": str(packed)}
    body = f"vm.runInThisContext(`(async (job, open) => {{{script}}})`)(job, open)"
    code = f"{JOB}{body}.then((result) => console.log(JSON.stringify(result)));"
    ended = subprocess.run(
        [node, "-e", code], input=json.dumps(job | files), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_random_numbers_are_those_of_the_engine(packed: Path) -> None:
    cases = [(0, 0), (1, 0), (7, 255), (2**53 - 1, 1000)]
    script = "return job.cases.map(([seed, index]) => uniform(seed, index));"
    assert run_in_node(script, packed, cases=cases) == [uniform(seed, 0, index) for seed, index in cases]


def test_text_is_encoded_as_the_tokenizer_does(packed: Path, tiny_tokenizer: Tokenizer) -> None:
    strings = [*difficult_strings(200), "", "<bos>a<eos>", "<start_of_turn>user\n", "a\ufeffb", "𝕏 e\u0301", "<0x41>"]
    script = "const { vocabulary } = await open(); return job.strings.map((text) => vocabulary.prompt(text));"
    assert run_in_node(script, packed, strings=strings) == [tiny_tokenizer.encode(text) for text in strings]


def test_a_chat_is_rendered_as_by_the_template(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    tokenizer = Tokenizer(tiny_tokenizer._document, {"chat_template": CHAT_TEMPLATE})
    save_packed(MODEL, tokenizer, tmp_path / "packed", "int8", "x")
    turns = [("user", " Hi <end_of_turn>\n"), ("model", "Hello."), ("user", "\u00a0Bye\u2029")]
    script = "const { header, vocabulary } = await open(); return chatPrompt(header, vocabulary, job.turns);"
    given = [{"role": role, "text": text} for role, text in turns]
    messages = [{"role": "assistant" if role == "model" else role, "content": text} for role, text in turns]
    assert run_in_node(script, tmp_path / "packed", turns=given) == render_chat(tokenizer, messages, reply=True).ids


@pytest.mark.parametrize("stops", [[], ["ab"], ["aab", "b c"], ["a", "aa"], ["\U0001f984"], ["zz", "é"]])
def test_stop_texts_end_a_reply_as_in_the_engine(packed: Path, tiny_tokenizer: Tokenizer, stops: list[str]) -> None:
    ids = [*tiny_tokenizer.encode("aaab cab 🦄 é zy")[1:], tiny_tokenizer.encode("🦄")[1]]
    stream = TextStream(tiny_tokenizer, stops)
    expected: list[str] = []
    for token in ids:
        expected.append(stream.feed(token))
        if stream.stopped:
            break
    expected.append(stream.end())
    script = """
        const stream = new TextStream((await open()).vocabulary, job.stops), said = [];
        for (const id of job.ids) {
          said.push(stream.feed(id));
          if (stream.stopped) break;
        }
        return [...said, stream.end()];"""
    assert run_in_node(script, packed, ids=ids, stops=stops) == expected


def test_sha256_without_the_browsers_own(packed: Path) -> None:
    sizes = [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000]
    script = """
        const bytes = Uint8Array.from({ length: 1001 }, (_, i) => (i * 37) % 251);
        const hex = (digest) => Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
        return job.sizes.map((size) => hex(plainSha256(bytes.subarray(1, 1 + size))));"""
    content = bytes(i * 37 % 251 for i in range(1001))
    expected = [hashlib.sha256(content[1 : 1 + size]).hexdigest() for size in sizes]
    assert run_in_node(script, packed, sizes=sizes) == expected


GENERATE = """
    const model = await open(), replies = [];
    for (const { prompt, stopAfter, ...given } of job.asked) {
      const settings = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, seed: 1, max_tokens: 40, stop: [], ...given };
      const ids = [];
      try {
        const emit = (id) => id !== null && ids.push(id);
        const ended = await generate(model, prompt, settings, emit, () => ids.length >= (stopAfter ?? 1e9));
        replies.push({ ids, reason: ended.reason });
      } catch (error) {
        replies.push({ problem: sentence(error) });
      }
    }
    return replies;"""


def fresh_replies(packed: Path, asked: list[dict[str, Any]]) -> list[Any]:
    return [run_in_node(GENERATE, packed, asked=[one])[0] for one in asked]


def test_what_is_left_in_the_cache_changes_no_reply(packed: Path) -> None:
    """Other texts before it, a common beginning, a window that pages have left: the ring has few pages."""
    first = [2, *range(10, 50)]
    asked: list[dict[str, Any]] = [
        {"prompt": first, "max_tokens": 12},
        {"prompt": [*first[:30], 7], "max_tokens": 12},
        {"prompt": first[:3], "max_tokens": 12},
        {"prompt": [*first, 5, 6], "max_tokens": 12, "temperature": 1.5, "seed": 3},
        {"prompt": [*first, 5, 6], "max_tokens": 12, "temperature": 1.5, "seed": 3},
    ]
    replies = run_in_node(GENERATE, packed, asked=asked)
    assert replies == fresh_replies(packed, asked)
    assert replies[-1] == replies[-2]
    assert replies[-1]["ids"] != replies[0]["ids"]


def test_stop_works_within_a_token(packed: Path) -> None:
    """By the messages of a page: begin, part, open, generate; stop when the third token has come."""
    script = """
        const said = [], port = { postMessage: () => {} };
        const finished = new Promise((resolve) => {
          port.postMessage = (message) => {
            said.push(message.kind);
            if (said.filter((kind) => kind === "token").length === 3) port.onmessage({ data: { kind: "stop" } });
            if (message.kind === "end" || message.kind === "problem") resolve(message);
          };
        });
        serve(port);
        const send = (data) => port.onmessage({ data });
        const settings = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, seed: 1, max_tokens: 40, stop: [] };
        const bytes = Uint8Array.from(atob(job.packed64), (character) => character.charCodeAt(0));
        const wasm = Uint8Array.from(atob(job.wasm64), (character) => character.charCodeAt(0));
        send({ kind: "begin", wasm, bytes: bytes.length });
        send({ kind: "part", offset: 0, part: bytes.subarray(0, 999) });
        send({ kind: "part", offset: 999, part: bytes.subarray(999) });
        send({ kind: "open" });
        send({ kind: "generate", prompt: "Mia", settings });
        const ended = await finished;
        return [ended.reason, ended.tokens, said[0], said[1]];"""
    packed64, wasm64 = (base64.b64encode(file.read_bytes()).decode() for file in (packed, RUN / "step.wasm"))
    told = run_in_node(script, packed, packed64=packed64, wasm64=wasm64)
    assert told == ["stopped", 3, "hello", "ready"]


def test_replies_end_and_are_refused_for_a_reason(packed: Path) -> None:
    longest = MODEL.config.max_position_embeddings
    asked: list[dict[str, Any]] = [
        {"prompt": [2, 3], "stopAfter": 3},
        {"prompt": [2] * (longest - 2)},
        {"prompt": [2] * longest},
        {"prompt": []},
    ]
    stopped, full, long, empty = run_in_node(GENERATE, packed, asked=asked)
    assert (stopped["reason"], len(stopped["ids"])) == ("stopped", 3)
    assert (full["reason"], len(full["ids"])) == ("length", 2)
    assert long["problem"] == f"The prompt has {longest} tokens; this model reads fewer than {longest}: shorten it."
    assert empty["problem"] == "The prompt is empty: write how the text begins."


def test_weights_that_are_not_finite_are_told(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_packed(MODEL, tiny_tokenizer, tmp_path / "packed", "f32", "x")
    damage = 'const model = await open(); model.view(Float32Array, model.place("norm", 0), 24).fill(NaN); const'
    script = GENERATE.replace("const model = await open(),", damage)
    told = run_in_node(script, tmp_path / "packed", asked=[{"prompt": [2, 3]}])
    assert told == [{"problem": "The model's logits are not finite: its weights are damaged."}]


def test_page_script_has_no_end_tag_and_no_address() -> None:
    for name in ("runtime.js", "page.js"):
        text = (RUN / name).read_text(encoding="utf-8")
        assert "</script" not in text
        assert "<!--" not in text
        assert "http" not in text.replace("http.server", "").replace("plain HTTP", "")


def test_bad_input_gets_a_sentence_and_writes_nothing(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    for to, out, options, said in (
        ("html", "x.html", ["--dtype", "q8_0"], "--dtype q8_0: a page takes f32, bf16, int8"),
        ("web", "x", ["--target", "linux-x86_64"], "--target linux-x86_64: is for --to program"),
        ("html", "there.html", [], "already exists"),
    ):
        ended = gemmule("export", tiny_run, "--to", to, "--out", tmp_path / out, *options)
        assert ended.code == 2
        assert said in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]
    assert (tmp_path / "there.html").read_text() == "mine"
