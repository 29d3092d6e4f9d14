"""The one table of metrics that trackers show, and their tags there."""

# metrics.jsonl key -> tag
TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "val_floor": "loss/floor",
    "val_bits_per_byte": "bits_per_byte/validation",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
}
