"""KaLM-Embedding: queries whose document is badly ranked count more, and hard negatives are mixed."""
