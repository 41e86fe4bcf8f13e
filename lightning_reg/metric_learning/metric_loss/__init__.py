"""Losses of other libraries on a named layer, with parameters of their own."""
