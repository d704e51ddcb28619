"""The run file: one SQLite file that holds every trial, result, image and their provenance."""
