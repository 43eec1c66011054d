"""Searches for the fastest tile configurations, and the tables that they are written to."""
