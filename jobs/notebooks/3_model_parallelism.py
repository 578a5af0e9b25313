# %% [markdown]
# # Model parallelism: what crosses, and what it brings
#
# A replica is cut over P ranks, its partitions. Where a unit needs a value that another partition computes, that
# value crosses, once; a locally connected network has few of them, a dense one many. This is section 3 of Dean et al.
# 2012, and its Figure 3.

# %%
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np

import dbnet

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.figsize": (8, 2.8), "figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.constrained_layout.wspace": 0.08})
JOBS = Path(dbnet.__file__).parents[1] / "jobs"
rng = np.random.default_rng(1)
with h5py.File("images.h5", "w") as file:
    for part, n in (("train", 64), ("test", 16)):
        file[f"{part}/x"] = rng.standard_normal((n, 32, 32, 3), np.float32)
        file[f"{part}/y"] = np.arange(n) % 10
    file.attrs["classes"] = 10

LOCAL = [
    {"kind": "local", "maps": 8, "field": 6, "activation": "tanh"},
    {"kind": "pool", "over": "l2", "field": 3, "stride": 3},
    {"kind": "local", "maps": 8, "field": 4, "activation": "tanh"},
    {"kind": "dense", "units": 10},
]
DENSE = [{"kind": "dense", "units": 256, "activation": "tanh"} for _ in range(2)] + [{"kind": "dense", "units": 10}]


def tables(layers: list[dict], partitions: int = 1) -> dict:
    """Return a run of one replica."""
    return {
        "data": {"path": "images.h5"},
        "model": {"layers": layers},
        "method": {"minibatch": 16},
        "rule": {"kind": "sgd", "rate": 0.05},
        "topology": {"replicas": 1, "partitions": partitions},
        "stop": {"steps": 6},
        "run": {"picture": False},
    }


# %% [markdown]
# The plan says, without running anything, how layers are cut and what crosses.

# %%
print(dbnet.plan(tables(LOCAL, 4)))

# %% [markdown]
# ## A cut network is the same network
#
# The same steps, uncut and cut in two and four: the parameters differ by rounding alone.

# %%
whole = dbnet.train(tables(LOCAL), quiet=True).params
for partitions in (2, 4):
    cut = dbnet.train(tables(LOCAL, partitions), quiet=True).params
    print(f"P = {partitions}: largest difference of {cut.size:,} parameters {np.abs(cut - whole).max():.1e}")
    assert np.allclose(cut, whole, atol=1e-5)

# %% [markdown]
# ## Speed-up
#
# In simulated time, on clusters of 2012 with 1 and 10 Gb/s: `dry` computes no gradients, only when each message and
# each kernel would end, so networks may be large. One replica fetches and pushes every fifty steps, as we look at the
# cut alone. A network of local layers on images gains from more machines, a dense one (as for speech) less, and a
# slow network takes the gain away.

# %%
with h5py.File("large.h5", "w") as images, h5py.File("frames.h5", "w") as frames:
    for file, shape in ((images, (64, 64, 3)), (frames, (440,))):
        file["train/x"] = rng.standard_normal((128, *shape), np.float32)
        file["train/y"] = np.arange(128) % 10
        file.attrs["classes"] = 10

large = [
    {"kind": "local", "maps": 8, "field": 10, "activation": "tanh"},
    {"kind": "pool", "over": "l2", "field": 5, "stride": 5},
    {"kind": "local", "maps": 8, "field": 5, "activation": "tanh"},
    {"kind": "dense", "units": 10},
]
dense = [{"kind": "dense", "units": 2048, "activation": "tanh"} for _ in range(3)] + [{"kind": "dense", "units": 10}]
sizes = [1, 2, 4, 8, 16]
fig, both = plt.subplots(1, 2, sharey=True)
for axes, speed in zip(both, ("1g", "10g"), strict=True):
    for name, layers, data in (("local layers", large, "large.h5"), ("dense layers", dense, "frames.h5")):
        words = [
            f"data.path={data}",
            "method.minibatch=128",
            "method.n_fetch=50",
            "method.n_push=50",
            "topology.shards=8",
            "stop.steps=3",
        ]
        seconds = [
            dbnet.simulate(tables(layers, n), JOBS / f"machines/cluster2012-{speed}.toml", words, dry=True, quiet=True).seconds
            for n in sizes
        ]
        axes.plot(sizes, seconds[0] / np.array(seconds), "o-", label=name)
    axes.plot(sizes, sizes, "--", color="gray", lw=1, label="ideal")
    axes.set(xlabel="machines per replica (partitions)", title=f"{speed[:-1]} Gb/s", xscale="log", yscale="log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_yticks(sizes, map(str, sizes))
    axes.minorticks_off()
both[0].set(ylabel="speed-up")
both[0].legend(fontsize=8)
plt.show()
