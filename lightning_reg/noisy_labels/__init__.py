"""Techniques against wrong labels: new targets, or terms that keep the old ones from being memorised."""
