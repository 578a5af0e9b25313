"""The training of the benchmark `run` in PyTorch: the same network, batch, rule and examples; alone, or one process of DDP."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py


def network(sizes: list[int]) -> Any:
    """Return a stack of dense layers with sigmoids between them."""
    import torch

    stack: list[torch.nn.Module] = []
    for n, m in pairwise(sizes[:-1]):
        stack += [torch.nn.Linear(n, m), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*stack, torch.nn.Linear(sizes[-2], sizes[-1]))


def main(order: dict[str, Any]) -> None:
    """Train as ordered, and write what it took."""
    import torch

    rank, processes, batch = order["rank"], order["processes"], order["batch"]
    torch.set_num_threads(order["threads"])
    model: torch.nn.Module = network(order["sizes"])
    with h5py.File(order["data"], "r") as data:
        x, y = (torch.from_numpy(data[f"train/{name}"][rank::processes]) for name in "xy")
    x, y = x.reshape(len(x), -1), y.long()
    if processes > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{order['meeting']}", rank=rank, world_size=processes)
        model = torch.nn.parallel.DistributedDataParallel(model)
    rule = {"adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}[order["rule"]["kind"]]
    optimizer, loss = rule(model.parameters(), lr=order["rule"]["rate"]), torch.nn.CrossEntropyLoss()
    ready = time.time()
    start, began, examples = time.process_time(), time.perf_counter(), 0
    for _ in range(order["epochs"]):
        for chosen in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            examples += len(chosen)
    seconds, spent = time.perf_counter() - began, time.process_time() - start
    told = {"rank": rank, "name": f"process {rank}", "seconds": seconds, "examples": examples, "ready": ready}
    Path(order["told"], f"spent-{rank}.json").write_text(json.dumps({**told, "spent": {"start": start, "training": spent}}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
