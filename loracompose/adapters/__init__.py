"""Adapters as plain values: read, check, cache, write."""
