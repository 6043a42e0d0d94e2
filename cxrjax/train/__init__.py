"""Training: losses, optimiser, state, step, loop, checkpoints."""
