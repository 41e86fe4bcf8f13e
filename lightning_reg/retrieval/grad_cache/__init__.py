"""Large batches of a contrastive loss in the memory of small ones."""
