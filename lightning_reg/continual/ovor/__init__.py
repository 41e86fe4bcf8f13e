"""OVOR: a head that is told what lies outside the data, and one prompt for all tasks."""
