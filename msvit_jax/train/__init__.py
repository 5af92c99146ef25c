"""Training: state, optimizer, step, loop, and initialization from other parameters."""
