"""L-BFGS (Liu & Nocedal 1989) with a vector-free direction and a strong Wolfe line search."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dbnet.methods.descent.base import Smooth
from dbnet.methods.descent.history import Directions, History, State


class LBFGS(Smooth):
    """L-BFGS.

    Parameters
    ----------
    history
        m, the number of pairs remembered.
    curvature
        A pair enters the history if s . y exceeds this share of |s| |y|.
    """

    kind: ClassVar[str] = "lbfgs"
    history: int = Field(default=10, gt=0, le=1000)
    curvature: float = Field(default=1e-10, ge=0)

    def memory(self, state: State) -> Directions:
        return History(state, self.history, self.curvature)
