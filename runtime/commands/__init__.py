"""The subcommands of `coldframe`, each with its `add_arguments` and `run`."""
