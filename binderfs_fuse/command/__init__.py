"""What a person types: one module for each thing that ``mount.py`` does."""
