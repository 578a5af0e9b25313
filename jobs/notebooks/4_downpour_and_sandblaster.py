# %% [markdown]
# # Downpour against Sandblaster
#
# **Downpour** takes many small noisy steps, asynchronously; **Sandblaster** few exact ones: each iteration looks at
# all examples, the L-BFGS history lies on the shards. On a convex problem (softmax regression with weight decay) both
# go to the same optimum, and one can see what each is good for. Here four replicas of each in this process, compared
# by passes over the data; the seconds are another question, to which `dbnet.simulate` has an answer for a given
# machine.

# %%
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

import dbnet

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.figsize": (8, 2.8), "figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.constrained_layout.wspace": 0.08})
if not Path("digits.h5").exists():
    subprocess.run([sys.executable, "-m", "dbnet", "data", "digits", "digits.h5"], check=True)

PROBLEM = {
    "data": {"path": "digits.h5"},
    "model": {"layers": [{"kind": "dense", "units": 10}], "dtype": "float64", "decay": 0.01},
    "topology": {"shards": 2, "replicas": 4},
    "evaluate": {"epochs": 1, "train": 1438},
    "run": {"picture": False},
}
DOWNPOUR = {"method": {"minibatch": 20}, "stop": {"epochs": 30}}
SANDBLASTER = {"method": {"kind": "sandblaster", "portion": 60, "minibatch": 60}, "stop": {"iterations": 40}}


def trained(changes: dict, *words: str) -> tuple:
    """Train in this process; return the run and its checkpoint."""
    done = dbnet.train({**PROBLEM, **changes}, words, quiet=True)
    return dbnet.open_run(done.run_file), str(done.checkpoint)


runs = {
    "Downpour, fixed rate": trained(DOWNPOUR, "rule.kind=sgd", "rule.rate=0.1"),
    "Downpour, Adagrad": trained(DOWNPOUR, "rule.kind=adagrad", "rule.rate=0.1"),
    "Sandblaster, L-BFGS": trained(SANDBLASTER),
}

# %% [markdown]
# Where L-BFGS has made its first step, after two passes, Adagrad is more than half way; after thirty passes all are
# alike. What is left then cannot be seen in the loss: `iterations` holds what Sandblaster says of each iteration, and
# its gradient goes on falling.

# %%
fig, (left, right) = plt.subplots(1, 2)
for name, (run, _) in runs.items():
    left.plot(run.evaluation.epochs, run.evaluation.train_loss, label=name)
left.set(xlabel="passes over the data", ylabel="training loss", yscale="log", xlim=(0, 30))
left.set_yticks([0.4, 0.6, 1, 2], ["0.4", "0.6", "1", "2"])
left.minorticks_off()
left.legend(fontsize=8)
iterations = runs["Sandblaster, L-BFGS"][0].iterations
right.plot(iterations.iteration, iterations.gradient_norm)
right.set(xlabel="L-BFGS iteration", ylabel="norm of the gradient", yscale="log")
plt.show()
iterations.tail(3)

# %% [markdown]
# ## How near to the optimum?
#
# The weights' distance to those of an L-BFGS run that went on for long. Downpour's noise keeps it at a distance, on
# and on.

# %%
optimum = dbnet.load(trained(SANDBLASTER, "stop.iterations=120")[1]).parameters["0.dense.W"]
for name, (_, checkpoint) in runs.items():
    distance = ((dbnet.load(checkpoint).parameters["0.dense.W"] - optimum) ** 2).sum() ** 0.5
    print(f"{name:20}  distance {distance:.1e} of {(optimum**2).sum() ** 0.5:.1f}")

# %% [markdown]
# ## One after the other
#
# What each is good for: Downpour to begin with, Sandblaster to finish. `run.start` takes the parameters of any
# checkpoint.

# %%
short, checkpoint = trained({**DOWNPOUR, "stop": {"epochs": 2}}, "rule.rate=0.1")
finished, _ = trained(SANDBLASTER, f"run.start={checkpoint}")
fig, axes = plt.subplots(figsize=(5, 2.8))
for name, run in (("from random weights", runs["Sandblaster, L-BFGS"][0]), ("from two epochs of Downpour", finished)):
    axes.plot(run.iterations.passes.cumsum(), run.iterations.gradient_norm, label=f"L-BFGS {name}")
axes.set(xlabel="passes over the data", ylabel="norm of the gradient", yscale="log")
axes.legend(fontsize=8)
plt.show()
