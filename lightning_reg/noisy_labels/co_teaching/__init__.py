"""Co-teaching: each of two networks is taught the samples of small loss that the other one picks."""
