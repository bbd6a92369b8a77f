"""What the engine needs of the machine: the memory, files and properties of other tasks, and receive regions."""
