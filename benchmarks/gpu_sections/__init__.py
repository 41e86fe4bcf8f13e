"""The sections of ``benchmarks/gpu.py``: each module has ``SECONDS``, its limit, and ``parts(setting)``."""
