"""The adaptive nonlinear layer a second time, slowly: the Cox-de Boor recursion in numpy float64."""

import numpy as np


def knots(grid_size: int, order: int, low: float, high: float) -> np.ndarray:
    """The uniform grid with `order` more knots on either side, (grid_size + 2 * order + 1,)."""
    spacing = (high - low) / grid_size
    return low + spacing * np.arange(-order, grid_size + order + 1, dtype=np.float64)


def bases(t: np.ndarray, grid_size: int, order: int, low: float, high: float) -> np.ndarray:
    """All basis functions at points t (...,) -> (..., grid_size + order), by the Cox-de Boor recursion."""
    grid = knots(grid_size, order, low, high)
    t = np.asarray(t, dtype=np.float64)[..., None]
    values = ((t >= grid[:-1]) & (t < grid[1:])).astype(np.float64)
    for degree in range(1, order + 1):
        left = (t - grid[: -degree - 1]) / (grid[degree:-1] - grid[: -degree - 1])
        right = (grid[degree + 1 :] - t) / (grid[degree + 1 :] - grid[1:-degree])
        with np.errstate(invalid="ignore"):
            values = np.where(values[..., :-1] == 0, 0, left * values[..., :-1]) + np.where(
                values[..., 1:] == 0, 0, right * values[..., 1:]
            )
    return values


ACTIVATIONS = {
    "tanh": np.tanh,
    "sigmoid": lambda x: 0.5 * (1 + np.tanh(0.5 * x)),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
}


def sigma(
    z, H, w, *, grid_size=5, order=3, grid_range=(-1.0, 1.0), spline="summed", activation="tanh"
) -> np.ndarray:
    """sigma(z) for z (N, r), H (r, r) or None, w (r, grid_size + order) or None."""
    act = ACTIVATIONS[activation]
    out = np.zeros_like(z, dtype=np.float64)
    for row, point in enumerate(np.asarray(z, dtype=np.float64)):
        for j in range(len(point)):
            if H is not None:
                out[row, j] += act(sum(H[j, i] * act(point[i]) for i in range(len(point))))
            if w is not None:
                channels = range(len(point)) if spline == "summed" else [j]
                out[row, j] += sum(
                    w[j] @ bases(point[i], grid_size, order, *grid_range) for i in channels
                )
    return out
