"""Damaged model folders: each ends in one sentence, or in the weights that were saved; never in anything else.

The one thing that is not noticed is a changed bit of a weight, which nothing in the file could tell.
"""

import copy
import json
import random
import resource
import shutil
import signal
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmule.errors import UserError
from gemmule.formats.folder import save_folder
from gemmule.formats.opening import open_model
from gemmule.formats.safetensors_reader import INDEX, WEIGHTS
from gemmule.tokenizer import Tokenizer
from tiny import lively_model, tiny_config

pytestmark = pytest.mark.slow

SECONDS, BYTES = 10, 1 << 30  # what opening one tiny folder may take at most
MODEL = lively_model(tiny_config(vocab_size=380))
WEIGHTS_SAVED = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}

# As JSON, for there are numbers and depths that Python does not write.
VALUES = [
    "null", "true", "0", "-1", "1", "3", "0.5", "-0.0", "1e999", "NaN", "-Infinity", "1e-320", str(2**31), str(2**64),
    "1" + "0" * 400, "1" + "0" * 5000, '""', '"x"', '"\\ud800"', '"\\n"', '"\\u0000"', '"' + "x" * 100_000 + '"',
    "[]", "[1]", "{}", '{"a": 1}', "[" * 5000 + "]" * 5000, "[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000,
]  # fmt: skip
MARK = "a value to be replaced"


class Case(NamedTuple):
    """A damaged file."""

    name: str
    what: str
    content: bytes


