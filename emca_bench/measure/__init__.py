"""Instruments: multiply-adds, latency, memory, accuracy of a cell, and the worker process that applies them."""
