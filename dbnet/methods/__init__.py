"""How a network is trained (sections 4.1 and 4.2 of the paper; algorithms 7.1 and 7.2): a family.

base: a method is three role classes and its options. worker is a replica that obeys orders; downpour, sgd (its baseline),
synchronous and sandblaster/ train. descent/ are the batch methods that Sandblaster runs: a family of its own.
"""
