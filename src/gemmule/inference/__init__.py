"""From a model to text: prefill, decoding, sampling rules and the engine that streams tokens."""
