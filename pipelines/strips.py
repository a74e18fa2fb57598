"""Maps of which only a strip of rows exists at a time, so that a network's memory does not grow with the picture.

`Rows` stands in for a tensor (B, C, H, W). It goes through a network as a tensor does, by torch's function protocol,
and comes out as a description of the result; reading it computes, strip after strip from top to bottom. Each layer
keeps the few rows that the next strip's convolutions still need, so nothing is computed twice, and nothing differs from
the whole map but by rounding. Two kinds of layers look at the whole map:

* Group normalisation. Its statistics are measured on the map itself, for which what it reads is kept until it is read
  again (on the CPU, or in a file), or they are given: measured on windows of the map.
* Attention over all pixels: over all of them, or over pixels whose keys and values are given.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Products of a query and a key, in numbers, that one call of attention may hold.
LARGEST_SCORES = 2**26
# Functions of single pixels, by the names that torch has for them.
# fmt: off
_POINTWISE = frozenset([
    "abs", "add", "bfloat16", "clamp", "clip", "div", "double", "exp", "float", "gelu", "half", "leaky_relu", "log",
    "maximum", "minimum", "mul", "nan_to_num", "neg", "pow", "relu", "rsub", "sigmoid", "silu", "sqrt", "square", "sub",
    "tanh", "to", "true_divide", "type", "where", "__rdiv__", "__rpow__", "__rsub__",
])
# fmt: on
# Those that change nothing here.
_IDENTITY = frozenset(["contiguous", "detach", "dropout", "clone"])


@dataclass
class Work:
    """How the maps of one call of a network are worked on.

    Attributes:
        strips: how many strips a map is cut into where it is read as a whole.
        margin: None for statistics of each picture. Else the batch holds windows of one picture: they are pooled, and
            as much as this share of their height is left out at every side, where a window sees borders that the
            picture has not.
        in_file: keep what is read twice in a temporary file rather than in memory.
        most_keys: how many pixels each attends to at most, spread evenly; None for all.
        statistics: mean and variance (B or 1, groups) of each normalisation, in the order of the network's calls, None
            while they are not known.
        measures: of each normalisation, the pixels of its map and what measures it.
        attended: keys and values (B or 1, pixels, heads, width) of each attention likewise.
    """

    strips: int = 1
    margin: float | None = None
    in_file: bool = False
    most_keys: int | None = None
    statistics: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    measures: list[tuple[int, Callable[[], tuple[Tensor, Tensor]]]] = field(default_factory=list)
    attended: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    def step(self, height: int) -> int:
        """Rows of a strip of a map of this height."""
        return max(1, -(-height // self.strips))

    @property
    def sees_whole_map(self) -> bool:
        """Whether the network has layers that look at the whole map."""
        return bool(self.statistics or self.attended)


class _InFile:
    """A tensor at the end of a temporary file."""

    def __init__(self, tensor: Tensor, file: Any):
        self.shape, self._dtype, self._file = tensor.shape, tensor.dtype, file
        self._start = file.seek(0, 2)
        file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)

    def load(self) -> Tensor:
        self._file.seek(self._start)
        size = self.shape.numel() * self._dtype.itemsize
        return torch.from_numpy(np.fromfile(self._file, np.uint8, size)).view(self._dtype).view(self.shape)


class Rows:
    """A map (B, C, H, W) that is computed strip by strip, from top to bottom, once.

    Args:
        shape: of the map.
        dtype: of its rows.
        device: where they are computed.
        compute: (top, bottom) -> (B, C, bottom - top, W).
        inputs: the maps that `compute` reads.
        reach: the first row of the inputs that row `top` and those below it are made of; None for `top` itself.
        kept: whether rows are kept until all readers have read them. Others are computed for each reader anew, and
            `compute` may be asked for any.
        work: how it is worked on; None for that of the first input.
        align: rows that are kept are computed in multiples of this many.
    """

    # What networks ask of a tensor
    ndim = 4
    requires_grad = False

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        compute: Callable[[int, int], Tensor],
        inputs: Sequence["Rows"] = (),
        reach: Callable[[int], int] | None = None,
        kept: bool = False,
        work: Work | None = None,
        align: int = 1,
    ):
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, torch.device(device)
        self.work: Work = work or (inputs[0].work if inputs else Work())
        self._compute, self._inputs, self._reach, self._kept = compute, tuple(inputs), reach or (lambda top: top), kept
        self._chunks: list[tuple[int, Any]] = []
        self._end = 0
        self._asked: int | None = None
        self._align = align
        self._parked = False
        self._file: Any = None
        self._readers: WeakSet[Rows] = WeakSet()
        for source in self._inputs:
            source._readers.add(self)

    @classmethod
    def of(cls, tensor: Tensor, work: Work | None = None) -> "Rows":
        """A tensor (B, C, H, W) as it is."""
        return cls(tensor.shape, tensor.dtype, tensor.device, lambda top, bottom: tensor[..., top:bottom, :], work=work)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom), (B, C, bottom - top, W), for one who reads in order: those above are dropped."""
        self._asked = top
        result = self.read(top, bottom)
        self._asked = bottom
        self._drop()
        return result

    def strips(self) -> Iterator[tuple[int, Tensor]]:
        """All strips from top to bottom, with the row that each begins at."""
        height, step = self.shape[-2], self.work.step(self.shape[-2])
        for top in range(0, height, step):
            yield top, self.rows(top, min(top + step, height))

    def whole(self) -> Tensor:
        """The map as one tensor, read from its top."""
        result = None
        for top, rows in self.strips():
            if rows.shape[-2] == self.shape[-2]:
                return rows
            if result is None:
                result = rows.new_empty(self.shape)
            result[..., top : top + rows.shape[-2], :] = rows
        assert result is not None
        return result

    def settled(self) -> Tensor:
        """The map as one tensor, which it keeps from now on."""
        tensor = self.whole()
        self._compute, self._kept, self._inputs = (lambda top, bottom: tensor[..., top:bottom, :]), False, ()
        return tensor

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows for another map, whose `reach` says what it will come back for."""
        if not self._kept:
            return self._compute(top, bottom)
        if bottom > self._end:
            end = min(-(-bottom // self._align) * self._align, self.shape[-2])
            self._chunks.append((self._end, self._store(self._compute(self._end, end))))
            self._end = end
            for source in self._inputs:
                source._drop()
        parts = []
        for start, chunk in self._chunks:
            if start < bottom and start + chunk.shape[-2] > top:
                rows = chunk.load() if isinstance(chunk, _InFile) else chunk
                parts.append(rows[..., max(top - start, 0) : bottom - start, :].to(self.device))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _drop(self) -> None:
        """Let go of rows that nobody reads any more."""
        if not self._kept:
            for source in self._inputs:
                source._drop()
            return
        needed, chunks = self._first_needed(), self._chunks
        self._chunks = []
        for start, chunk in chunks:
            height = chunk.shape[-2]
            if start + height <= needed:
                continue
            if isinstance(chunk, Tensor) and needed - start > height // 2:
                # A copy, because a view would hold on to the whole.
                start, chunk = needed, chunk[..., needed - start :, :].clone()
            self._chunks.append((start, chunk))

    def _first_needed(self) -> int:
        """The first row that somebody still reads."""
        needs = [reader._needs() for reader in self._readers]
        if self._asked is not None:
            needs.append(self._asked)
        return min(needs, default=0)

    def _needs(self) -> int:
        """The first row of its inputs that this map still needs."""
        return self._reach(self._end if self._kept else self._first_needed())

    def park(self) -> None:
        """Keep rows where there is room for all of them: they will be read a second time."""
        if self._kept:
            self._parked = True
        else:
            for source in self._inputs:
                source.park()

    def _store(self, rows: Tensor) -> Any:
        if not self._parked:
            return rows
        if not self.work.in_file:
            return rows.cpu()
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="tsdsr-")  # noqa: SIM115  (gone with the last that uses it)
        return _InFile(rows, self._file)

    def _derive(
        self,
        compute: Callable[[int, int], Tensor],
        channels: int | None = None,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        **how: Any,
    ) -> "Rows":
        """A map made of this one, of the same shape and dtype but for what is said."""
        shape = (self.shape[0], channels or self.shape[1], *(size or self.shape[-2:]))
        return Rows(shape, dtype or self.dtype, self.device, compute, (self,), **how)

    # Tensors' ways

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = function.__name__
        if name in _IDENTITY:
            return args[0]
        if name in _POINTWISE:
            return _pointwise(function, args, kwargs)
        if name in _FUNCTIONS:
            return _FUNCTIONS[name](*args, **kwargs)

        def dense(value: Any) -> Any:
            if isinstance(value, Rows):
                return value.settled()
            return type(value)(map(dense, value)) if isinstance(value, list | tuple) else value

        # Anything else sees the whole map.
        return function(*map(dense, args), **{key: dense(value) for key, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        function = None if name.startswith("__") else getattr(Tensor, name, None)
        if not callable(function):
            raise AttributeError(f"a map of rows has no {name!r}")
        return lambda *args, **kwargs: Rows.__torch_function__(function, (), (self, *args), kwargs)

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)

    def __sub__(self, other: Any) -> Any:
        return torch.sub(self, other)

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)

    def __neg__(self) -> Any:
        return torch.neg(self)

    def __rsub__(self, other: Any) -> Any:
        return torch.add(torch.neg(self), other)

    __radd__, __rmul__ = __add__, __mul__

    def __getitem__(self, key: Any) -> "Rows":
        """Rows and columns (and channels) by slices without steps: `[:, :, top:bottom, left:right]`."""
        key = key if isinstance(key, tuple) else (key,)
        if Ellipsis in key:
            at = key.index(Ellipsis)
            key = (*key[:at], *[slice(None)] * (5 - len(key)), *key[at + 1 :])
        key = (*key, *[slice(None)] * (4 - len(key)))
        ranges = [range(*part.indices(side)) for part, side in zip(key, self.shape, strict=True)]
        first = ranges[2].start
        columns = (key[0], key[1], slice(None), key[3])
        shape = [len(part) for part in ranges]
        return Rows(
            shape,
            self.dtype,
            self.device,
            lambda top, bottom: self.read(top + first, bottom + first)[columns],
            [self],
            reach=lambda top: top + first,
        )

    def new_tensor(self, data: Any) -> Tensor:
        return torch.tensor(data, dtype=self.dtype, device=self.device)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    def numel(self) -> int:
        return self.shape.numel()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (with Bessel's correction) of each channel over all pixels, (B, C) in float32.

        The map can be read once more afterwards.
        """
        count = self.shape[-2] * self.shape[-1]
        mean, square = _joined_moments(self, lambda rows, top: rows.float().flatten(2))
        return mean.float().to(self.device), (square / max(1, count - 1)).float().to(self.device)

    def attention(self, processor: Any, attn: Any) -> "Rows":
        """`Attention` of a VAE's middle block over all pixels, or over those whose keys and values are given."""
        work, index, source = self.work, len(self.work.attended), self
        work.attended.append(None)
        norm = attn.group_norm
        normed = self if norm is None else F.group_norm(self, norm.num_groups, norm.weight, norm.bias, norm.eps)
        query_of, output_of = attn.to_q, attn.to_out[0]
        step = work.step(self.shape[-2])

        def tokens(rows: Tensor) -> Tensor:
            return rows.flatten(2).mT

        def keys_and_values() -> tuple[Tensor, Tensor]:
            normed.park()
            pairs = []
            for top in range(0, self.shape[-2], step):
                rows = normed.read(top, min(top + step, self.shape[-2]))
                if work.margin is not None:
                    # Windows of one picture: an even sample of their pixels, without the borders.
                    away = int(self.shape[-2] * work.margin)
                    rows = rows[..., away : rows.shape[-1] - away]
                pairs.append(tuple(layer(tokens(rows)) for layer in (attn.to_k, attn.to_v)))
            key, value = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
            if work.margin is not None:
                key, value = (part.flatten(0, 1)[None] for part in (key, value))
            if work.most_keys is not None:
                every = -(-key.shape[1] // work.most_keys)
                key, value = (part[:, ::every] for part in (key, value))
            return key.unflatten(-1, (attn.heads, -1)), value.unflatten(-1, (attn.heads, -1))

        def compute(top: int, bottom: int) -> Tensor:
            if work.attended[index] is None:
                work.attended[index] = keys_and_values()
            key, value = work.attended[index]  # type: ignore[misc]
            rows = normed.read(top, bottom)
            queries = query_of(tokens(rows)).unflatten(-1, (attn.heads, -1))
            key, value = (part.expand(rows.shape[0], -1, -1, -1) for part in (key, value))
            most = max(1, LARGEST_SCORES // (key.shape[1] * attn.heads * rows.shape[0]))
            attended = torch.cat([processor.attend(part, key, value) for part in queries.split(most, dim=1)], dim=1)
            return output_of(attended).mT.unflatten(-1, rows.shape[-2:])

        def reach(top: int) -> int:
            return 0 if work.attended[index] is None else top

        result = normed._derive(compute, kept=True, reach=reach)
        result = result + source if attn.residual_connection else result
        return result / attn.rescale_output_factor


def per_pixel(function: Callable, *maps: Any) -> Any:
    """`function` of maps (tensors, or `Rows`), which makes each pixel of the pixels of the same place alone."""
    return _pointwise(function, maps, {}) if any(isinstance(each, Rows) for each in maps) else function(*maps)


def _pointwise(function: Callable, args: tuple, kwargs: dict) -> Rows:
    maps = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Rows)]
    first = maps[0]
    height = first.shape[-2]
    kwargs = {key: value for key, value in kwargs.items() if key not in ("inplace", "out")}

    def part(value: Any, top: int, bottom: int) -> Any:
        if isinstance(value, Rows):
            return value.read(top, bottom)
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-2] == height > 1:
            return value[..., top:bottom, :]
        return value

    def compute(top: int, bottom: int) -> Tensor:
        return function(
            *(part(arg, top, bottom) for arg in args),
            **{key: part(value, top, bottom) for key, value in kwargs.items()},
        )

    # What it makes of the dtypes and devices, on a single pixel
    with torch.no_grad():
        pixel = function(*(_pixel(arg) for arg in args), **{key: _pixel(value) for key, value in kwargs.items()})
    return Rows(
        (first.shape[0], pixel.shape[1], *first.shape[-2:]),
        pixel.dtype,
        pixel.device,
        compute,
        maps,
        # What joins two maps is kept, because one of them may be read again for much longer than the other.
        kept=len(maps) > 1,
    )


