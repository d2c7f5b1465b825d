"""The ``aprt`` command: one module a subcommand, one row each in ``COMMANDS``."""
