"""Decoder weights, fused and channel-major: their sources and their layout."""
