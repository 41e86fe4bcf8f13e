"""The head must also classify what the encoder made of images before fine-tuning, brought to where they are now."""
