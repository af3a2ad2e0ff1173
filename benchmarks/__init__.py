"""Cold-start benchmarks: ratios measured in one run, with the physical limit beside them."""
