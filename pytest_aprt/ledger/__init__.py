"""The ledger: what every falsifier's runs showed, and the status that this supports.

``record`` appends and reads, ``levels`` says what counts as which status, ``summary`` puts
contracts and records together, ``render`` shows that.
"""
