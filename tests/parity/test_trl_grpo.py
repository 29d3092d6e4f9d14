"""The policy gradient beside TRL's GRPOTrainer: the same weights, ids, masks, advantages and log-probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from twin import MARKS, twin_of

from gemmule.data.batches import IGNORED, Batch
from gemmule.train.rewards import ADVANTAGE, REFERENCE, SAMPLED, PolicyGradient, RewardSettings
from tiny import lively_model, shallow_config

trl = pytest.importorskip("trl")
pytestmark = MARKS

PROMPT, REPLY, ROWS = 3, 9, 4


def tokenizer(vocab_size: int) -> Any:
    """A tokenizer for transformers, of as many words as ids."""
    import tokenizers
    import transformers

    ids = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_a_batch_has_the_loss_of_trl(temperature: float, tmp_path: Path) -> None:
    import datasets

    policy, draw = lively_model(shallow_config()), torch.Generator().manual_seed(5)
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=ROWS, num_generations=2, max_completion_length=REPLY,
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, loss_type="dapo",
        epsilon=0.1, epsilon_high=0.3, temperature=temperature, num_iterations=2,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        twin_of(policy), lambda completions, **_: [0.0] * len(completions), arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "w2 w3 w4"}] * ROWS),
        processing_class=tokenizer(shallow_config().vocab_size),
    )  # fmt: skip
    trainer.beta = 0.2  # given in the arguments, it would open a reference by its path
    ids = torch.randint(2, shallow_config().vocab_size, (ROWS, PROMPT + REPLY), generator=draw)
    mask = (torch.arange(REPLY) < torch.tensor([9, 5, 1, 7])[:, None]).long()
    with torch.no_grad():
        logs = (policy(ids[:, :-1]) / temperature).log_softmax(dim=-1)
    near = logs.gather(2, ids[:, 1:, None])[..., 0][:, PROMPT - 1 :]
    sampled, reference = (near + 0.3 * torch.randn(near.shape, generator=draw) for _ in range(2))
    advantage = torch.randn(ROWS, generator=draw)
    inputs = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.int64),
        "completion_ids": ids[:, PROMPT:], "completion_mask": mask, "advantages": advantage,
        "old_per_token_logps": sampled, "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer._compute_loss(trainer.model, inputs).item()

    targets = torch.full((ROWS, PROMPT + REPLY - 1), IGNORED)
    targets[:, PROMPT - 1 :] = ids[:, PROMPT:].where(mask.bool(), IGNORED)
    before = torch.zeros(ROWS, PROMPT - 1)
    ours = {
        ADVANTAGE: advantage,
        SAMPLED: torch.cat([before, sampled], 1),
        REFERENCE: torch.cat([before, reference], 1),
    }
    batch = Batch(ids[:, :-1], targets, None, ours)
    settings = RewardSettings(clip_low=0.1, clip_high=0.3, kl=0.2, temperature=temperature, steps_per_rollout=2)
    objective = PolicyGradient(settings, lambda _: {})
    with torch.no_grad():
        loss = objective.summed_loss(policy, batch) / objective.begin_step(batch)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 0.01
