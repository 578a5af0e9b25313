"""The parameters of a network: one flat vector, and what its values are before training.

layout: name -> (offset, shape), and the initial values of any range; initializers/ are what layers may ask for.
"""
