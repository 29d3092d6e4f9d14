"""A Gemma 3 learns the storybook in forty lines: what `gemmule train` does, without folders, curves and checkpoints.

python examples/train_by_hand.py [STEPS]
"""

import sys

import torch

from gemmule.inference.engine import complete
from gemmule.inference.sampling import STORYTELLING
from gemmule.model.config import Gemma3Config
from gemmule.model.gemma3 import Gemma3
from gemmule.model.init import init_weights
from gemmule.storybook import stories
from gemmule.tokenizer.training import train_tokenizer
from gemmule.train.loss import IGNORED, summed_loss
from gemmule.train.optim import Optimizers, OptimizerSettings

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
texts = [story.text for story in stories(4000, seed=1)]
tokenizer = train_tokenizer(texts, vocab_size=2048)
documents = [torch.tensor(ids) for ids in tokenizer.encode_documents(texts)]

config = Gemma3Config(
    vocab_size=tokenizer.vocab_size,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    query_pre_attn_scalar=64,
    sliding_window=128,
    sliding_window_pattern=4,  # three layers see a window, the fourth sees all
)
model = Gemma3(config)
init_weights(model, seed=0, damp_branches=True)
optimizers = Optimizers(model, OptimizerSettings(name="muon", learning_rate=0.02, adamw_learning_rate=0.005))

for step in range(steps):
    rows = [documents[(8 * step + row) % len(documents)] for row in range(8)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    tokens, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]
    loss = model(tokens, output_head=summed_loss(targets)) / (targets != IGNORED).sum()
    loss.backward()
    optimizers.clip_grad_norm(optimizers.grad_norm())
    optimizers.set_learning_rate(1 - step / steps)
    optimizers.step()
    optimizers.zero_grad()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step:4}  loss {loss.item():.3f} nats per token", flush=True)

print(*complete(model.eval(), tokenizer, ["Once upon a time"], 200, STORYTELLING, seed=0))
