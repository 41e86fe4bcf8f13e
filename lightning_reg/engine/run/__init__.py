"""The run: the engine, its parts, and what they do around a step."""
