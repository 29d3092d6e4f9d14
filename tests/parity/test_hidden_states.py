"""The residual stream after each layer, and attention, beside transformers' on an exported folder."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from twin import MARKS, SHAPES, TOLERANCE, transformers

from gemmule.evaluate.explain.recording import record
from gemmule.formats.folder import save_folder
from gemmule.tokenizer import Tokenizer
from tiny import greatest_difference, lively_model, some_tokens, tiny_config

pytestmark = MARKS


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_outputs_and_attention_are_those_of_transformers(
    tiny_tokenizer: Tokenizer, tmp_path: Path, shape: str
) -> None:
    model = lively_model(tiny_config(**SHAPES[shape]))
    save_folder(model, tiny_tokenizer, tmp_path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = some_tokens(model.config, rows=1, length=23)
    weights: dict[int, Tensor] = {}
    recording = record(model, tokens[0].tolist(), weights.__setitem__)
    with torch.inference_mode():
        theirs = twin(input_ids=tokens, output_hidden_states=True, output_attentions=True)
        normed = model.norm(recording.hidden[-1])  # their last one is after the final norm
    ours = [*recording.hidden[:-1], normed]
    assert len(ours) == len(theirs.hidden_states)
    for one, other in zip(ours, theirs.hidden_states, strict=True):
        assert greatest_difference(one, other[0]) <= TOLERANCE
    for layer, attention in enumerate(theirs.attentions):
        assert greatest_difference(weights[layer], attention[0]) <= TOLERANCE
