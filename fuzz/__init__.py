"""Coverage-guided garbage for the engine and for the channel: `make fuzz`, or ``python -m fuzz --help``."""
