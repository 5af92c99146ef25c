"""Compiles a run's step for TPUs without having one, and reports the compiler's estimates."""
