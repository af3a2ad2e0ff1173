"""The first instants of a process, before there is time for anything else."""
