"""Learning: loop, loss, optimizers, schedules, checkpoints."""
