"""Preference losses beside TRL's DPOTrainer: the same weights, ids and masks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from twin import MARKS, twin_of

from gemmule.data.batches import IGNORED, Batch
from gemmule.train.preferences import REFERENCE, Preferences, PreferenceSettings
from tiny import lively_model, shallow_config

trl = pytest.importorskip("trl")
pytestmark = MARKS

WORDS: tuple[str, ...] = (
    "the",
    "cat",
    "saw",
    "a",
    "red",
    "kite",
    "and",
    "then",
    "it",
    "ran",
    "home",
    "again",
    "with",
    "joy",
)
WORDS += (".", ",", "?")
EXAMPLES = [
    {"prompt": "the cat", "chosen": " saw a red kite .", "rejected": " and and a"},
    {"prompt": "then it ran", "chosen": " home", "rejected": " again with joy , joy , joy ?"},
    {"prompt": "a", "chosen": " kite ran", "rejected": " cat ran"},
]


def tokenizer(vocab_size: int) -> Any:
    """A tokenizer of words for transformers."""
    import tokenizers
    import transformers

    words = ["<pad>", "<eos>", *WORDS]
    ids = {word: number for number, word in enumerate(words)}
    assert len(words) <= vocab_size
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize(("theirs", "ours"), [("sigmoid", "dpo"), ("ipo", "ipo")])
def test_a_batch_has_the_loss_of_trl(theirs: str, ours: str, tmp_path: Path) -> None:
    import datasets

    policy, reference = (lively_model(shallow_config(), seed=seed) for seed in (0, 1))
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), loss_type=[theirs], beta=0.3, per_device_train_batch_size=3, max_length=None,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, precompute_ref_log_probs=True,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        twin_of(policy), twin_of(reference), arguments,
        train_dataset=datasets.Dataset.from_list(EXAMPLES), processing_class=tokenizer(shallow_config().vocab_size),
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()  # without dropout
    expected = trainer.compute_loss(trainer.model, dict(inputs)).item()

    ids, mask, pairs = inputs["input_ids"], inputs["completion_mask"], len(EXAMPLES)
    rows = [row for pair in range(pairs) for row in (pair, pairs + pair)]
    targets = ids[rows, 1:].where(mask[rows, 1:].bool(), IGNORED)
    documents = torch.zeros_like(targets, dtype=torch.int32)
    side = torch.stack([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]], dim=1)

    batch = Batch(ids[rows, :-1], targets, None)
    with torch.no_grad():
        live = reference(batch.tokens).log_softmax(dim=-1)
    known = targets != IGNORED
    own = live.gather(2, targets.where(known, 0)[..., None])[..., 0].where(known, 0.0).sum(dim=1)
    torch.testing.assert_close(own.view(-1, 2), side, rtol=1e-6, atol=1e-6)

    # A pair in a row: its two replies one after the other, each seeing itself alone.
    length = targets.shape[1]
    together = Batch(
        batch.tokens.reshape(pairs, 2 * length),
        targets.reshape(pairs, 2 * length),
        torch.cat([documents[:pairs], documents[:pairs] + 1], dim=1),
        {REFERENCE: side},
    )
    objective = Preferences(PreferenceSettings(loss=ours, beta=0.3))
    with torch.no_grad():
        loss = objective.summed_loss(policy, together) / objective.begin_step(together)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
