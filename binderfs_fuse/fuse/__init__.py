"""The FUSE side: who owns /dev/fuse, the device plane, the tree, and how it is all mounted and served."""
