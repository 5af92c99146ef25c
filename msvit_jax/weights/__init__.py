"""Weights of other projects: one table per format, key by key with its transformation."""
