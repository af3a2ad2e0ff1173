"""Where weights go: the memory of a device, as arena segments."""
