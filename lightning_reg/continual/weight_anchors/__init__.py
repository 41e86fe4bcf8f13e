"""Weights tied to what they were: to their start, or to the task before, each as firmly as it matters."""
