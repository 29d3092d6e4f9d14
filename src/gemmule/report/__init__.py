"""Reports from metrics: loss curves."""
