"""Datasets: raw text to token shards to batches; only `gemmule.data.batches` imports torch."""
