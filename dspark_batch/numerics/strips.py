"""A product in strips of columns: what a kernel adds in another order at its edges is left out.

Example: OpenBLAS's kernels for AVX2 multiply twelve rows by up to 320 columns at a time. In the
first eight of these columns and in the last eight, the first six rows are added in another order
than the last six. In all others, the order is the same.

So a weight lies in strips that overlap by 16 columns, with zeros in front of the first one and
behind the last. Each strip is a product of its own, and gives the columns between its edges.
`numerics.rows` finds out whether that helps on a machine.
"""

import mlx.core as mx

_EDGE = 8  # columns
_MOST = 320  # columns of a strip, with its edges: OpenBLAS takes so many at a time


class Strips:
    """The strips of a weight.

    Args:
        weight: [N, K].

    Attributes:
        weight: the same values, in the memory of the strips. It takes the place of the one given.
    """

    def __init__(self, weight: mx.array) -> None:
        width, size = weight.shape
        count, self._step = _cut(width)
        behind = count * self._step - width + _EDGE
        laid = mx.contiguous(mx.pad(weight, [(_EDGE, behind), (0, 0)]))
        shape = (count, self._step + 2 * _EDGE, size)
        self._strips = mx.as_strided(laid, shape, (self._step * size, size, 1))
        self.weight = laid[_EDGE : _EDGE + width]
        mx.eval(self._strips, self.weight)

    def multiply(self, rows: mx.array) -> mx.array:
        """Multiply rows [M, K]; [M, N] without gaps."""
        width = self.weight.shape[0]
        products = rows[None] @ self._strips.swapaxes(-1, -2)
        if len(products) == 1:
            return mx.contiguous(products[0, :, _EDGE : _EDGE + width])
        inner = products[..., _EDGE : _EDGE + self._step].swapaxes(0, 1)
        joined = mx.contiguous(inner).reshape(len(rows), -1)
        return joined if joined.shape[1] == width else mx.contiguous(joined[:, :width])


def _cut(width: int) -> tuple[int, int]:
    """Say how many strips give so many columns, and how many columns each gives.

    As few as can be, or half as many more if these give no column too much.
    """
    fewest = -(-width // (_MOST - 2 * _EDGE))
    for count in range(fewest, fewest + fewest // 2 + 1):
        if width % (count * _EDGE) == 0:
            return count, width // count
    return fewest, -(-width // (fewest * _EDGE)) * _EDGE
