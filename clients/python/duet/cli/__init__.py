"""The command `duet`: one module for each of its subcommands."""
