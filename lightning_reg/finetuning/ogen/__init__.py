"""OGEN: features of unknown classes are synthesized, and a teacher is the mean of a window of snapshots."""
