"""Other runtimes that coldframe runs under."""
