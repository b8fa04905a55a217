"""The options of the command line: one table of them for all verbs, and how it is read. Free of torch."""
