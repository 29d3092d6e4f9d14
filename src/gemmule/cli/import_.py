"""`gemmule import SOURCE --out DIR`: convert any Gemma 3 to a model folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gemmule.cli.screen import Screen, logged_to


def import_(
    source: Annotated[
        str, typer.Argument(help="A Hugging Face folder, owner/name of the Hugging Face Hub, or a .gguf file.")
    ],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    dtype: Annotated[
        Literal["f32", "bf16"] | None, typer.Option(help="Data type of the weights.  [default: as stored in SOURCE]")
    ] = None,
) -> None:
    """Import the weights and the tokenizer of any Gemma 3 into a model folder.

    Of a multimodal model, the text model is imported. Every tensor is used exactly once, or an error names it.

    Examples:

        gemmule import google/gemma-3-270m --out models/gemma-270m

        gemmule import gemma-3-270m-q4_k_m.gguf --out models/gemma-270m --dtype bf16
    """
    import torch

    from gemmule.errors import OutputError
    from gemmule.files import atomic_folder
    from gemmule.formats.exports import output_exists
    from gemmule.formats.folder import save_folder
    from gemmule.formats.model_card import license_note, read_card, write_card
    from gemmule.model.finite import refuse_nonfinite_weights
    from gemmule.reading import require_utf8
    from gemmule.train.opening import load_with_path

    require_utf8(out, lambda message: OutputError(f"--out {message}"))
    if output_exists(out):
        raise OutputError(f"--out {out}: already exists and is not empty; choose a new or empty folder")
    wanted = {"f32": torch.float32, "bf16": torch.bfloat16, None: None}[dtype]
    screen = Screen()
    with logged_to(screen):
        network, tokenizer, found = load_with_path(source, dtype=wanted)
    refuse_nonfinite_weights(network, source)
    card = read_card(found)
    if note := license_note(card, source):
        screen.print(note)
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if dtype is None and found.is_file():
        screen.print(f"the weights take {size / 1e6:,.1f} MB in fp32; --dtype bf16 halves that")
    with atomic_folder(out, last="config.json") as folder:
        write_card(card, folder)
        save_folder(network, tokenizer, folder)
    count = sum(parameter.numel() for parameter in network.parameters())
    stored = str(network.embedding.weight.dtype).removeprefix("torch.")
    layers = network.config.num_hidden_layers
    screen.print(
        f"{out}: {count:,} parameters in {layers} layers, stored as {stored}, {size / 1e6:,.1f} MB; tokenizer with "
        f"{tokenizer.vocab_size:,} ids; try it:  gemmule generate {out}"
    )
