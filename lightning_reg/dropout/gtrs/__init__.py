"""GTRS: scorers that depend less on their set of candidates, and labels that a teacher may bend a little."""
