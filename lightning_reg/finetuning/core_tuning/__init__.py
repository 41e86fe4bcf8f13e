"""Cross-entropy on mixed features and a contrast with hard pairs that are made by mixing."""
