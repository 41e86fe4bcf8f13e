"""Loki: predictions by the least expected squared distance in a metric space of labels."""
