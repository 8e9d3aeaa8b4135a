"""Brokers: what stands between fronts and workers. `base` says what they promise."""
