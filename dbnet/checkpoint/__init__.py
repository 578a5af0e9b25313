"""What a run goes on from: global named arrays, whatever the topology was.

Writing: the coordinator's half is master (when, who is asked, the master over the parts, the link), the shards' half is parts;
their messages:

    coordinator -> shard    "checkpoint" (master's path, number of the part, id)
    shard -> coordinator    "saving" bytes         now and then, while its part is under way
                            "saved" Saved          its part is durable and has its name, or why not
    coordinator             when all have answered: the master, the link to it, then what is older goes

Reading: resume (which one) -> verify (read every byte) -> reader (any range, any topology). format says which files and datasets
there are. For other programs, parameters alone: weights (.safetensors and .npz, which a run begins from, too), onnx (the network).
"""
