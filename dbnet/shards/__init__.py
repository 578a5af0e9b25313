"""The parameter server: who changes parameters, how replicas fetch and push (section 4.1 of the paper).

rules/ are the update arithmetic, applied by shard to its range, slice by slice as push lets a gradient in. store carries fetch
and push over the window, both halves; local_store does the same in the shards' process; routes says which elements lie where.
server is one shard's rank. schedule/ records what an asynchronous run depends on. For batch methods: space (commands on named
registers), accrual (a pass's gradient, questions and answers).
"""
