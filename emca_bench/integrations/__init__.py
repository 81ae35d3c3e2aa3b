"""Bridges to other libraries, each importable alone and only where its library is installed."""
