# %% [markdown]
# # Anatomy of staleness
#
# A replica fetches parameters, computes a gradient from them, pushes it. By the time the shard applies it others have
# changed the parameters: the number of updates in between is the gradient's *staleness*. It is measured per shard,
# gradient by gradient.
#
# In one process replicas take turns and nothing is stale, so here are runs in **simulated time** (the code of an MPI
# run, on a machine that a file describes), and in the end one on real MPI ranks.

# %%
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import dbnet

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.figsize": (8, 2.8), "figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.constrained_layout.wspace": 0.08})
JOBS = Path(dbnet.__file__).parents[1] / "jobs"
if not Path("digits.h5").exists():
    subprocess.run([sys.executable, "-m", "dbnet", "data", "digits", "digits.h5"], check=True)
RUN = [
    "data.path=digits.h5",
    "model.layers.0.units=32",
    "warmstart.steps=",
    "stop.epochs=",
    "evaluate.epochs=",
    "evaluate.train=100",
    "run.picture=false",
]


def simulated(machine: str, *changes: str) -> dbnet.open_run:
    """Train in simulated time; return what the run says of itself."""
    done = dbnet.simulate(JOBS / "digits.toml", JOBS / "machines" / f"{machine}.toml", [*RUN, *changes], quiet=True)
    return dbnet.open_run(done.outcome.run_file)


# %% [markdown]
# ## Where it comes from
#
# Eight replicas whose steps vary by 10 %. While one computes each of the others is applied about once: R - 1 = 7.
# What a replica pushed last may still be on its way when it fetches again, which adds up to one more; the second
# shard is served a little later than the first.

# %%
run = simulated("stragglers", "topology.replicas=8", "stop.steps=120")
late = run.events.applied - run.events.fetched
fig, (left, right) = plt.subplots(1, 2, width_ratios=[2, 3])
run.staleness.plot.bar(ax=left, width=0.9, legend=False)
left.legend(fontsize=8)
left.set(xlabel="staleness (updates)", ylabel="gradients", xticks=range(0, len(run.staleness), 4))
left.tick_params(axis="x", rotation=0)
right.plot(run.events.seconds * 1e3, late, ".", ms=2, alpha=0.5)
right.set(xlabel="virtual milliseconds", ylabel="staleness of each gradient", ylim=(0, None))
plt.show()
print(f"mean {late.mean():.2f}, largest {late.max()}")

# %% [markdown]
# ## It grows with the replicas

# %%
sizes = [1, 2, 4, 8, 16]
means = [
    (frame := simulated("stragglers", f"topology.replicas={n}", "stop.steps=60").events).applied.sub(frame.fetched).mean()
    for n in sizes
]
fig, axes = plt.subplots(figsize=(4.5, 2.8))
axes.plot(sizes, np.array(sizes) - 1, "--", color="gray", label="R - 1")
axes.plot(sizes, means, "o-", label="measured")
axes.set(xlabel="replicas R", ylabel="mean staleness", xticks=sizes)
axes.legend()
plt.show()

# %% [markdown]
# ## Slow replicas' gradients are the oldest
#
# Four speeds of machines (1, 1.3, 2.6 and 5.7 times as long a step): a slow one contributes few gradients, and these
# are old. A mean over all gradients does not show that.

# %%
run = simulated("speeds", "topology.replicas=8", "stop.steps=80")
events = run.events.assign(late=run.events.applied - run.events.fetched)
# While the fastest still train: in the end the slow ones are alone.
together = events[events.seconds < events[events.replica == 0].seconds.max()]
speed = {0: "1", 1: "1.3", 2: "2.6", 3: "5.7"}
groups = [together[together.replica % 4 == kind] for kind in speed]
fig, (left, right) = plt.subplots(1, 2)
left.boxplot([rows.late for rows in groups], tick_labels=speed.values(), showfliers=False)
left.set(xlabel="time of a step", ylabel="staleness")
right.bar(speed.values(), [len(rows) / len(together) for rows in groups])
right.set(xlabel="time of a step", ylabel="share of all gradients")
plt.show()

# %% [markdown]
# ## Pushing less often
#
# With `n_push = n_fetch = 4` a replica pushes the sum of four gradients. Counted in updates little changes: the
# others still push about once in the meantime. But each of these updates is four gradients, so counted in gradients
# the staleness is four times as high, and more, since the first of the four was computed long before they were
# pushed.

# %%
for every in (1, 4):
    run = simulated("stragglers", "topology.replicas=8", "stop.steps=120", f"method.n_push={every}", f"method.n_fetch={every}")
    late = run.events.applied - run.events.fetched
    print(f"n_push = {every}: mean staleness {late.mean():.2f} updates = {(late * run.events.steps).mean():5.2f} gradients")

# %% [markdown]
# ## On MPI ranks
#
# `mpirun` is started from here like any program: one coordinator, one shard, three replicas. What it leaves is opened
# as before. Over MPI the staleness is an upper bound, and which gradient meets which depends on the machine: on fewer
# cores than ranks a shard that is not running lets its rings fill, so that some gradients become much older than R -
# 1.

# %%
mpirun = shutil.which("mpirun", path=Path(sys.executable).parent) or shutil.which("mpirun")
crowded = ["--oversubscribe"] if "Open MPI" in subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout else []
words = [*RUN, "topology.shards=1", "topology.replicas=3", "stop.steps=400", "run.name=ranks", "evaluate.epochs=10"]
train = [mpirun, *crowded, "-n", "5", sys.executable, "-m", "dbnet", "train", JOBS / "digits.toml", *words]
said = subprocess.run(train, capture_output=True, text=True, timeout=120)
print(said.stdout, said.stderr)
run = dbnet.open_run(said.stdout.split("Run file")[1].split()[0])
fig, axes = plt.subplots(figsize=(4.5, 2.8))
share = run.staleness.sum(axis=1) / run.staleness.sum().sum()
share = share[share.cumsum() < 0.99]
axes.bar(share.index, share)
axes.xaxis.get_major_locator().set_params(integer=True)
axes.set(xlabel="staleness (updates), without the highest 1 %", ylabel="share of the gradients")
plt.show()
