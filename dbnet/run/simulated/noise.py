"""What is drawn for a machine: what varies the times of its steps, how fast it is, how long it lives."""

from __future__ import annotations

import numpy as np

from dbnet.network.cost import Profile


class Noise:
    """Numbers that vary a machine's times: a function of (seed, entity, event), so nobody's depend on who else there is.

    Parameters
    ----------
    profile, seed
        The machine; the run's seed.
    """

    _BLOCK = 64
    _STEPS, _MACHINES, _LIVES = range(3)

    def __init__(self, profile: Profile, seed: int) -> None:
        self._profile, self._seed = profile, seed
        self._drawn: dict[int, tuple[int, list[float]]] = {}

    def _generator(self, entity: int, block: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, entity], counter=[0, 0, block, stream]))

    def step(self, entity: int, event: int) -> float:
        """Return what the time of an entity's step is multiplied with."""
        if self._profile.noise.kind == "none":
            return 1.0
        block, place = divmod(event, self._BLOCK)
        drawn = self._drawn.get(entity)
        if drawn is None or drawn[0] != block:
            self._drawn[entity] = drawn = block, self._draw(self._generator(entity, block, self._STEPS)).tolist()
        return drawn[1][place]

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        noise, n = self._profile.noise, self._BLOCK
        if noise.kind == "gamma":
            shape = noise.variation**-2
            return generator.gamma(shape, 1 / shape, n)
        if noise.kind == "exponential":
            return generator.exponential(1.0, n)
        usual, late = generator.gamma(100.0, 0.01, n), noise.late * (1 + generator.pareto(noise.index, n))
        return np.where(generator.random(n) < noise.share, np.minimum(late, noise.longest), usual)

    def speed(self, replica: int) -> float:
        """Return what all times of a replica are multiplied with."""
        speed = self._profile.speed
        own = speed.cycle[replica % len(speed.cycle)] if speed.cycle else 1.0
        if speed.slow and self._generator(replica, 0, self._MACHINES).random() < speed.slow:
            own *= speed.factor
        return own

    def life(self, entity: int, start: int) -> float:
        """Return how long an entity's machine lives, in mean lives; `start` is how often its run has been begun before."""
        return float(self._generator(entity, start, self._LIVES).exponential())
