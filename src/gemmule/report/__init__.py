"""From metrics to what people look at: curves and TensorBoard."""
