"""Modulated deformable convolution, the core of PEM's pixel decoder."""
