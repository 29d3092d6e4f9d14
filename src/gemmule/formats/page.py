"""The page: a model, its vocabulary and the engine in one HTML file, or in a folder for a web server.

Both hold step.wasm, runtime.js and a packed file in parts. The page computes in the browser; its policy forbids every
request, in a folder all but those for the parts.
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from gemmule.errors import ModelError
from gemmule.files import as_output_error, atomic_folder, atomic_write
from gemmule.formats.packed import Packed, load_packed, save_packed
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer

INDEX, README = "index.html", "README.md"
# Of a page in one file, whose text a browser holds beside the weights.
LARGEST_PAGE = 256 * 10**6
EMBEDDED_PART = 12 * 2**20  # bytes, 16 MiB in base64; divisible by 3, so that only the last part is padded
FETCHED_PART = 25 * 2**20  # the limit of some static hosts
_BYTES = {"f32": 4, "bf16": 2, "int8": 1}
_DOCTYPE = b"<!doctype html>"
_PARTS, _CERTIFICATE = "<!-- parts -->", '<script type="application/json" id="certificate">'
# Name, label, default, limits and meaning of the page's controls; the defaults are those of the commands.
_SETTINGS: tuple[tuple[str, str, str, dict[str, object], str], ...] = (
    ("max_tokens", "Tokens at most", "256", {"min": 1, "step": 1, "required": ""}, "How many tokens one press adds."),
    (
        "temperature", "Temperature", "0.7", {"min": 0, "step": "any", "required": ""},
        "0 takes the likeliest token, 1 draws as the model says, above 1 flattens.",
    ),
    ("top_k", "Top k", "0", {"min": 0, "step": 1, "required": ""}, "Draw among the k likeliest tokens; 0 keeps all."),
    (
        "top_p", "Top p", "1", {"min": 0.001, "max": 1, "step": "any", "required": ""},
        "Draw among the likeliest tokens that together reach this probability; 1 keeps all.",
    ),
    (
        "min_p", "Min p", "0.1", {"min": 0, "max": 0.999, "step": "any", "required": ""},
        "Leave out tokens less likely than this share of the likeliest one; 0 keeps all.",
    ),
    (
        "seed", "Seed", "", {"min": 0, "max": 2**53 - 1, "step": 1},
        "The same seed repeats a text, also in gemmule generate. Empty draws one.",
    ),
)  # fmt: skip
_PRIVACY = "Everything is computed in this page: it makes no request, and nothing that you write leaves it."
_SITE_PRIVACY = (
    "Everything is computed in this browser: only the model is fetched, and nothing that you write leaves it."
)
_PUBLISHING = """\
# {name}

A page that runs a Gemma 3 in the browser, made by Gemmule. It needs no server but one that hands out files: put this
folder, as it is, on any static host.

- To look at it here: `python3 -m http.server` in this folder, then open http://localhost:8000.
- GitHub Pages: put the folder into a repository, and in its settings, under Pages, choose the branch and the folder.
- Netlify, Cloudflare Pages and others: upload the folder.

