"""The numbers of a run: summaries, intervals, paired tests, which images are recovered, whether a file is complete.

Nothing is rendered here.
"""
