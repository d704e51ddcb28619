"""One component of each kind, in a package of its own."""
