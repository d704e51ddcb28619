"""The numbers of a run: summaries, intervals, paired tests, the ensemble of attacks. Nothing is rendered here."""
