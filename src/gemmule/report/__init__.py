"""Reports from metrics: loss curves and TensorBoard events."""
