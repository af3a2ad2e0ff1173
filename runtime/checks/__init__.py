"""What `coldframe doctor` looks into: each module one part of a machine."""
