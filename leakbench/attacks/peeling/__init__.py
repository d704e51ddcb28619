"""What ``peel`` is made of: the layers that it knows, the chain of them in a network, and how each is undone."""
