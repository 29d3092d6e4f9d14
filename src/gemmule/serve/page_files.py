"""The page of the server: its files, read once, and the headers that they are sent with."""

from functools import cache
from importlib import resources

from starlette.responses import Response

PAGE = "index.html"
# Nothing from elsewhere, no inline script or style, in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# The colors, text and controls of all our pages, by the names that they are served under.
_SHARED_STYLES = {"base.css": "page.css", "controls.css": "controls.css"}


@cache
def page_files() -> dict[str, bytes]:
    """Return the files of the page by name."""
    package = resources.files("gemmule")
    found = {each.name: each for each in package.joinpath("serve/page").iterdir() if _kind(each.name)}
    found |= {name: package.joinpath("report/static", shared) for name, shared in _SHARED_STYLES.items()}
    return {name: file.read_bytes() for name, file in found.items()}


def page_paths() -> frozenset[str]:
    """Return the paths at which the page and its files are served."""
    return frozenset({"/", *(f"/page/{name}" for name in page_files())})


def page_response(name: str) -> Response | None:
    """Return a file of the page; None where there is none of that name."""
    content = page_files().get(name)
    if content is None:
        return None
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
    return Response(content, headers=headers, media_type=_kind(name))


def _kind(name: str) -> str | None:
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)
