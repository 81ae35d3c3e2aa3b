"""`python -m emca_bench`."""

from emca_bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
