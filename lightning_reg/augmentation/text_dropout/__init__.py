"""Modality dropout: whole inputs of single samples are left out, so that the others are learned from."""
