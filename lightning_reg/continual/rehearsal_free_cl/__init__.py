"""Continual learning without old samples: outputs and features tied to those of the network of the task before."""
