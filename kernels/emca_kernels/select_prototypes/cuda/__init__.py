"""Prototype selection on Hopper by TMA and wgmma: an arm of comparisons, served when asked for."""
