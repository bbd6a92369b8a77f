"""The soak: a mixed load of real processes, faults at random, and nothing may be wrong or lost: `make soak`."""
