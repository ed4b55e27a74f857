"""Numbers: `pytest bench --benchmark-only` measures, `python -m bench.report` tells."""
