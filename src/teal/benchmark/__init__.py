"""Measures speed, beside dense in the same process, and only of results that were checked."""
