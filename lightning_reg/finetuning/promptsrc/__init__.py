"""PromptSRC: prompts are tuned near the frozen network, in what both say of images and of names."""
