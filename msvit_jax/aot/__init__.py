"""Compiles a run's step for TPUs that are not there, and says what they would do with it."""
