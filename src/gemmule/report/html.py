"""HTML pages of one file: templates that escape, style and scripts inside the page, and a policy that loads nothing."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

# Says that a file is one of our pages, which a newer one may replace.
GENERATOR = "gemmule"


def render_page(
    template: str,
    title: str,
    *,
    styles: Sequence[str] = ("page.css",),
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    live: bool = False,
    **content: Any,
) -> str:
    """Return a page as one HTML string that makes no request, from a template that extends `base.html`.

    Every string in `content` is escaped; the policy refuses `style` attributes, so use classes. `styles` and `scripts`
    are names in `static/`, inlined in this order; `data` is what scripts read by
    `JSON.parse(document.getElementById(key).textContent)`. A `live` page may ask the server it came from for more.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("gemmule.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    style, script = _joined(styles), [static(name) for name in scripts]
    policy = security_policy([style], script, live)
    page = environment.get_template(template).render(
        title=title,
        generator=GENERATOR,
        policy=policy,
        style=Markup(style),
        scripts=[Markup(text) for text in script],
        data={key: embedded_json(value) for key, value in (data or {}).items()},
        live=live,
        **content,
    )
    return page.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")  # lone surrogates are no text


def static(name: str) -> str:
    """Return the text of a file in `static/`."""
    return (files("gemmule.report") / "static" / name).read_text(encoding="utf-8").strip()


def security_policy(styles: Sequence[str], scripts: Sequence[str], live: bool = False) -> str:
    """Return the Content-Security-Policy under which nothing runs but these texts, and nothing is loaded."""
    allowed = {
        "default-src": "'none'",
        "style-src": _sources(styles),
        "script-src": _sources(scripts),
        "img-src": "data:",
        "connect-src": "'self'" if live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{key} {value}" for key, value in allowed.items())


def embedded_json(value: Any) -> "Markup":
    """Return JSON that no parser of HTML takes for markup; NaN and infinity become null."""
    from markupsafe import Markup

    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def finite(value: Any) -> Any:
    """Return a value of JSON in which NaN and infinity are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def _joined(names: Sequence[str]) -> str:
    return "\n".join(static(name) for name in names)


def _sources(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