@pytest.fixture(scope="module")
def whole(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    save_folder(MODEL, tiny_tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in shards."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("sharded") / "model")
    tensors = load_file(folder / WEIGHTS)
    placed = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({name: tensors[name].clone() for name in placed if placed[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / WEIGHTS).unlink()
    return folder


def flip(draw: random.Random, data: bytearray) -> None:
    for _ in range(draw.choice([1, 1, 2, 20])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def truncate(draw: random.Random, data: bytearray) -> None:
    del data[draw.randrange(len(data)) :]


def swap(draw: random.Random, data: bytearray) -> None:
    one, other = draw.randrange(len(data)), draw.randrange(len(data))
    data[one], data[other] = data[other], data[one]


def zero(draw: random.Random, data: bytearray) -> None:
    start = draw.randrange(len(data))
    part = data[start : start + draw.randrange(1, 4096)]
    data[start : start + len(part)] = bytes(len(part))


def repeat(draw: random.Random, data: bytearray) -> None:
    start = draw.randrange(len(data))
    data[start:start] = data[start : start + draw.randrange(1, 64)]


def corrupt(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """Do one of the things that disks and networks do to bytes."""
    damaged, damage = bytearray(data), draw.choice([flip, flip, truncate, swap, zero, repeat])
    damage(draw, damaged)
    return damage.__name__, bytes(damaged)


def corruptions(folder: Path, name: str, count: int) -> Iterator[Case]:
    """Yield so many seeded corruptions of a file, and the empty file; half of those of weights are in the header."""
    content = (folder / name).read_bytes()
    size = int.from_bytes(content[:8], "little") + 8 if name.endswith(".safetensors") else len(content)
    for seed in range(count):
        spared = content[size:] if seed % 2 else b""
        what, damaged = corrupt(random.Random(f"{name} {seed}"), content.removesuffix(spared) if spared else content)
        yield Case(name, f"{what} {seed}", damaged + spared)
    yield Case(name, "empty", b"")


def places(value: Any, depth: int) -> Iterator[tuple[str | int, ...]]:
    """Yield where the values of a JSON document are: of long lists and objects the first and the last."""
    yield ()
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in (items if len(items) <= 40 else [*items[:2], items[-1]]) if depth else ():
        yield from ((key, *place) for place in places(inner, depth - 1))


def replacements(folder: Path, name: str, depth: int, values: Iterable[str]) -> Iterator[Case]:
    """Yield a JSON file with each of its values in turn removed, and replaced by each of some others."""
    document = json.loads((folder / name).read_text(encoding="utf-8"))
    for place in places(document, depth):
        if not place:
            yield from (Case(name, f"all is {value:.20}", value.encode()) for value in values)
            continue
        damaged = copy.deepcopy(document)
        owner = damaged
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = MARK
        text = json.dumps(damaged)
        for value in values:
            yield Case(name, f"{place} is {value:.20}", text.replace(f'"{MARK}"', value).encode())
        del owner[place[-1]]
        yield Case(name, f"no {place}", json.dumps(damaged).encode())


@contextmanager
def limits() -> Iterator[None]:
    """End whatever takes long or much memory."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {SECONDS} seconds")

    memory = Path("/proc/self/statm")
    bounds = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, end)
    if memory.exists():  # elsewhere only the time is bounded
        taken = int(memory.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, bounds[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, bounds)


def use(folder: Path) -> dict[str, torch.Tensor]:
    """Open a folder, use all of its tokenizer, and return the weights."""
    model, tokenizer = open_model(folder)
    ids = tokenizer.encode("Once upon a time, <bos> 7\u00e9\n", specials=True)
    decoder = tokenizer.stream_decoder()
    text = "".join(map(decoder.feed, ids)) + decoder.end()
    assert isinstance(text + tokenizer.decode(ids), str)
    tokenizer.token_bytes()
    tokenizer.fingerprint  # noqa: B018 - it is computed when it is asked for
    if tokenizer.eos_id is not None:
        tokenizer.encode_documents(["Mia"])
    saved = folder / "again"
    saved.mkdir(exist_ok=True)
    save_folder(model, tokenizer, saved)
    return model.state_dict()


def verdict(folder: Path, case: Case, content: bytes) -> str | None:
    """Say how opening a damaged folder ended when it ended badly."""
    try:
        with limits():
            state = use(folder)
    except UserError as error:
        sentence = str(error)
        if "\n" in sentence or len(sentence) > 1000:
            return f"not one sentence: {sentence[:200]!r}"
        return None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the panics of a library in Rust are no Exception
        return f"{type(error).__name__}: {error!s:.200}"
    header = int.from_bytes(content[:8], "little") + 8
    if case.name.endswith(".safetensors") and case.content[:header] == content[:header]:
        return None if len(case.content) == len(content) else "weights of another length were taken"
    same = state.keys() == WEIGHTS_SAVED.keys() and all(torch.equal(state[k], v) for k, v in WEIGHTS_SAVED.items())
    return None if same else "other weights were taken"


def assert_none_ends_badly(folder: Path, cases: Iterable[Case], at_least: int, tmp_path: Path) -> None:
    spoiled = shutil.copytree(folder, tmp_path / "spoiled")
    count, bad = 0, []
    for case in cases:
        content = (folder / case.name).read_bytes()
        (spoiled / case.name).write_bytes(case.content)
        if (ending := verdict(spoiled, case, content)) is not None:
            bad.append(f"{case.name}, {case.what}: {ending}")
        (spoiled / case.name).write_bytes(content)
        count += 1
    assert bad == []
    assert count >= at_least


def test_the_folders_open_before_they_are_damaged(whole: Path, sharded: Path) -> None:
    for folder in (whole, sharded):
        state = use(folder)
        assert all(torch.equal(state[name], tensor) for name, tensor in WEIGHTS_SAVED.items())


def test_damaged_weights(whole: Path, tmp_path: Path) -> None:
    assert_none_ends_badly(whole, corruptions(whole, WEIGHTS, 240), 241, tmp_path)


def test_headers_of_weights_that_lie(whole: Path, tmp_path: Path) -> None:
    content = (whole / WEIGHTS).read_bytes()
    end = int.from_bytes(content[:8], "little") + 8
    header, payload = json.loads(content[8:end]), content[end:]
    name = "model.norm.weight"

    def lies() -> Iterator[Case]:
        for size in (0, 1, end - 9, len(content), 1 << 40, 1 << 63, (1 << 64) - 1):
            yield Case(WEIGHTS, f"header of {size} bytes", size.to_bytes(8, "little") + content[8:])
        entries: list[object] = [
            {"shape": [1 << 40]}, {"shape": [-1]}, {"shape": [1 << 63, 2]}, {"shape": [1 << 32, 1 << 32]},
            {"shape": []}, {"shape": 24}, {"shape": [24.0]}, {"shape": [3, 8]}, {"shape": [0]},
            {"dtype": "F64"}, {"dtype": "I32"}, {"dtype": "X"}, {"dtype": 1},
            {"data_offsets": [0, 96]}, {"data_offsets": [96, 0]}, {"data_offsets": []}, {"data_offsets": None},
            {"data_offsets": [0, 1 << 60]}, {"data_offsets": [-96, 0]}, None, [], "x",
        ]  # fmt: skip
        for entry in entries:
            changed = header[name] | entry if isinstance(entry, dict) else entry
            text = json.dumps(header | {name: changed}).encode()
            yield Case(WEIGHTS, str(entry), len(text).to_bytes(8, "little") + text + payload)
        for text in (b"{}", b"[]", b"null", b"", b"{" * 100_000, b'{"a":' * 100_000, b"\xff" * 9):
            yield Case(WEIGHTS, repr(text[:9]), len(text).to_bytes(8, "little") + text + payload)

    assert_none_ends_badly(whole, lies(), 36, tmp_path)


def test_damaged_config(whole: Path, tmp_path: Path) -> None:
    cases = [*corruptions(whole, "config.json", 150), *replacements(whole, "config.json", 3, VALUES)]
    assert_none_ends_badly(whole, cases, 1000, tmp_path)


def test_damaged_tokenizer(whole: Path, tmp_path: Path) -> None:
    few = ["null", "0", "-1", str(2**31), str(2**32 - 1), "1e999", '"x"', '"\\n"', f'"{"x" * 100_000}"', "[]", "{}"]
    cases = [*corruptions(whole, "tokenizer.json", 150), *replacements(whole, "tokenizer.json", 5, few)]
    assert_none_ends_badly(whole, cases, 600, tmp_path)


def test_damaged_names_of_special_tokens(whole: Path, tmp_path: Path) -> None:
    cases = [*corruptions(whole, "tokenizer_config.json", 80), *replacements(whole, "tokenizer_config.json", 2, VALUES)]
    assert_none_ends_badly(whole, cases, 300, tmp_path)


def test_damaged_index_and_shards(sharded: Path, tmp_path: Path) -> None:
    few = ["null", "0", '"x"', '"../model-0.safetensors"', '"model-1.safetensors"', '"\\ud800"', "[]", "{}", "[" * 9999]
    cases = [*corruptions(sharded, INDEX, 100), *replacements(sharded, INDEX, 2, few)]
    for shard in ("model-0.safetensors", "model-1.safetensors"):
        cases += corruptions(sharded, shard, 60)
    assert_none_ends_badly(sharded, cases, 240, tmp_path)


def gguf_text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def gguf_key(name: str, kind: int, value: bytes) -> bytes:
    return gguf_text(name) + struct.pack("<I", kind) + value


def lying_headers() -> Iterator[tuple[str, bytes]]:
    """Yield headers whose every size, count, type and offset may be anything, before 200 bytes of zeros."""
    uint32, text, array, uint64 = 4, 8, 9, 10
    sizes = [0, 1, 200, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
    keys = [gguf_key("general.architecture", text, gguf_text("gemma3"))]
    start, end = b"GGUF" + struct.pack("<I", 3), bytes(200)
    for size in sizes:
        number = struct.pack("<Q", size)
        yield f"{size} tensors", start + number + struct.pack("<Q", 1) + keys[0] + end
        yield f"{size} keys", start + bytes(8) + number + keys[0] + end
        one = start + struct.pack("<QQ", 0, 1)
        yield f"a name of {size} bytes", one + number + b"general.name" + end
        yield f"a text of {size} bytes", one + gguf_text("x") + struct.pack("<I", text) + number + end
        for element in range(14):
            header = struct.pack("<II", array, element)
            yield f"an array of {size} of type {element}", one + gguf_text("x") + header + number + end
        for key in ("general.alignment", "split.count", "gemma3.block_count", "gemma3.attention.key_length"):
            yield f"{key} = {size}", start + struct.pack("<QQ", 0, 2) + keys[0] + gguf_key(key, uint64, number) + end
        for kind in (0, 1, 2, 8, 12, 16, 24, 30, 39, 1000):
            place = struct.pack("<I", 2) + struct.pack("<QQ", size, 256) + struct.pack("<I", kind)
            tensor = gguf_text("token_embd.weight") + place + struct.pack("<Q", size)
            yield f"a tensor of {size} rows of type {kind}", start + struct.pack("<QQ", 1, 0) + tensor + end
        shape = struct.pack("<I", size % 2**32) + struct.pack("<QQQQ", *[size] * 4)
        yield f"{size} dimensions", start + struct.pack("<QQ", 1, 0) + gguf_text("a") + shape + bytes(12) + end
    for kind in range(20):
        header = one + gguf_text("x") + struct.pack("<I", kind)
        yield f"a value of type {kind}", header + b"\xff" * 300
    yield "a name that is no text", one + gguf_text(b"\xff\xfe") + struct.pack("<I", uint32) + end


def test_headers_of_gguf_files_that_lie(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    path, count = tmp_path / "model.gguf", 0
    for what, content in lying_headers():
        path.write_bytes(content)
        with limits(), pytest.raises(UserError) as raised:
            open_model(path)
        sentence = str(raised.value)
        assert sentence.startswith(f"{path}: "), what
        assert "\n" not in sentence, what
        assert len(sentence) < 500, what
        count += 1
    assert count > 300
