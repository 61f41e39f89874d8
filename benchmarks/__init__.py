"""Side-by-side measurements, one module a capability; see scripts/benchmark.py."""
