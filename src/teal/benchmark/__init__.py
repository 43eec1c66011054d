"""Measures speed, always beside dense, in one process, and only of what was found correct."""
