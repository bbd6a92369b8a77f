"""How fast the mount is: against the floor, the real driver and itself as it grows. `python -m benchmarks --help`."""
