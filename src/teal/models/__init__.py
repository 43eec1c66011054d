"""Models: where their projections are, what their layers compute, and how they are opened."""
