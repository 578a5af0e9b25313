# %% [markdown]
# # A layer, an update rule and a method of one's own
#
# In a notebook defining the class is enough: its `kind` is found, its fields are options of the run. For runs over
# MPI the same text stands in a file that the configuration names (`[model] modules`).

# %%
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from pydantic import Field

import dbnet
from dbnet.methods.downpour import Downpour
from dbnet.shards.shard import Front

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.figsize": (8, 2.8), "figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.constrained_layout.wspace": 0.08})
JOBS = Path(dbnet.__file__).parents[1] / "jobs"
if not Path("digits.h5").exists():
    subprocess.run([sys.executable, "-m", "dbnet", "data", "digits", "digits.h5"], check=True)


# %% [markdown]
# ## A layer
#
# `leaky`: y = x where x > 0, else a slope of x that is learned, one for each unit (PReLU, He et al. 2015). A layer
# says its shapes, which inputs its outputs need (here: the same box), and its two passes on arrays [units..., batch];
# partitioning, shards and checkpoints come with that.


# %%
class Leaky(dbnet.Layer):
    """Parametric rectifier: below zero each unit has a slope of its own."""

    kind = "leaky"

    def output_shape(self, x):
        return x

    def parameters(self, x):
        return {"slope": dbnet.Parameter(x, axes=len(x), spread=0.25)}

    def needs(self, x, out):
        return out

    def forward(self, c, part=None):
        np.multiply(c.x, np.where(c.x > 0, 1, c.p["slope"][..., None]), out=c.y)

    def backward_inputs(self, c, accumulate):
        if not accumulate:
            c.g["slope"].fill(0)
        c.g["slope"] += np.sum(np.minimum(c.x, 0) * c.dy, axis=-1)
        if c.dx is not None:
            np.multiply(c.dy, np.where(c.x > 0, 1, c.p["slope"][..., None]), out=c.dx)


# %% [markdown]
# ## An update rule
#
# `rmsprop` (Hinton 2012): v = d v + (1 - d) g², w = w - rate g / (√v + ε). It is given slices of the parameters, the
# gradient and the registers that it names, and changes them in place. `@dbnet.kernel` compiles the loop for the run's
# type.


# %%
@dbnet.kernel("T[:];T[:];T[:];f8;f8")
def rmsprop(w, g, v, rate, d):
    for i in range(w.size):
        v[i] = d * v[i] + (1 - d) * g[i] * g[i]
        w[i] -= rate * g[i] / (np.sqrt(v[i]) + 1e-6)


class RMSprop(dbnet.Rule):
    """Steps divided by a moving root mean square of the gradients."""

    kind = "rmsprop"
    state = ("mean_square",)
    keeps: float = Field(default=0.9, ge=0, lt=1, description="share of the mean square that an update keeps")

    def apply(self, w, g, state, t):
        rmsprop(w, g, state["mean_square"], self.rate, self.keeps)


# %% [markdown]
# Both at once, in a network that is cut over two partitions, on two shards:

# %%
tree = {
    "data": {"path": "digits.h5"},
    "model": {"layers": [{"kind": "dense", "units": 32}, {"kind": "leaky"}, {"kind": "dense", "units": 10}]},
    "method": {"minibatch": 20},
    "rule": {"kind": "rmsprop", "rate": 0.002, "keeps": 0.95},
    "topology": {"shards": 2, "replicas": 2, "partitions": 2},
    "stop": {"epochs": 4},
    "evaluate": {"epochs": 1},
    "run": {"picture": False},
}
done = dbnet.train(tree, quiet=True)
dbnet.open_run(done.run_file).evaluation[["epochs", "loss", "accuracy"]]

# %%
slopes = dbnet.load(done.checkpoint).parameters["1.leaky.slope"]
fig, axes = plt.subplots(figsize=(5, 2.2))
axes.bar(range(slopes.size), np.sort(slopes))
axes.set(xlabel="hidden unit, by its slope", ylabel="slope below zero")
plt.show()

# %% [markdown]
# ## A method
#
# A method is three roles: a worker, what takes the pushes at a shard, a coordinator. `modest` is Downpour but for the
# shard, which gives a gradient of staleness τ the weight 1 / (1 + τ) (the idea of Zhang, Gupta, Lian and Liu 2016).
# What stands in front of a shard hears of a push's first slice (`begin`), of each slice (`apply`; being informed,
# with the push's staleness) and of the end (`finish`). It works with every update rule; for a single rule it is
# enough that this one is `informed`.


# %%
class Modest(Front):
    """Gradients count the less the staler they are."""

    def __init__(self, shard, receiving):
        super().__init__(shard, receiving)
        self.informed = True

    def begin(self, partition, fetched=0):
        return self.shard.begin(partition)

    def apply(self, lo, g, t, arrival=None):
        self.shard.apply(lo, g * g.dtype.type(1 / (1 + arrival.staleness)), t, arrival)

    def finish(self, push):
        self.shard.finish(push)


class ModestDownpour(Downpour):
    """Downpour whose shards trust old gradients less."""

    kind = "modest"
    receiver = Modest


# %% [markdown]
# Eight replicas, no warmstart, and a rate at which stale gradients do harm, in simulated time: the plain method is
# thrown about, the modest one is not.

# %%
tree["model"] = {"layers": [{"kind": "dense", "units": 32, "activation": "tanh"}, {"kind": "dense", "units": 10}]}
tree["topology"] = {"shards": 2, "replicas": 8}
tree["rule"] = {"kind": "sgd", "rate": 0.3}
tree["stop"], tree["evaluate"] = {"epochs": 6}, {"epochs": 0.5}
fig, (left, right) = plt.subplots(1, 2)
for kind in ("downpour", "modest"):
    done = dbnet.simulate(tree, JOBS / "machines/large.toml", [f"method.kind={kind}"], quiet=True)
    run = dbnet.open_run(done.outcome.run_file)
    left.plot(run.evaluation.epochs, run.evaluation.train_loss, label=kind)
    right.plot(run.evaluation.epochs, run.evaluation.accuracy, label=kind)
left.set(xlabel="epochs", ylabel="training loss", yscale="log")
right.set(xlabel="epochs", ylabel="test accuracy", ylim=(0, 1.02))
right.legend()
plt.show()
