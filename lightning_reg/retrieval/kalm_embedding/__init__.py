"""KaLM-Embedding: queries whose document is badly ranked count more."""
