"""Shared basics: user errors, artifacts on disk, identity of models, provenance of texts."""
