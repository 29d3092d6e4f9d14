"""Where is a model surprised? Prints a text token by token, each with the bits that the model needed for it.

python examples/surprise.py runs/story "Once upon a time, there was a clever badger named Yuki."
"""

import math
import sys

import torch

import gemmule

if len(sys.argv) != 3:
    sys.exit("usage: python examples/surprise.py MODEL TEXT")
model, tokenizer = gemmule.load(sys.argv[1])
ids = tokenizer.encode(sys.argv[2])
with torch.inference_mode():
    chances = model(torch.tensor([ids]))[0].log_softmax(dim=-1)  # (T, V)
for place, token in enumerate(ids[1:]):
    bits = -chances[place, token].item() / math.log(2)
    print(f"{bits:6.2f}  {'#' * round(4 * bits):48.48}  {tokenizer.decode([token])!r}")
