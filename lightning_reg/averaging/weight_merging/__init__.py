"""Weight merging: mixes of few models, by interpolation and by sums of task vectors."""
