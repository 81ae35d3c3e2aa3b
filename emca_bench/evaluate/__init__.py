"""Metrics, from first principles."""
