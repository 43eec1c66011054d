"""Decoder weights, fused and channel-major: where they come from and how they are held."""