`{index}` is the page, `model-*.bin` are the parts of the model, each at most 25 MiB. The page checks each part
against its SHA-256, so keep the files together.
"""


class PageContents(NamedTuple):
    """What a page holds, read from the artefact itself."""

    runtime: str
    wasm: bytes
    packed: bytes


def check_page_size(model: Gemma3, dtype: str) -> None:
    """Raise ModelError where a model is too large for a page in one file."""
    size = sum(parameter.numel() for parameter in model.parameters()) * _BYTES[dtype]
    if size > LARGEST_PAGE:
        raise ModelError(
            f"--to html: the weights have {size / 1e6:,.0f} MB in {dtype}, and a page in one file holds at most "
            f"{LARGEST_PAGE / 1e6:,.0f} MB; use --to web"
        )


def save_page(model: Gemma3, tokenizer: Tokenizer, out: Path, dtype: str, name: str, license_: str | None) -> None:
    """Write a page in one file, which opens from anywhere.

    ModelError where the model is too large, TokenizerError as `pack_vocabulary`, OutputError where nothing is written.
    """
    check_page_size(model, dtype)
    packed = out.with_name(f".{out.name}.packed")  # a fixed name: the next export replaces that of a killed one
    try:
        save_packed(model, tokenizer, packed, dtype, name)
        with as_output_error(out):
            parts = [{"bytes": len(part), "sha256": _digest(part)} for part in _parts(packed, EMBEDDED_PART)]
            before, after = _render(name, license_, parts, "'none'", _PRIVACY)
            with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.write(before)
                for number, part in enumerate(_parts(packed, EMBEDDED_PART)):
                    text = base64.b64encode(part).decode()
                    file.write(f'<script type="text/plain" id="part-{number}">{text}</script>\n')
                file.write(after)
    finally:
        packed.unlink(missing_ok=True)


def save_site(model: Gemma3, tokenizer: Tokenizer, out: Path, dtype: str, name: str, license_: str | None) -> None:
    """Write a folder for a web server: the page, the model in parts that it fetches, and how to publish them."""
    with atomic_folder(out, last=INDEX) as folder:
        packed = folder / "packed"
        save_packed(model, tokenizer, packed, dtype, name)
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(_parts(packed, FETCHED_PART)):
            digest = _digest(part)
            # With the digest in its name a part of an older model is never taken from a cache.
            file = f"model-{number:03d}-{digest[:8]}.bin"
            (folder / file).write_bytes(part)
            parts.append({"file": file, "bytes": len(part), "sha256": digest})
        packed.unlink()
        text = "".join(_render(name, license_, parts, "'self'", _SITE_PRIVACY))
        (folder / INDEX).write_text(text, encoding="utf-8", newline="\n")
        (folder / README).write_text(_PUBLISHING.format(name=name, index=INDEX), encoding="utf-8")


def is_page(path: Path) -> bool:
    """Whether a path is a page, or a folder with one."""
    file = page_file(path)
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_DOCTYPE)) == _DOCTYPE


def load_page(artefact: Path) -> Packed:
    """Read the model of a page; ModelError where it is damaged."""
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "packed"
        packed.write_bytes(read_page(artefact).packed)
        return load_packed(packed)


def page_file(artefact: Path) -> Path:
    """Return the HTML file of an export."""
    return artefact / INDEX if artefact.is_dir() else artefact


def read_page(artefact: Path) -> PageContents:
    """Cut runtime, step.wasm and packed file out of a page; ModelError where a part is missing."""
    text = page_file(artefact).read_text(encoding="utf-8")
    manifest = json.loads(_element(artefact, text, "manifest"))
    parts = []
    for number, part in enumerate(manifest["parts"]):
        if "file" in part:
            parts.append((artefact / part["file"]).read_bytes())
        else:
            parts.append(base64.b64decode(_element(artefact, text, f"part-{number}")))
    wasm = base64.b64decode(_element(artefact, text, "wasm"))
    return PageContents(_element(artefact, text, "runtime"), wasm, b"".join(parts))


def write_certificate_text(artefact: Path, certificate: str | None) -> None:
    """Put the text of a certificate into a page, which shows it; None takes it out."""
    file = page_file(artefact)
    content = file.read_text(encoding="utf-8")
    start = content.index(_CERTIFICATE) + len(_CERTIFICATE)
    end = content.index("</script>", start)
    with atomic_write(file) as temporary:
        text = content[:start] + _embedded_json(certificate) + content[end:]
        temporary.write_text(text, encoding="utf-8", newline="\n")


def page_digest(file: Path) -> str:
    """Return the SHA-256 of a page without its certificate."""
    content = file.read_bytes()
    start = content.find(_CERTIFICATE.encode())
    end = content.find(b"</script>", start)
    return _digest(content if start < 0 else content[:start] + content[end:])


def _render(
    name: str, license_: str | None, parts: list[dict[str, Any]], requests: str, privacy: str
) -> tuple[str, str]:
    """Return the page before and after its parts; `requests` is the policy's connect-src."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("gemmule.formats", "run"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    style = "\n".join(
        [_text("report/static/page.css"), _text("report/static/controls.css"), _text("formats/run/page.css")]
    )
    runtime, script = _text("formats/run/runtime.js"), _text("formats/run/page.js")
    wasm = files("gemmule").joinpath("formats/run/step.wasm").read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": f"{_source(runtime)} {_source(script)} 'wasm-unsafe-eval'",
        "style-src": _source(style),
        "worker-src": "blob:",
        "connect-src": requests,
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    manifest = {"bytes": sum(part["bytes"] for part in parts), "wasm": _digest(wasm), "parts": parts}
    page = environment.get_template("page.html").render(
        name=name,
        license=license_,
        policy="; ".join(f"{key} {value}" for key, value in policy.items()),
        style=Markup(style),
        runtime=Markup(runtime),
        script=Markup(script),
        settings=_SETTINGS,
        privacy=privacy,
        manifest=Markup(_embedded_json(manifest)),
        wasm=base64.b64encode(wasm).decode(),
    )
    page = page.encode("utf-8", "replace").decode("utf-8")  # a name may have lone surrogates, which are no text
    before, _, after = page.rpartition(_PARTS + "\n")
    return before, after


def _parts(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while part := opened.read(size):
            yield part


def _text(name: str) -> str:
    return files("gemmule").joinpath(name).read_text(encoding="utf-8").strip()


def _embedded_json(value: Any) -> str:
    """Return JSON that no parser of HTML takes for markup."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _element(artefact: Path, text: str, name: str) -> str:
    start = text.find(f' id="{name}">')
    end = text.find("</script>", start)
    if start < 0 or end < 0:
        raise ModelError(f"{artefact}: is damaged: it has no element {name}; export it again")
    return text[text.index(">", start) + 1 : end]
