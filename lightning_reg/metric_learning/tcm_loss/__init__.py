"""Threshold-consistent margins: all classes in the same range of cosines, and how far they are from that."""
