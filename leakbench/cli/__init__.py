"""The command line: thin commands over calls of the same names."""
