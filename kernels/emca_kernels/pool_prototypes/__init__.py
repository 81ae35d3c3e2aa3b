"""Soft prototypes: masked softmax or masked mean of the pixel features of each query."""
