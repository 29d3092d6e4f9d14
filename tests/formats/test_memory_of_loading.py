"""Opening and importing a model takes the memory of the result and of about one tensor, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gemmule.formats.config_json import write_config, write_json
from gemmule.formats.folder import load_folder
from gemmule.formats.gguf import save_gguf
from gemmule.formats.names import tensor_name_pairs
from gemmule.formats.safetensors_reader import INDEX, WEIGHTS
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which Linux has"),
]
MIB = 1 << 20
# Everything is loaded and has been used once before memory is measured, on another folder.
PROGRAM = """
import sys
from pathlib import Path
import torch
from gemmule.formats.folder import save_folder
from gemmule.formats.opening import open_model
from gemmule.processes import peak_memory, resident_memory

def take(source):
    out = Path(source + "-again")
    out.mkdir()
    dtype = getattr(torch, sys.argv[3]) if len(sys.argv) > 3 else None
    model, tokenizer = open_model(source, dtype=dtype)
    for parameter in model.parameters():
        parameter.sum()  # every page of it is there
    save_folder(model, tokenizer, out)
    return sum(parameter.nbytes for parameter in model.parameters())

small, large, *_ = sys.argv[1:]
take(small)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = resident_memory()
result = take(large)
print(result, peak_memory() - before)
"""


def write_model(folder: Path, tokenizer: Tokenizer, width: int, dtype: torch.dtype, shards: int) -> int:
    """Write a model of any size; return the bytes of its largest tensor."""
    config = Gemma3Config(
        vocab_size=8 * width, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=7, sliding_window=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 2, sliding_window_pattern=3,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Gemma3(config).state_dict().items()}
    tensors = {theirs: torch.ones(shapes[ours], dtype=dtype) for ours, theirs in tensor_name_pairs(7, tied=True)}
    folder.mkdir()
    write_json(folder / "config.json", write_config(config, tokenizer))
    tokenizer.save(folder)
    if shards == 1:
        save_file(tensors, folder / WEIGHTS)
    else:
        placed = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
        for file in set(placed.values()):
            save_file({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
        write_json(folder / INDEX, {"weight_map": placed})
    return max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("stored", "wanted", "shards"),
    [
        (torch.float32, None, 1),
        (torch.float32, None, 4),
        (torch.float16, None, 1),
        (torch.float16, None, 4),
        (torch.bfloat16, "float32", 1),
        (torch.float32, "bfloat16", 4),
    ],
)
def test_opening_and_saving_takes_the_result_and_about_a_tensor(
    tiny_tokenizer: Tokenizer, tmp_path: Path, stored: torch.dtype, wanted: str | None, shards: int
) -> None:
    write_model(tmp_path / "small", tiny_tokenizer, 64, stored, shards)
    largest = write_model(tmp_path / "large", tiny_tokenizer, 768, stored, shards)
    check_memory(tmp_path / "small", tmp_path / "large", wanted, largest)


@pytest.mark.parametrize("stored", ["f32", "q8_0"])
def test_opening_a_gguf_file_takes_the_result_and_about_a_tensor(
    tiny_tokenizer: Tokenizer, tmp_path: Path, stored: str
) -> None:
    pytest.importorskip("gguf", reason="the gguf library is not installed")
    for name, width in (("small", 64), ("large", 768)):
        largest = write_model(tmp_path / name, tiny_tokenizer, width, torch.float32, 1)
        # The rows beyond the tokenizer's ids are left out; what remains is most of the model.
        save_gguf(*load_folder(tmp_path / name), tmp_path / f"{name}.gguf", stored)
    check_memory(tmp_path / "small.gguf", tmp_path / "large.gguf", None, largest)


def check_memory(small: Path, large: Path, wanted: str | None, largest: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(small), str(large), *filter(None, [wanted])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result, taken = map(int, done.stdout.split())
    assert result > 100 * MIB
    assert taken <= result + 1.25 * largest + 8 * MIB, f"{taken / MIB:.0f} MiB for a result of {result / MIB:.0f} MiB"
