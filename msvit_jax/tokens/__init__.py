"""Token operations with static shapes: pure array functions without parameters."""
