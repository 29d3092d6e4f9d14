"""The page of `gemmule explain`: one model on a text, or two side by side, from plain data."""

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmule.report.html import render_page

Json = Mapping[str, Any]

# From so many bits on a token is of the next color; differences of two models likewise, in both directions.
_SURPRISES = (0.5, 1, 2, 4, 6, 9, 12)
_DIFFERENCES = (0.25, 1, 3)
_PROBABILITIES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
_MAP_SIZE = 96  # pixels of the picture of a head; longer texts are pooled
_LARGEST = 12  # tensors and spans that are shown first
_SHOWN = str.maketrans({" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"})


def explanation_page(explanations: Sequence[Json], comparison: Json | None = None) -> str:
    """Return the page of one explanation, or of two and their comparison, as `evaluate.explain.as_json` makes them."""
    names = [each["model"] for each in explanations]
    return render_page(
        "explain.html",
        f"{' and '.join(names)} on a text",
        styles=("page.css", "explain.css"),
        scripts=("explain.js",),
        data={"heads": [_heads_data(each) for each in explanations]},
        names=names,
        views=[_view(number, each) for number, each in enumerate(explanations)],
        comparison=None if comparison is None else _comparison_view(comparison),
        legend=_legend(_SURPRISES),
        shades=_legend(_PROBABILITIES),
    )


def _view(number: int, explanation: Json) -> dict[str, Any]:
    """Return what the template shows of one model."""
    tokens = explanation["tokens"]
    return {
        "id": f"m{number}",
        "name": explanation["model"],
        "facts": _facts(explanation),
        "tokens": [_token_view(f"m{number}", place, token) for place, token in enumerate(tokens)],
        "following": [_alternative(each) for each in explanation["following"]],
        "layers": [f"{layer['layer']}" for layer in explanation["lens"]],
        "kinds": [layer["kind"] for layer in explanation["lens"]],
        "lens": list(_lens_rows(explanation)),
        "curve": _curve(explanation),
        "attention": [_attention_view(layer, len(tokens)) for layer in explanation["attention"]],
        **_tensor_views(explanation["tensors"]),
    }


def _facts(explanation: Json) -> list[tuple[str, str]]:
    per_byte, tokens = explanation["bits_per_byte"], len(explanation["tokens"])
    return [
        ("parameters", f"{explanation['parameters']:,}"),
        ("tokens", f"{tokens:,}"),
        ("bytes", f"{len(explanation['text'].encode()):,}"),
        ("bits", f"{explanation['bits']:,.1f}"),
        ("bits per token", f"{explanation['bits_per_token']:.3f}"),
        ("bits per byte", "not known: the tokenizer changes the text" if per_byte is None else f"{per_byte:.3f}"),
    ]


def _token_view(model: str, place: int, token: Json) -> dict[str, Any]:
    text, bits, shown = token["text"], token["bits"], _shown(token["text"])
    if bits is None:
        return {"place": place, "text": text, "shown": shown, "level": None}
    alternatives = [_alternative(each) for each in token["alternatives"]]
    likeliest = ", ".join(f"{each['text']} {each['percent']}" for each in alternatives)
    return {
        "place": place,
        "id": f"{model}-{place}",
        "text": text,
        "shown": shown,
        "level": _level(bits, _SURPRISES),
        "bits": f"{bits:.2f}",
        "rank": f"{token['rank']:,}",
        "title": f"{shown}: {bits:.2f} bits, rank {token['rank']:,}. Expected: {likeliest}",
        "alternatives": [each | {"own": each["id"] == token["id"]} for each in alternatives],
    }


def _alternative(each: Json) -> dict[str, Any]:
    return {"id": each["id"], "text": _shown(each["text"]), "percent": _percent(each["probability"])}


def _lens_rows(explanation: Json) -> Iterable[dict[str, Any]]:
    """Yield a row for each place: the token there, the one that follows, and what each layer expects."""
    tokens, layers = explanation["tokens"], explanation["lens"]
    for place, token in enumerate(tokens):
        following = tokens[place + 1] if place + 1 < len(tokens) else None
        cells = []
        for layer in layers:
            text, chance = _shown(layer["texts"][place]), layer["probabilities"][place]
            cost = "" if following is None else f"; what follows costs {layer['bits'][place]:.1f} bits"
            cells.append(
                {
                    "text": text,
                    "level": _level(chance, _PROBABILITIES),
                    "right": following is not None and layer["ids"][place] == following["id"],
                    "title": f"layer {layer['layer']}: {text} {_percent(chance)}{cost}",
                }
            )
        yield {
            "place": place,
            "token": _shown(token["text"]),
            "following": "?" if following is None else _shown(following["text"]),
            "cells": cells,
        }


def _curve(explanation: Json) -> dict[str, Any]:
    """Return the drawing of the mean bits per token that the lens gives after each layer, on a logarithmic scale."""
    layers, uniform = explanation["lens"], math.log2(explanation["vocabulary"])
    means = [math.fsum(layer["bits"]) / len(layer["bits"]) for layer in layers]
    shown = [mean for mean in (*means, uniform) if math.isfinite(mean) and mean > 0]
    low, high = math.floor(math.log2(min(shown))), math.ceil(math.log2(max(shown)))

    def height(bits: float) -> float:
        share = (math.log2(bits) - low) / max(1, high - low) if bits > 0 else 0
        return round(150 - 130 * min(1, share), 1)

    points = [
        {
            "x": round(60 + 630 * layer["layer"] / max(1, len(layers) - 1), 1),
            "y": height(mean),
            "title": f"layer {layer['layer']}: {mean:.2f} bits per token",
            "layer": layer["layer"],
            "kind": layer["kind"],
        }
        for layer, mean in zip(layers, means, strict=True)
    ]
    return {
        "points": points,
        "line": " ".join(f"{each['x']},{each['y']}" for each in points),
        "ticks": [(height(2.0**power), f"{2.0**power:g}") for power in range(low, high + 1)],
        "uniform": height(uniform),
        "uniform_bits": f"{uniform:.1f}",
    }


