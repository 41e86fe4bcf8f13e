"""AdaWAC: per-sample weights between the supervised loss and the consistency of two views."""
