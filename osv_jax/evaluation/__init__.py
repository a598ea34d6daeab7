"""Scoring videos: what distance there is between a set of real ones and a set of generated ones."""
