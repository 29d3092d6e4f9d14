"""`gemmule import SOURCE --out DIR`: somebody else's Gemma 3 as a model folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gemmule.cli.screen import Screen


def import_(
    source: Annotated[
        str, typer.Argument(help="A Hugging Face folder, owner/name of the Hugging Face Hub, or a .gguf file.")
    ],
    out: Annotated[Path, typer.Option(help="The model folder to make.")],
    dtype: Annotated[
        Literal["f32", "bf16"] | None, typer.Option(help="How to store the weights.  [default: as they are]")
    ] = None,
) -> None:
    """Take the weights and the tokenizer of any Gemma 3 into a model folder.

    Of a multimodal model the text part is taken. Every tensor is used exactly once, or named in the refusal.

    Examples:

        gemmule import google/gemma-3-270m --out models/gemma-270m

        gemmule import gemma-3-270m-q4_k_m.gguf --out models/gemma-270m --dtype bf16
    """
    import torch

    from gemmule.errors import OutputError
    from gemmule.files import folder_written_aside
    from gemmule.formats.folder import save_folder
    from gemmule.formats.opening import open_model

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"--out {out}: holds something already; name a new or empty folder for the model")
    wanted = {"f32": torch.float32, "bf16": torch.bfloat16, None: None}[dtype]
    screen = Screen()
    network, tokenizer = open_model(source, screen.say, wanted)
    with folder_written_aside(out) as folder:
        save_folder(network, tokenizer, folder)
    count = sum(parameter.numel() for parameter in network.parameters())
    stored = str(network.embedding.weight.dtype).removeprefix("torch.")
    layers = network.config.num_hidden_layers
    screen.say(
        f"{out}: {count:,} parameters in {layers} layers, stored as {stored}; tokenizer with {tokenizer.vocab_size:,} "
        f"ids; use it by  gemmule generate {out}"
    )
