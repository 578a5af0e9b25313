# %% [markdown]
# # A first run and its analysis
#
# Handwritten digits, a small network, two replicas that train asynchronously through two parameter shards.
# `dbnet.train` plays all roles in this process, so nothing here needs MPI; what it writes is what a run on a cluster
# writes.

# %%
import subprocess
import sys
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np

import dbnet

plt.style.use("tableau-colorblind10")
plt.rcParams.update({"figure.figsize": (8, 2.8), "figure.dpi": 72, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"figure.constrained_layout.use": True, "figure.constrained_layout.wspace": 0.08})
JOBS = Path(dbnet.__file__).parents[1] / "jobs"
if not Path("digits.h5").exists():
    subprocess.run([sys.executable, "-m", "dbnet", "data", "digits", "digits.h5"], check=True)

# %% [markdown]
# A run is a configuration and changes of it. Everything a run says of itself is in one HDF5 file, which opens as pandas
# frames.

# %%
words = ["data.path=digits.h5", "evaluate.epochs=0.5", "run.picture=false"]
done = dbnet.train(JOBS / "digits.toml", [*words, "stop.epochs=12"], quiet=True)
run = dbnet.open_run(done.run_file)
run.evaluation.tail(3)

# %%
fig, (left, right) = plt.subplots(1, 2)
for part, front in (("train", "train_"), (run.part, "")):
    left.plot(run.evaluation.epochs, run.evaluation[f"{front}loss"], label=part)
    right.plot(run.evaluation.epochs, run.evaluation[f"{front}accuracy"], label=part)
left.set(xlabel="epochs", ylabel="loss", yscale="log")
right.set(xlabel="epochs", ylabel="accuracy", ylim=(0.8, 1.005))
right.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## What was trained
#
# A checkpoint loads as a model, whatever the topology was that it was trained on.

# %%
model = dbnet.load(done.checkpoint)
with h5py.File("digits.h5") as file:
    x, y = file["test/x"][:], file["test/y"][:]
outputs = model.predict(x)
guess = outputs.argmax(axis=1)
print({name: array.shape for name, array in model.parameters.items()})
print(f"test accuracy {np.mean(guess == y):.4f} = {model.evaluate().accuracy:.4f}")

# %% [markdown]
# Which digits are taken for which, and the images of which the network is least sure.

# %%
confusion = np.zeros((10, 10), int)
np.add.at(confusion, (y, guess), 1)
margin = np.sort(outputs, axis=1)
doubtful = np.argsort(margin[:, -1] - margin[:, -2])[:8]

fig = plt.figure(figsize=(8, 3))
grid = fig.add_gridspec(2, 7, width_ratios=[1, 1, 1, 0.2, 1, 1, 1])
axes = fig.add_subplot(grid[:, :3])
axes.imshow(confusion - np.diag(np.diag(confusion)), cmap="Reds", vmax=2)
for row, col in zip(*confusion.nonzero(), strict=True):
    colour = "white" if row != col and confusion[row, col] > 1 else "black"
    axes.text(col, row, confusion[row, col], ha="center", va="center", fontsize=8, color=colour)
axes.set(xlabel="taken for", ylabel="digit", xticks=range(10), yticks=range(10))
for i, example in enumerate(doubtful[:6]):
    axes = fig.add_subplot(grid[i // 3, 4 + i % 3])
    axes.imshow(x[example].reshape(8, 8), cmap="gray_r")
    axes.set_title(f"{y[example]}, taken for {guess[example]}", fontsize=8)
    axes.axis("off")
plt.show()

# %% [markdown]
# What the hidden units look for: the weights of the first layer, as images (of those with the largest weights).

# %%
weights = model.parameters["0.dense.W"]
largest = np.argsort(-np.linalg.norm(weights, axis=1))[:24]
fig, axes = plt.subplots(2, 12, figsize=(8, 1.6))
bound = np.abs(weights[largest]).max()
for image, place in zip(weights[largest], axes.flat, strict=True):
    place.imshow(image.reshape(8, 8), cmap="RdBu", vmin=-bound, vmax=bound)
    place.axis("off")
plt.show()

# %% [markdown]
# ## Several runs together
#
# Is a difference more than chance? Two rates, three seeds of each; `open_runs` gives the frames of all, each row with
# what differs.

# %%
files = [
    dbnet.train(
        JOBS / "digits.toml",
        [*words, "stop.epochs=4", f"rule.rate={rate}", f"run.seed={seed}", "run.name=rates"],
        quiet=True,
    ).run_file
    for rate in (0.03, 0.3)
    for seed in (1, 2, 3)
]
runs = dbnet.open_runs(files)
runs.table

# %%
fig, axes = plt.subplots(figsize=(6, 2.8))
for rate, rows in runs.evaluation.groupby("rule.rate"):
    curve = rows.groupby(rows.epochs.round(1)).accuracy.agg(["mean", "min", "max"])
    (line,) = axes.plot(curve.index, curve["mean"], label=f"rate {rate}")
    axes.fill_between(curve.index, curve["min"], curve["max"], color=line.get_color(), alpha=0.2, lw=0)
axes.set(xlabel="epochs", ylabel="test accuracy", ylim=(0.8, 1))
axes.legend(loc="lower right", title="mean of three, least to largest")
plt.show()
