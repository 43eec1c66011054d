"""Searches for the fastest tile configurations, and writes the tables that hold them."""
