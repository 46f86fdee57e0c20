"""Iterated function systems: a class is one, and an image shows the attractor of a variation of it.

After Kataoka et al., "Pre-training without Natural Images" (ACCV 2020): the systems are random,
those that fill little of the image are thrown away, and the instances of a class vary the
parameters. The matrices are drawn by their singular values, as by Anderson and Farrell, "Improving
Fractal Pre-training" (WACV 2022), so that most systems fill the image.
"""

import dataclasses
import functools
import math

import numpy as np

_SEED = 20200  # of all draws of this dataset
_MAPS = (2, 3, 4)
_FILLED = 0.15  # of a grid of 32 x 32 cells, at least
_WALKERS = 1500
_SETTLING = 16  # steps after which a walker is taken to be on the attractor


@dataclasses.dataclass(frozen=True)
class System:
    """Affine maps of the plane, x -> U(turns) diag(scales) V(skews) x + shifts.

    Attributes:
      turns: [maps], angles of the rotation after the scaling.
      skews: [maps], angles of the rotation before it.
      scales: [maps, 2], singular values with signs, below 1 in size.
      shifts: [maps, 2].
    """

    turns: np.ndarray
    skews: np.ndarray
    scales: np.ndarray
    shifts: np.ndarray

    @property
    def matrices(self) -> np.ndarray:
        """The maps' linear parts, [maps, 2, 2]."""
        return _rotations(self.turns) @ (self.scales[:, :, None] * _rotations(self.skews))

    def varied(self, strength: float, rng: np.random.Generator) -> "System":
        """Returns a system with every parameter changed a little.

        Args:
          strength: the largest change: of an angle in radians, of a shift in the unit that the
            shifts were drawn in, of a singular value as a part of it.
          rng: source of every draw.
        """

        def change(values: np.ndarray) -> np.ndarray:
            return strength * (2 * rng.random(values.shape) - 1)

        scales = np.clip(self.scales * (1 + change(self.scales)), -0.95, 0.95)
        return System(
            self.turns + change(self.turns),
            self.skews + change(self.skews),
            scales,
            self.shifts + change(self.shifts),
        )


def _rotations(angles: np.ndarray) -> np.ndarray:
    """Returns [n, 2, 2]; sines are Python's, as numpy's differ between processors."""
    cos = np.array([math.cos(angle) for angle in angles])
    sin = np.array([math.sin(angle) for angle in angles])
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


@functools.cache
def class_system(number: int) -> System:
    """Returns the system of a class, whose attractor fills a part of the image."""
    rng = np.random.default_rng((_SEED, number))
    while True:
        system = _draw_system(rng)
        x, y, _ = attractor(system, 3000, rng)
        if len(np.unique(cells(x, y, 32))) >= _FILLED * 32 * 32:
            return system


def _draw_system(rng: np.random.Generator) -> System:
    count = _MAPS[int(rng.integers(len(_MAPS)))]
    low, high = (5 + count) / 2, (6 + count) / 2
    while True:
        scales = np.sort(rng.random((count, 2)))[:, ::-1]
        if low < scales[:, 0].sum() + 2 * scales[:, 1].sum() < high and scales.max() < 0.95:
            break
    return System(
        turns=math.pi * (2 * rng.random(count) - 1),
        skews=math.pi * (2 * rng.random(count) - 1),
        scales=scales * np.where(rng.random((count, 2)) < 0.5, -1, 1),
        shifts=2 * rng.random((count, 2)) - 1,
    )


def attractor(
    system: System, points: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws points of a system's attractor by the chaos game.

    Many walkers step at once, each by a random map, with odds of the map's area.

    Returns:
      x and y, with mean 0 and a largest deviation of 1, and a number in [0, 1] that varies
      smoothly over the attractor, to colour it by.
    """
    maps, shifts = system.matrices, system.shifts
    odds = np.abs(maps[:, 0, 0] * maps[:, 1, 1] - maps[:, 0, 1] * maps[:, 1, 0]) + 0.02
    bounds = np.cumsum(odds / odds.sum())[:-1]
    steps = -(-points // _WALKERS)
    chosen = np.searchsorted(bounds, rng.random((_SETTLING + steps, _WALKERS)), side="right")
    tints = np.linspace(0, 1, len(maps))
    x, y, tint = np.zeros((3, _WALKERS))
    kept = np.empty((3, steps, _WALKERS))
    for step, choice in enumerate(chosen):
        a, b, c, d = (maps[:, row, column][choice] for row in (0, 1) for column in (0, 1))
        x, y = a * x + b * y + shifts[:, 0][choice], c * x + d * y + shifts[:, 1][choice]
        tint = (tint + tints[choice]) / 2
        if step >= _SETTLING:
            kept[:, step - _SETTLING] = x, y, tint
    x, y, tint = kept.reshape(3, -1)[:, :points]
    x, y = x - x.mean(), y - y.mean()
    deviation = math.sqrt(max((x * x).mean(), (y * y).mean(), 1e-12))
    return x / deviation, y / deviation, tint


def cells(x: np.ndarray, y: np.ndarray, size: int, reach: float = 2.2) -> np.ndarray:
    """Returns the cells, of a grid of size x size, that points fall into.

    The grid spans -reach to reach; points outside are put on its border.
    """
    column = np.clip((x / reach + 1) * (size / 2), 0, size - 1).astype(np.int32)
    row = np.clip((y / reach + 1) * (size / 2), 0, size - 1).astype(np.int32)
    return row * size + column
