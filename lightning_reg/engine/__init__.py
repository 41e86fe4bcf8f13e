"""What all techniques share: rooms, each of which knows only those before it.

``host`` touches Lightning and torch; ``data`` knows batches and samples; ``step`` is one training step; ``loss`` sees
and changes the loss; ``layers`` reads and changes what named layers put out; ``weights`` puts weights in and out;
``run`` is the engine with its parts; ``technique`` has the base classes; ``networks`` are further networks beside the
user's.
"""

ROOMS = ("host", "data", "step", "loss", "layers", "weights", "run", "technique", "networks")
