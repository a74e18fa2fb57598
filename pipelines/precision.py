"""Redo in float32 what overflowed in half precision, without touching the network's weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# Said once to whoever runs the pipeline: what it had to do differently.
announce = getLogger("tsdsr").warning

PARTS = {"encode": "VAE's encoder", "step": "network of the one step", "decode": "VAE's decoder"}
_HALF = (torch.float16, torch.bfloat16)


class InFloat32(TorchFunctionMode):
    """While it is on, every torch function computes in float32: inputs and weights in half precision are cast as they
    come.

    Weights are cast one layer at a time and stay what they are, so that a network takes no second copy of itself. Casts
    to half precision become casts to float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self._paused = False

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # Attributes (shape, dtype, device) are asked of the tensor as it is.
        if self._paused or function.__name__ in ("__get__", "__set__"):
            return function(*args, **kwargs)
        if function.__name__ in ("half", "bfloat16"):
            return args[0].float()
        args, kwargs = tree_map(_widen, (args, kwargs))
        return function(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is called from within and is not to be redone."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _HALF:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value


class Overflowed(ArithmeticError):
    """A network made NaN or Inf of a strip, and the rest of its map is to be redone."""

    def __init__(self, stage: str):
        super().__init__(stage)
        self.stage = stage


class Precision:
    """Which networks of one picture have overflowed.

    Args:
        announced: stages that were spoken of already.

    Attributes:
        redone: stages that run in float32 from now on.
    """

    def __init__(self, announced: set[str]):
        self.redone: set[str] = set()
        self._announced = announced

    def run(self, stage: str, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`network(x)`, in float32 where its result would not be finite.

        Raises:
            ValueError: if it is not finite in float32 either.
        """
        result = network(x)
        if is_finite(result):
            return result
        self._announce(stage, result)
        with InFloat32():
            result = network(x)
        return self._finite(stage, result)

    def check(self, stage: str, rows: Tensor) -> None:
        """Of a strip that was computed.

        Raises:
            Overflowed: where it is not finite, and may be in float32.
            ValueError: where it was computed in float32.
        """
        if is_finite(rows):
            return
        if stage in self.redone:
            self._finite(stage, rows)
        self._announce(stage, rows)
        self.redone.add(stage)
        raise Overflowed(stage)

    def _announce(self, stage: str, result: Tensor) -> None:
        if result.dtype not in _HALF:
            self._finite(stage, result)
        if stage not in self._announced:
            self._announced.add(stage)
            name = str(result.dtype).removeprefix("torch.")
            announce("The %s overflowed in %s; what failed is computed again in float32.", PARTS[stage], name)

    @staticmethod
    def _finite(stage: str, result: Tensor) -> Tensor:
        if not is_finite(result):
            raise ValueError(
                f"The {PARTS[stage]} makes NaN or Inf even in float32: its weights or its LoRA are damaged or do not"
                " belong to this model; download or convert them again."
            )
        return result


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no Inf in it."""
    return bool(torch.isfinite(tensor).all())
