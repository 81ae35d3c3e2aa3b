"""Reports: a pure function of a run folder. Nothing here imports torch, and the same folder always gives the same bytes."""
