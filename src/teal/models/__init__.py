"""Where the projections of a model are, and how a model is opened."""
