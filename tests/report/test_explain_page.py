import base64
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from gemmule.report.explain_page import explanation_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><b>',
    "&amp;",
    "\u202eright to left \u05d0\u05d1",
    "]]>",
    "{{ 7 * 7 }}",
    "\0",
]


def explanation(texts: list[str], layers: int = 3, heads: int = 2, model: str = "tiny") -> dict[str, Any]:
    """Plain data as `gemmule.evaluate.explain.as_json` makes it: each token costs its place in bits."""
    length = len(texts)
    alternatives = [{"id": 9, "text": text, "probability": 0.5} for text in texts[:3]]
    keys = [[query, 0] for query in range(length)]
    head = {"keys": keys, "weights": [[0.64, 0.36]] * length, "on_itself": 0.75, "on_previous": 0.0}
    head |= {"on_first": 0.25, "distance": 1.0}
    return {
        "model": model,
        "text": "".join(texts[1:]),
        "tokenizer": "f",
        "parameters": 1234,
        "vocabulary": 256,
        "tokens": [
            {
                "id": place,
                "text": text,
                "bytes": len(text.encode()),
                "bits": float(place) if place else None,
                "rank": place or None,
                "alternatives": alternatives if place else [],
            }
            for place, text in enumerate(texts)
        ],
        "following": alternatives,
        "bits": 10.0,
        "bits_per_token": 2.0,
        "bits_per_byte": 0.5,
        "lens": [
            {
                "layer": layer,
                "kind": "global" if layer == 2 else "local",
                "ids": [*range(1, length), 0],
                "texts": texts,
                "probabilities": [0.5] * length,
                "bits": [4.0 - layer] * (length - 1),
            }
            for layer in range(layers)
        ],
        "attention": [
            {"layer": layer, "kind": "local", "window": 5, "heads": [head] * heads} for layer in range(layers)
        ],
        "tensors": [
            {"name": name, "shape": [1, 3], "min": -1.0, "max": 70000.0, "mean": 0.0, "rms": 1.0, "fp16_share": 1.07}
            for name in ("embedding", "blocks.0.attention.query", "norm")
        ],
    }


class Page(HTMLParser):
    """Counts tags, and keeps ids, links, attributes of scripts and the text of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]


def test_the_text_and_names_of_models_are_never_markup() -> None:
    tame, wild = (
        Page(explanation_page([explanation(["<bos>", *texts], model=texts[0])]))
        for texts in (["w"] * len(HOSTILE), HOSTILE)
    )
    assert wild.tags == tame.tags
    assert not [name for name, _ in wild.attributes if name.startswith("on") or name == "style"]
    assert HOSTILE[0] in "".join(wild.words)


def test_the_page_loads_nothing_and_every_link_leads_into_it() -> None:
    page = Page(explanation_page([explanation(["<bos>", "a", "\n", "b"])]))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for link in page.values("href"):
        assert link in ("data:,", "#main") or (link[0] == "#" and link[1:] in ids), link
    assert all(source.startswith("data:image/png;base64,") for source in page.values("src"))
    [policy] = [value for value in page.values("content") if "default-src" in value]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy


def test_each_token_has_its_color_and_its_row_without_scripts() -> None:
    text = explanation_page([explanation(["<bos>", *"abcdefghijklm"])])
    levels = re.findall(r'<a class="t b(\d)"', text)
    assert levels == ["2", "3", "3", "4", "4", "5", "5", "5", "6", "6", "6", "7", "7"], "one bit, two bits ..."
    assert len(re.findall(r'<tr id="m0-\d+">', text)) == 13
    assert 'title="c: 3.00 bits, rank 3. Expected: &lt;bos&gt; 50%, a 50%, b 50%"' in text


def test_the_lens_frames_what_follows() -> None:
    text = explanation_page([explanation(["<bos>", "a", "b"])])
    cells = re.findall(r'<td class="p\d( right)?" title="layer (\d): (\S+) ', text)
    assert cells == [(" right", str(layer), word) for word in ("&lt;bos&gt;", "a") for layer in range(3)] + [
        ("", str(layer), "b") for layer in range(3)
    ]


def test_a_head_is_a_picture_of_its_weights() -> None:
    page = explanation_page([explanation(["<bos>", "a", "b", "c"], layers=1, heads=1)])
    [picture] = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    pixels = pixels_of(base64.b64decode(picture))
    # 255 (1 - sqrt(weight)) for weights of 0.64 and 0.36.
    assert pixels.tolist() == [[51, 255, 255, 255], [102, 51, 255, 255], [102, 255, 51, 255], [102, 255, 255, 51]]


def pixels_of(png: bytes) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Decode an 8-bit grayscale PNG whose rows are not filtered, and check the sums of its chunks."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, rest = {}, png[8:]
    while rest:
        (size,) = struct.unpack(">I", rest[:4])
        kind, content, (checksum,) = rest[4:8], rest[8 : 8 + size], struct.unpack(">I", rest[8 + size : 12 + size])
        assert zlib.crc32(kind + content) == checksum
        chunks[kind], rest = content, rest[12 + size :]
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_long_texts_keep_small_pictures_with_their_largest_weights() -> None:
    page = explanation_page([explanation(["<bos>", *"ab" * 300], layers=1, heads=1)])
    [picture] = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    pixels = pixels_of(base64.b64decode(picture))
    assert max(pixels.shape) <= 96
    assert (pixels.diagonal() == 51).all()


def test_tensors_beyond_fp16_are_named() -> None:
    text = explanation_page([explanation(["<bos>", "a"])])
    assert "3 tensors of this pass exceed 65,504" in text
    assert text.count('<td class="number bad">107.0%</td>') == 6


def test_what_is_not_a_number_is_shown_all_the_same() -> None:
    data = explanation(["<bos>", "a"])
    data["tensors"][0] |= {"max": math.inf, "mean": math.nan, "fp16_share": math.inf}
    data["lens"][0]["bits"] = [math.inf]
    text = explanation_page([data])
    assert '<td class="number">inf</td><td class="number">nan</td>' in text


def comparison(same: bool, spans: list[tuple[str, float | None, float | None]]) -> dict[str, Any]:
    fields = ("text", "one_bits", "other_bits")
    listed = [dict(zip(fields, span, strict=True)) for span in spans]
    return {"same_tokenizer": same, "spans": listed, "one_bits": 10.0, "other_bits": 8.0}


def test_two_models_stand_side_by_side() -> None:
    both = [explanation(["<bos>", "a", "b"], model=name) for name in ("before", "after")]
    spans = [("<bos>", None, None), ("a", 5.0, 1.5), ("b", 2.0, 2.1), ("c", 0.1, 2.0)]
    text = explanation_page(both, comparison(True, spans))
    assert "<b>after</b> predicts it better: 10.0 bits of before, 8.0 of\nafter (-2.0 bits, -20.0%)" in text
    assert re.findall(r'<span class="t (\S+)" title', text) == ["start", "s3", "n", "f2"]
    assert text.count('class="look"') + text.count('class="screen look"') == 2
    assert "different tokenizers" not in text
    Page(text)


@pytest.mark.parametrize("spans", [[], [("a", 5.0, 1.5)]])
def test_different_tokenizers_are_said(spans: list[tuple[str, float | None, float | None]]) -> None:
    text = explanation_page([explanation(["<bos>", "a"])] * 2, comparison(False, spans))
    assert "The models have different tokenizers" in text
    assert ("only the totals are compared" in text) == (not spans)
