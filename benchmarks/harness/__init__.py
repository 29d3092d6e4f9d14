"""Comparative benchmarks: throughput and memory of Gemmule and its peers in training, decoding, preparing, loading."""