def _pixel(value: Any) -> Any:
    if isinstance(value, Rows):
        return torch.zeros(1, value.shape[1], 1, 1, dtype=value.dtype, device=value.device)
    return value[:1, ..., :1, :1] if isinstance(value, Tensor) and value.ndim == 4 else value


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


def _conv2d(
    input: Rows,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Rows:
    # Taken out of the module, whose weights may be moved away after its call.
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    (step, step_across), (hole, hole_across) = _pair(stride), _pair(dilation)
    pad, pad_across = (hole * (weight.shape[-2] // 2),) * 2 if padding == "same" else _pair(padding)
    height, width = input.shape[-2:]
    tall, wide = hole * (weight.shape[-2] - 1) + 1, hole_across * (weight.shape[-1] - 1) + 1

    def compute(top: int, bottom: int) -> Tensor:
        first, last = top * step - pad, (bottom - 1) * step - pad + tall
        rows = input.read(max(first, 0), min(last, height))
        above, below = max(-first, 0), max(last - height, 0)
        if above or below:
            rows = F.pad(rows, (0, 0, above, below))
        return F.conv2d(rows, weight, bias, stride, (0, pad_across), dilation, groups)

    return input._derive(
        compute,
        channels=weight.shape[0],
        size=((height + 2 * pad - tall) // step + 1, (width + 2 * pad_across - wide) // step_across + 1),
        reach=lambda top: max(top * step - pad, 0),
        # Functions of single pixels are cheap to repeat where the next layer's strips overlap; this is not.
        kept=True,
    )


def _conv_transpose2d(
    input: Rows, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, *others: Any
) -> Any:
    (step, step_across), (pad, pad_across) = _pair(stride), _pair(padding)
    if others:
        return F.conv_transpose2d(input.settled(), weight, bias, stride, padding, *others)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    height, width = input.shape[-2:]
    tall, wide = weight.shape[-2:]

    def first_of(top: int) -> int:
        """The first row of the input that row `top` is made of."""
        return max(0, -(-(top + pad - tall + 1) // step))

    def compute(top: int, bottom: int) -> Tensor:
        first, last = first_of(top), min(height, (bottom - 1 + pad) // step + 1)
        rows = F.conv_transpose2d(input.read(first, last), weight, bias, stride, (0, pad_across))
        begin = top + pad - first * step
        return rows[..., begin : begin + bottom - top, :]

    return input._derive(
        compute,
        channels=weight.shape[1],
        size=((height - 1) * step + tall - 2 * pad, (width - 1) * step_across + wide - 2 * pad_across),
        reach=first_of,
        kept=True,
    )


def _group_norm(
    input: Rows, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Rows:
    work, index = input.work, len(input.work.statistics)
    channels, height = input.shape[1], input.shape[-2]
    weight = torch.ones(channels) if weight is None else weight.detach()
    bias = torch.zeros(channels) if bias is None else bias.detach()
    line: list[tuple[Tensor, Tensor]] = []

    def measure() -> tuple[Tensor, Tensor]:
        """Mean and variance over the groups' pixels."""

        def groups(rows: Tensor, top: int) -> Tensor:
            if work.margin is not None:
                away = int(height * work.margin)
                rows = rows[..., max(away - top, 0) : max(height - away - top, 0), away : rows.shape[-1] - away]
                # Of all windows together
                rows = rows.transpose(0, 1)[None]
            return rows.reshape(rows.shape[0], num_groups, -1).float()

        inner = height * input.shape[-1]
        if work.margin is not None:
            inner = input.shape[0] * math.prod(side - 2 * int(height * work.margin) for side in input.shape[-2:])
        mean, square = _joined_moments(input, groups)
        return mean, square / (inner * (channels // num_groups))

    work.statistics.append(None)
    work.measures.append((height * input.shape[-1], measure))

    def compute(top: int, bottom: int) -> Tensor:
        if not line:
            if work.statistics[index] is None:
                work.statistics[index] = measure()
            mean, variance = work.statistics[index]  # type: ignore[misc]
            deviation = (variance + eps).rsqrt().repeat_interleave(channels // num_groups, dim=-1)
            slope = weight.double().cpu() * deviation
            offset = bias.double().cpu() - mean.repeat_interleave(channels // num_groups, dim=-1) * slope
            line.append(tuple(part[..., None, None].float().to(input.device) for part in (slope, offset)))  # type: ignore[arg-type]
        rows = input.read(top, bottom)
        return torch.addcmul(line[0][1], rows.float(), line[0][0]).to(rows.dtype)

    def reach(top: int) -> int:
        return top if line else 0

    return input._derive(compute, reach=reach)


def _joined_moments(source: Rows, values: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations in float64, joined strip by strip (Chan, Golub, LeVeque 1979).

    Args:
        source: is read through and can be read once more.
        values: (rows, their first) -> (..., numbers) to take them over.
    """
    source.park()
    count, mean, square = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    height, step = source.shape[-2], source.work.step(source.shape[-2])
    for top in range(0, height, step):
        part = values(source.read(top, min(top + step, height)), top)
        added = part.shape[-1]
        if not added:
            continue
        variance, average = (moment.double().cpu() for moment in torch.var_mean(part, dim=-1, correction=0))
        shift = average - mean
        mean = mean + shift * (added / (count + added))
        square = square + variance * added + shift.square() * (count * added / (count + added))
        count += added
    return mean, square


def _pad(input: Rows, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    if len(pad) > 4 or mode not in ("constant", "replicate", "reflect"):
        return F.pad(input.settled(), pad, mode, value)
    left, right, above, below = (*pad, 0, 0)[:4]
    height, width = input.shape[-2:]

    def compute(top: int, bottom: int) -> Tensor:
        first, last = top - above, bottom - above
        if mode == "reflect":
            # The rows that are mirrored lie within the picture, near its border.
            low = min(max(first, 0), height - 1 - max(last - height, 0) - 1 if last > height else height)
            high = max(min(last, height), -first + 1 if first < 0 else 0)
        else:
            low, high = min(max(first, 0), height - 1), max(min(last, height), 1)
        rows = input.read(max(low, 0), high)
        at = torch.arange(first, last)
        if mode == "reflect":
            at = at.abs()
            at = torch.where(at >= height, 2 * (height - 1) - at, at)
        inside = at.clamp(0, height - 1) - max(low, 0)
        rows = F.pad(rows[..., inside.to(rows.device), :], (left, right, 0, 0), mode, value)
        if mode == "constant":
            outside = (at < 0) | (at >= height)
            if outside.any():
                rows[..., outside.to(rows.device), :] = value or 0.0
        return rows

    # A mirrored border reads again what lies above it.
    again = below + 1 if mode == "reflect" else 1
    return input._derive(
        compute,
        size=(height + above + below, width + left + right),
        reach=lambda top: max(0, min(top - above, height - again)),
    )


def _interpolate(
    input: Rows,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    height, width = input.shape[-2:]
    if size is None:
        size = [int(side * factor) for side, factor in zip((height, width), _scales(scale_factor), strict=True)]
    new_height, new_width = _pair(size)
    if mode == "nearest" and new_height % height == 0 and new_width % width == 0:
        factor = new_height // height

        def repeat(top: int, bottom: int) -> Tensor:
            first, last = top // factor, -(-bottom // factor)
            rows = F.interpolate(input.read(first, last), size=((last - first) * factor, new_width))
            return rows[..., top - first * factor : bottom - first * factor, :]

        return input._derive(repeat, size=(new_height, new_width), reach=lambda top: top // factor)
    if mode != "bicubic" or align_corners:
        return F.interpolate(input.settled(), size, None, mode, align_corners, None, antialias=antialias)

    def bicubic(top: int, bottom: int) -> Tensor:
        rows_of, weights = cubic_weights(height, new_height, top, bottom, antialias)
        first, last = int(rows_of.min()), int(rows_of.max()) + 1
        rows = input.read(first, last).float()
        # Across by torch, down by the same weights.
        rows = F.interpolate(
            rows, (rows.shape[-2], new_width), mode="bicubic", align_corners=False, antialias=antialias
        )
        matrix = torch.zeros(bottom - top, last - first, dtype=torch.float32)
        matrix.scatter_add_(1, rows_of - first, weights)
        return matrix.to(rows.device) @ rows

    return input._derive(
        bicubic,
        size=(new_height, new_width),
        dtype=torch.float32,
        reach=lambda top: (
            int(cubic_weights(height, new_height, top, top + 1, antialias)[0].min()) if top < new_height else height
        ),
    )


def _scales(scale_factor: Any) -> tuple[float, float]:
    return tuple(scale_factor) if isinstance(scale_factor, Sequence) else (scale_factor, scale_factor)


def cubic_weights(length: int, new_length: int, start: int, stop: int, antialias: bool) -> tuple[Tensor, Tensor]:
    """Which pixels of a side, and how much of each, make pixels [start, stop) of the side resized by cubic convolution.

    As torch's `interpolate` has it: Keys' kernel with a = -0.75 and repeated borders; with `antialias` a = -0.5,
    widened where the side shrinks, and cut off at the borders.

    Returns:
        Positions and weights, (stop - start, taps) each.
    """
    scale = length / new_length
    centres = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale
    if antialias:
        support = 2 * max(scale, 1.0)
        a = -0.5
        # Every tap that may count: those beyond the kernel get the weight 0.
        taps = torch.arange(int(2 * support) + 2)
        positions = (centres - support).floor().clamp(min=0)[:, None] + taps
        distance = (positions + 0.5 - centres[:, None]).abs() / max(scale, 1.0)
        weights = _keys(distance, a) * (positions < length)
        weights = weights / weights.sum(dim=1, keepdim=True)
    else:
        positions = (centres - 0.5).floor()[:, None] + torch.arange(-1, 3)
        weights = _keys((positions - (centres[:, None] - 0.5)).abs(), -0.75)
    return positions.long().clamp(0, length - 1), weights.float()


def _keys(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel (IEEE ASSP 29(6), 1981) at distances x."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _chunk(input: Rows, chunks: int, dim: int = 0) -> Any:
    if dim % 4 != 1:
        return input.settled().chunk(chunks, dim)
    each = -(-input.shape[1] // chunks)
    return tuple(input[:, first : first + each] for first in range(0, input.shape[1], each))


_FUNCTIONS: dict[str, Callable] = {
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "group_norm": _group_norm,
    "pad": _pad,
    "interpolate": _interpolate,
    "chunk": _chunk,
}
