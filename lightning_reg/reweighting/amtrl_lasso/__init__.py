"""Active multi-task representation learning: source tasks are drawn by how much of the target they explain."""
