"""What this machine is like, as far as a start depends on it: devices, cores, memory, disks."""
