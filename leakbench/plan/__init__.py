"""What is to be run: the matrix, its suites, and the trials of which it is made."""
