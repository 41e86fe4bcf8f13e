"""Loss-based sample reweighting: samples of a batch count by where their loss stands among the others."""
