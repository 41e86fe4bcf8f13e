"""ADELE: masks are corrected class by class, when the network begins to memorise their errors."""
