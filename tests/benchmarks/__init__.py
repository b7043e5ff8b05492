"""What vitkit is compared with: `python -m tests.benchmarks`."""
