"""The arguments of the ops local_implicit, local_texture and mlp: bounds checks, and what decides on the backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inr_kernels._core import dispatch
from inr_kernels._core.checks import require, require_match, require_tensor, shape

ACTIVATIONS = ("relu", "gelu")  # of mlp, at the index of the value of `Activation` in csrc/inr.h


@dataclass(frozen=True)
class Facts(dispatch.Facts):
    """Device, dtype, the widths of the layers, from the hoisted one on, and the place of the ensemble."""

    widths: tuple[int, ...] = ()
    ensemble_first: bool = False

    @property
    def form(self) -> str:
        """The width of the layers before the last, and the ensemble's place."""
        if len(self.widths) < 2:
            return ""
        place = "first" if self.ensemble_first else "last"
        return f"width {dispatch.up_to(max(self.widths[:-1]), 64, 128, 256)}, ensemble {place}"


class Arguments(NamedTuple):
    """The arguments of local_implicit before `backend`, as its schema orders them (op)."""

    hoisted: torch.Tensor  # [B, rows, w, N1]
    y: torch.Tensor  # [B, R, S] float32, any strides
    x: torch.Tensor  # [B, R, S] float32, any strides
    cell: torch.Tensor | None  # [B, R, S, 2] float32, any strides
    position_weight: torch.Tensor  # [N1, 2 or 4]
    weights: Sequence[torch.Tensor]  # weights[i]: [N(i + 2), N(i + 1)]
    biases: Sequence[torch.Tensor]  # biases[i]: [N(i + 2)]
    height: int  # of the whole map
    band_start: int  # its row that is the first of hoisted
    local_ensemble: bool
    ensemble_first: bool

    @property
    def texture(self) -> bool:
        """Whether the first layer is LTE's."""
        return False

    @property
    def channels(self) -> int:
        """N1, the channels of the first layer's output."""
        return self.hoisted.shape[-1]

    def facts(self) -> Facts:
        """What decides on the backend."""
        widths = self.channels, *map(len, self.weights)
        return Facts(self.hoisted.device, self.hoisted.dtype, widths, self.ensemble_first)

    def out_shape(self) -> tuple[int, ...]:
        """[B, R, S, out_channels]."""
        return *self.y.shape, self.weights[-1].shape[0]

    def to(self, dtype: torch.dtype) -> "Arguments":
        """With the map and the parameters in `dtype`; the coordinates stay float32."""
        return self._replace(
            hoisted=self.hoisted.to(dtype),
            position_weight=self.position_weight.to(dtype),
            weights=[w.to(dtype) for w in self.weights],
            biases=[b.to(dtype) for b in self.biases],
        )

    def check(self) -> None:
        """Raises unless the tensors fit each other and the map, which keeps kernels in bounds."""
        hoisted, cell, weights, biases = self.hoisted, self.cell, self.weights, self.biases
        require_tensor(hoisted, "hoisted", dims=(4,))
        batch, rows, width, _ = hoisted.shape
        channels = self.channels
        dtype, device = hoisted.dtype, hoisted.device
        require(rows and width, "hoisted", "have at least one pixel, [B, rows, w, N1]", shape(hoisted))
        fits = 0 <= self.band_start <= self.height - rows
        require(fits, "band_start", f"place {rows} rows within the map's height {self.height}", self.band_start)
        require(self.y.dim() == 3, "y", "have shape [B, R, S]", shape(self.y))
        queries = (batch, *self.y.shape[1:])
        require_match(self.y, "y", queries, torch.float32, device)
        require_match(self.x, "x", queries, torch.float32, device)
        cell_columns = 0
        if cell is not None:
            require_match(cell, "cell", (*queries, 2), torch.float32, device)
            cell_columns = 2
        position = (channels, 2 if self.ensemble_first else 2 + cell_columns)
        if self.texture:
            fits = hoisted.shape[-1] > 0 and hoisted.shape[-1] % 4 == 0
            require(fits, "hoisted", "have 4 K > 0 channels, [B, rows, w, 4 K]", shape(hoisted))
            require(cell is not None, "cell", "be a tensor", cell)
            require(not self.ensemble_first, "ensemble_first", "be False", self.ensemble_first)
            position = (channels // 2, 2)
        require_match(self.position_weight, "position_weight", position, dtype, device)
        require(weights, "weights", "hold at least one Linear weight", len(weights))
        check_count(weights, biases)
        inputs = channels + (cell_columns if self.ensemble_first else 0)
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            check_layer(i, weight, bias, inputs, hoisted)
            check_dtypes(i, weight, bias, "hoisted", dtype)
            inputs = len(weight)

    def check_gradient(self, grad: torch.Tensor) -> None:
        """Raises unless `grad` is like the output."""
        require_match(grad, "grad", self.out_shape(), self.hoisted.dtype, self.hoisted.device)


class TextureArguments(Arguments):
    """The arguments of local_texture: hoisted [B, rows, w, 4 K] as in `reference.decode_texture`, N1 = 2 K.

    position_weight is the weight of the phase, [K, 2]; there is always a cell, and the ensemble is after the layers.
    """

    __slots__ = ()

    @property
    def texture(self) -> bool:
        """Whether the first layer is LTE's."""
        return True

    @property
    def channels(self) -> int:
        """N1, the channels of the first layer's output."""
        return self.hoisted.shape[-1] // 2


def check_count(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
    """Raises unless there is one bias per weight."""
    if len(biases) != len(weights):
        require(False, "biases", f"be as many as the {len(weights)} weights", len(biases))


def check_layer(
    index: int, weight: torch.Tensor, bias: torch.Tensor, inputs: int, like: torch.Tensor, note: str = ""
) -> None:
    """Raises unless weights[index] takes `inputs` channels, on like's device, and biases[index] fits it.

    note: explains `inputs` in the error.
    """
    for value, name, dims in ((weight, "weights", 2), (bias, "biases", 1)):
        require_tensor(value, f"{name}[{index}]", dims=(dims,), like=like)
    if weight.shape[1] != inputs or len(weight) < 1:
        require(False, f"weights[{index}]", f"have shape [N, {inputs}]{note}, N > 0", shape(weight))
    if len(bias) != len(weight):
        require(False, f"biases[{index}]", f"have shape [{len(weight)}]", shape(bias))


def check_dtypes(index: int, weight: torch.Tensor, bias: torch.Tensor, owner: str, dtype: torch.dtype) -> None:
    """Raises unless weights[index] and biases[index] have `dtype`, that of the argument `owner`."""
    for value, name in ((weight, "weights"), (bias, "biases")):
        if value.dtype != dtype:
            require(False, f"{name}[{index}]", f"have {owner}'s dtype {dtype}", value.dtype)


@dataclass(frozen=True)
class MlpFacts(dispatch.Facts):
    """Device, dtype and the number of layers."""

    depth: int = 1


class MlpArguments(NamedTuple):
    """mlp's arguments before `backend`, as its schema orders them (op/mlp.py)."""

    x: torch.Tensor  # [..., C]
    weights: Sequence[torch.Tensor]  # [O_i, O_{i - 1}], O_0 = C
    biases: Sequence[torch.Tensor]  # [O_i]
    norm_weight: torch.Tensor | None  # [C]
    norm_bias: torch.Tensor | None  # [C]
    add: torch.Tensor | None  # [..., O_n]
    activation: str
    eps: float

    def facts(self) -> MlpFacts:
        """What decides on the backend."""
        return MlpFacts(self.x.device, self.x.dtype, len(self.weights))

    def out_shape(self) -> tuple[int, ...]:
        """[..., O_n]."""
        return *self.x.shape[:-1], len(self.weights[-1])

    def check(self) -> None:
        """Raises unless the options are valid and the tensors fit them, which keeps kernels in bounds."""
        require_tensor(self.x, "x")
        require(self.x.dim() and self.x.shape[-1], "x", "have a last dimension of at least 1", shape(self.x))
        require(len(self.weights), "weights", "have at least one entry", "none")
        matches = len(self.biases) == len(self.weights)
        require(matches, "biases", f"have as many entries as weights, {len(self.weights)}", len(self.biases))
        require(
            self.activation in ACTIVATIONS, "activation", f"be one of {', '.join(ACTIVATIONS)}", repr(self.activation)
        )
        like, inputs = (self.x.dtype, self.x.device), self.x.shape[-1]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            require_tensor(weight, f"weights[{i}]", dims=(2,))
            require(len(weight), f"weights[{i}]", "have at least one row", shape(weight))
            require_match(weight, f"weights[{i}]", (len(weight), inputs), *like)
            inputs = len(weight)
            require_match(bias, f"biases[{i}]", (inputs,), *like)
        for tensor, name in ((self.norm_weight, "norm_weight"), (self.norm_bias, "norm_bias")):
            if tensor is not None:
                require_match(tensor, name, (self.x.shape[-1],), *like)
        alone = self.norm_weight is None and self.norm_bias is not None
        require(not alone, "norm_bias", "be given with norm_weight", "it alone")
        if self.add is not None:
            require_match(self.add, "add", self.out_shape(), *like)
