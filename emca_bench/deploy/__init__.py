"""A trained model as it is used: the same outputs, faster, and in the formats that other runtimes read."""

from emca_bench.deploy.optimized import optimize

__all__ = ["optimize"]
