"""Techniques on weights after the optimizer step: averages in one fit, and of the files of several runs."""
