# %% [markdown]
# # A figure for a paper: time to a given accuracy
#
# Figure 4 of Dean et al. 2012 asks how long methods take to reach a fixed accuracy, given more and more machines.
# Here is that figure for the digits, in miniature: fixed rate and Adagrad, 1 to 16 replicas, two seeds of each, in
# simulated time. The same seeds give the same figure, to the bit.

# %%
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

import dbnet

JOBS = Path(dbnet.__file__).parents[1] / "jobs"
if not Path("digits.h5").exists():
    subprocess.run([sys.executable, "-m", "dbnet", "data", "digits", "digits.h5"], check=True)

# %% [markdown]
# ## The sweep
#
# Small networks learn in milliseconds, and messages would be all that counts. So the machine is `large.toml`, on
# which a step takes 0.1 s beside its messages, varying by 10 %, and one machine in twenty takes twice as long.

# %%
TREE = {
    "data": {"path": "digits.h5"},
    "model": {"layers": [{"kind": "dense", "units": 32, "activation": "sigmoid"}, {"kind": "dense", "units": 10}]},
    "method": {"minibatch": 10},
    "warmstart": {"steps": 10},
    "stop": {"epochs": 20, "accuracy": 0.9},
    "evaluate": {"epochs": 0.1, "train": 0},
    "run": {"picture": False, "name": "sweep"},
}
RULES = {"fixed rate": ["rule.kind=sgd", "rule.rate=0.2"], "Adagrad": ["rule.kind=adagrad", "rule.rate=0.05"]}
SIZES, SEEDS = [1, 2, 4, 8, 16], [1, 2]

files = []
for rule in RULES.values():
    for size in SIZES:
        for seed in SEEDS:
            words = [*rule, f"topology.replicas={size}", f"run.seed={seed}"]
            files.append(dbnet.simulate(TREE, JOBS / "machines/large.toml", words, quiet=True).outcome.run_file)

# %% [markdown]
# `open_runs` puts the evaluations of all runs into one frame, each row with what differs between them. The time to
# the accuracy is that of the first evaluation that has it.

# %%
runs = dbnet.open_runs(files)
reached = runs.evaluation[runs.evaluation.accuracy >= TREE["stop"]["accuracy"]]
times = reached.groupby(["rule.kind", "topology.replicas", "run.seed"]).seconds.min()
table = times.groupby(level=[0, 1]).agg(["mean", "min", "max", "count"])
table

# %% [markdown]
# ## The figure
#
# In the size of a column, with its spread, as a PDF for LaTeX beside it.

# %%
plt.style.use("tableau-colorblind10")
plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42})
fig, axes = plt.subplots(figsize=(3.3, 2.4), dpi=120, layout="constrained")
for name, kind, mark in (("fixed rate", "sgd", "s"), ("Adagrad", "adagrad", "o")):
    rows = table.loc[kind]
    spread = [rows["mean"] - rows["min"], rows["max"] - rows["mean"]]
    axes.errorbar(rows.index, rows["mean"], spread, marker=mark, ms=4, lw=1, capsize=2, label=f"Downpour, {name}")
first = table.loc["adagrad"]["mean"].iloc[0]
axes.plot(SIZES, [first / size for size in SIZES], "--", color="gray", lw=1, label="R times as fast as one")
axes.set(xlabel="replicas R", ylabel=f"virtual seconds to {TREE['stop']['accuracy']:.0%}", xscale="log", yscale="log")
axes.set_xticks(SIZES, map(str, SIZES))
axes.minorticks_off()
axes.legend(frameon=False)
fig.savefig("figure.pdf")
plt.show()

# %% [markdown]
# Up to four replicas bring with Adagrad what they should. Beyond, the gradients' staleness takes back what their
# number gives, and the second of warmstart, in which one replica is alone, is a third of the time.
