"""CutMix and mixup: samples made of two, with labels to match."""