def _attention_view(layer: Json, length: int) -> dict[str, Any]:
    window = "all tokens before" if layer["window"] is None else f"a window of {layer['window']:,} tokens"
    heads = [
        {
            "head": number,
            "picture": _picture(head, length),
            "itself": _percent(head["on_itself"]),
            "previous": _percent(head["on_previous"]),
            "first": _percent(head["on_first"]),
            "distance": f"{head['distance']:.1f}",
        }
        for number, head in enumerate(layer["heads"])
    ]
    return {"layer": layer["layer"], "kind": layer["kind"], "window": window, "heads": heads}


def _picture(head: Json, length: int) -> str:
    """Return the attention weights of a head as a picture, PNG in base64: queries down, keys across, dark for 1."""
    pool = math.ceil(length / _MAP_SIZE)
    pixels = np.zeros((math.ceil(length / pool),) * 2)
    for query, (keys, weights) in enumerate(zip(head["keys"], head["weights"], strict=True)):
        for key, weight in zip(keys, weights, strict=True):
            pixels[query // pool, key // pool] = max(pixels[query // pool, key // pool], weight)
    # The square root shows small weights, too.
    return base64.b64encode(_png((255 - 255 * np.sqrt(pixels)).round().astype(np.uint8))).decode()


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return an 8-bit grayscale picture as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def _heads_data(explanation: Json) -> list[Any]:
    """Return for layer, head and query a list of key, weight in per mille, key, weight ..."""
    return [
        [
            [
                [number for key, weight in zip(*row, strict=True) for number in (key, round(1000 * weight))]
                for row in zip(head["keys"], head["weights"], strict=True)
            ]
            for head in layer["heads"]
        ]
        for layer in explanation["attention"]
    ]


def _tensor_views(tensors: Sequence[Json]) -> dict[str, Any]:
    """Return the tensors with the largest share of fp16's range, and all of them by layer."""
    views = [
        {
            "name": tensor["name"],
            "shape": " x ".join(map(str, tensor["shape"])),
            **{key: _number(tensor[key]) for key in ("min", "max", "mean", "rms")},
            "share": _share(tensor["fp16_share"]),
            "overflows": not tensor["fp16_share"] <= 1,
        }
        for tensor in tensors
    ]
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place]["fp16_share"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for view in views:
        parts = view["name"].split(".")
        groups.setdefault(f"layer {parts[1]}" if parts[0] == "blocks" else parts[0], []).append(view)
    return {
        "largest": [views[place] for place in order[:_LARGEST]],
        "groups": groups,
        "overflows": sum(view["overflows"] for view in views),
    }


def _comparison_view(comparison: Json) -> dict[str, Any]:
    one, other = comparison["one_bits"], comparison["other_bits"]
    spans = [_span_view(span) for span in comparison["spans"]]
    compared = [span for span in spans if span["difference"] is not None]
    by_difference = sorted(compared, key=lambda span: span["difference"])
    return {
        "same": comparison["same_tokenizer"],
        "spans": spans,
        "bits": [f"{one:,.1f}", f"{other:,.1f}"],
        "difference": f"{other - one:+,.1f}",
        "percent": f"{other / one - 1:+.1%}" if one else "",
        "better": None if one == other else int(other < one),
        "first_better": [span for span in by_difference[::-1] if span["difference"] > 0][:_LARGEST],
        "second_better": [span for span in by_difference if span["difference"] < 0][:_LARGEST],
    }


def _span_view(span: Json) -> dict[str, Any]:
    one, other = span["one_bits"], span["other_bits"]
    if one is None or other is None:
        return {"text": span["text"], "difference": None, "level": None, "title": "not predicted by both"}
    difference = other - one
    side = "f" if difference > 0 else "s"
    level = _level(abs(difference), _DIFFERENCES)
    shown = _shown(span["text"])
    return {
        "text": span["text"],
        "shown": shown,
        "one": f"{one:.2f}",
        "other": f"{other:.2f}",
        "difference": difference,
        "signed": f"{difference:+.2f}",
        "level": f"{side}{level}" if level else "n",
        "title": f"{shown}: {one:.2f} and {other:.2f} bits, {difference:+.2f}",
    }


def _legend(limits: Sequence[float]) -> list[tuple[int, float]]:
    return list(enumerate((0, *limits)))


def _level(value: float, limits: Sequence[float]) -> int:
    """Return how many limits a value reaches."""
    return sum(value >= limit for limit in limits)


def _shown(text: str) -> str:
    """Return a token as one word in which spaces and line breaks are seen."""
    return text.translate(_SHOWN)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.4%}" if share >= 1e-6 else "0%"


def _number(value: float) -> str:
    size = abs(value)
    return (
        f"{value:,.0f}" if 1000 <= size < 1e9 else f"{value:.4g}" if 1e-4 <= size < 1000 or not size else f"{value:.2e}"
    )
