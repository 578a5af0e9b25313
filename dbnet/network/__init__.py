"""What is computed: layers over one flat vector of parameters, cut over the partitions of a replica.

layers/, losses/ -> parameters (names in one flat vector) -> model (shapes, footprint) -> cost (predicted time, machines), partition
(who owns which units) -> network (forward and backward over vectors w and g) -> exchange (values that cross a cut) -> replica
(minibatches in, gradient and score out). diagnosis says why a gradient is not finite. Nothing here knows shards, a coordinator,
or MPI beyond `comm.link`.
"""
