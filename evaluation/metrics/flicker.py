"""How much a film flickers where nothing moves."""

from typing import Any

import numpy as np

# Mean change of a neighbourhood up to which it stands still, in levels. Independent noise of 3 levels on every frame
# changes it by 2 * 3 / sqrt(pi) = 3.4.
_STILL = 4.0
_WINDOW = 5
_LEAST = 0.01
_STRIP = 256


class Flicker:
    """Temporal flicker of an enlarged film, from two consecutive frames at a time.

    Where the source stands still, an enlargement should too. A pixel of the source stands still between two frames if
    its luma changes by at most 4 levels of 255 on average over the 5 x 5 pixels around it; a pixel of the result does
    if the one it lies over does. Over these, and over all pairs of frames,

        flicker = mean |luma(t) - luma(t - 1)| of the result, `source` = the same of the source, in levels,
        ratio = flicker / source.

    A flicker of 0 means that nothing changes where the source stands still; independent noise of s levels on every
    frame gives 2 s / sqrt(pi). A ratio of 1 means that the result changes as much as the source (enlarged, each pixel
    repeated) does itself, 0 that it is steady where the source is not, more than 1 that enlarging adds flicker.

    It is the warping error of Lai et al., "Learning Blind Video Temporal Consistency" (ECCV 2018), for zero motion:
    instead of following an estimated flow it leaves out what moves, and the absolute difference stands for its square.
    """

    def __init__(self, state: dict[str, float] | None = None) -> None:
        """Args:
        state: of an earlier one, to go on from; the last frame it saw is then given again first.
        """
        self._sums = {"result": 0.0, "source": 0.0, "still": 0.0, "seen": 0.0} | (state or {})
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def state(self) -> dict[str, float]:
        """What has been summed so far, as JSON can hold it."""
        return dict(self._sums)

    def add(self, source: np.ndarray, result: np.ndarray) -> None:
        """The next frame: luma of the source (h, w) and of its enlargement (H, W), both 0..255.

        Raises:
            ValueError: a frame of another size than the one before, or a result smaller than its source.
        """
        if source.ndim != 2 or result.ndim != 2 or any(np.less(result.shape, source.shape)):
            raise ValueError(f"flicker compares lumas (h, w) and (H, W), not {source.shape} and {result.shape}.")
        last, self._last = self._last, (source, result)
        if last is None:
            return
        if (last[0].shape, last[1].shape) != (source.shape, result.shape):
            raise ValueError(f"the frames change their size, from {last[0].shape} to {source.shape}.")
        change = np.abs(source - last[0])
        still = _box_mean(change) <= _STILL
        rows, columns = (
            np.arange(size) * small // size for size, small in zip(result.shape, source.shape, strict=True)
        )
        for top in range(0, len(rows), _STRIP):
            strip = slice(top, top + _STRIP)
            mask = still[np.ix_(rows[strip], columns)]
            self._sums["result"] += float(np.abs(result[strip] - last[1][strip])[mask].sum(dtype=np.float64))
            self._sums["source"] += float(change[np.ix_(rows[strip], columns)][mask].sum(dtype=np.float64))
            self._sums["still"] += float(mask.sum())
            self._sums["seen"] += float(mask.size)

    def values(self) -> dict[str, Any]:
        """`flicker` and `source` in levels, `ratio`, and `still`, the share of pixels that were compared.

        None for what is not defined: without two frames or still pixels, and the ratio to a source that changes by less
        than 0.01 levels.
        """
        still, seen = self._sums["still"], self._sums["seen"]
        flicker, source = (self._sums[name] / still if still else None for name in ("result", "source"))
        ratio = flicker / source if flicker is not None and source is not None and source >= _LEAST else None
        return {"flicker": flicker, "source": source, "ratio": ratio, "still": still / seen if seen else None}


def _box_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the window around every pixel, (h, w) to (h, w); at the borders those inside are repeated."""
    padded = np.pad(values.astype(np.float64), _WINDOW // 2, mode="edge")
    for axis in (0, 1):
        sums = np.cumsum(padded, axis=axis)
        sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis)
        length = sums.shape[axis] - _WINDOW
        padded = (sums.take(range(_WINDOW, _WINDOW + length), axis) - sums.take(range(length), axis)) / _WINDOW
    return padded
