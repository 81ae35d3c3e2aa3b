"""Masked similarity-argmax and top-K: which pixels stand for each query."""
