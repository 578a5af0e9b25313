"""The data of Figure 5's experiment: frames of spoken digits, as their first principal components."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import wavfile

from dbnet.data.file import write

COMPONENTS, CLASSES = 60, 30


def energies(sound: np.ndarray) -> np.ndarray:
    """Return the logarithms of 40 filter-bank energies, [frames, 40], of a sound of 8 kHz: 25 ms each, 10 ms apart."""
    mel = np.linspace(2595 * np.log10(1 + 60 / 700), 2595 * np.log10(1 + 4000 / 700), 42)
    edges, bins = 700 * (10 ** (mel / 2595) - 1), np.arange(129)[:, None] * 8000 / 256
    up, down = (bins - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - bins) / np.diff(edges)[1:]
    at = np.arange(0, len(sound) - 199, 80)[:, None] + np.arange(200)
    power = np.abs(np.fft.rfft(sound[at] * np.hamming(200), 256)) ** 2
    return np.log(power @ np.maximum(0, np.minimum(up, down)) + 1)


def examples(sounds: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return 11 frames x 40 energies around every frame, and its class: the digit, and in which third of the sound it is."""
    x, y = [], []
    for digit, sound in sounds:
        own = energies(sound)
        around = np.clip(np.arange(len(own))[:, None] + np.arange(-5, 6), 0, len(own) - 1)
        x.append(own[around].reshape(len(own), -1).astype(np.float32))
        y.append(3 * digit + np.arange(len(own)) * 3 // len(own))
    return np.concatenate(x), np.concatenate(y)


def recordings(folder: Path) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Return (digit, sound) of digit_speaker_index.wav; indices 0 to 4 are the official test set."""
    out: dict[str, list[tuple[int, np.ndarray]]] = {"train": [], "test": []}
    for path in sorted(folder.glob("*.wav")):
        digit, _, index = path.stem.split("_")
        out["test" if int(index) < 5 else "train"].append((int(digit), wavfile.read(path)[1].astype(float)))
    if not all(out.values()):
        raise SystemExit(f"'{folder}' holds no recordings like 0_george_5.wav for training and 0_george_0.wav for the test.")
    return out


def made_up(each: int) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Return sounds that stand in: ten pairs of tones that move, in noise."""
    generator, moments = np.random.default_rng(1), np.arange(3200) / 8000

    def sound(digit: int) -> np.ndarray:
        pitch = 300 * (1 + digit) * generator.normal(1, 0.05) * (1 + moments)
        return 1000 * np.sin(2 * np.pi * pitch * moments) + 300 * generator.standard_normal(moments.size)

    return {part: [(digit, sound(digit)) for digit in range(10) for _ in range(n)] for part, n in (("train", each), ("test", 2))}


def prepare(folder: Path | None, path: Path, each: int = 60) -> None:
    """Write the data file: the first principal components of the training set's examples, with the variances that they have."""
    sounds = recordings(folder) if folder else made_up(each)
    parts = {part: examples(some) for part, some in sounds.items()}
    x = parts["train"][0]
    mean, spread = x.mean(0), x.std(0)
    _, axes = np.linalg.eigh(np.cov(((x[::10] - mean) / spread).T))
    axes = axes[:, ::-1][:, :COMPONENTS] / spread[:, None]
    contents: dict[str, Any] = {"classes": CLASSES, "name": "spoken digits" if folder else "made-up sounds"}
    for part, (own, y) in parts.items():
        contents |= {f"{part}/x": ((own - mean) @ axes).astype(np.float32), f"{part}/y": y}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, contents)
