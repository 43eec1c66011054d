"""The definition of every mask and product, in plain PyTorch; also the fallback on any device."""
