"""Low-rank fine-tuning with a row-wise adaptive gradient, and its relatives: plain, rank-stabilized."""
