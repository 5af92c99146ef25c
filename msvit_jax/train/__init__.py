"""Training: state, optimiser, step, loop, and starting from other parameters."""
