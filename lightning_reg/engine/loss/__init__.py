"""The loss: seeing the call, choosing it, taking it apart, changing it."""
