"""The parts of ``peel``: the layers that it knows, the chain of them in a network, and how each is undone."""
