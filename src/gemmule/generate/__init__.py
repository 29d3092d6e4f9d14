"""From a model to text: sampling rules and the engine."""
