"""Models on disk: the Hugging Face folder and the one table of names."""
