"""The native CPU backend: C++ for AVX-512, AVX2 and plainer CPUs, chosen at run time (`EMCA_ISA` overrides)."""
