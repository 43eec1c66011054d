"""The definition of every mask, product and attention, in plain PyTorch; also the fallback."""
