"""Entries of a leaderboard, and how they are verified."""
