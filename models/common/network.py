"""What networks share: config and checkpoint (`Network`), and the interface of those that inpaint (`Inpainter`).

An inpainting network implements `encode` and `decode`; `predict`, `forward`, `inpaint` and `graphed` follow.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import nn

from inr_kernels._core.checks import require
from inr_kernels.local_implicit.functional import WORKSPACE

from . import checkpoints, hub
from .frozen import frozen_copy
from .graphs import Graphed, graphed_pair
from .masking import blend, check_mask, check_range, check_weights, output_size
from .progress import Progress, reporting, shares

WEIGHTS = Path(__file__).parents[1] / "weights"

N = TypeVar("N", bound="Network")
P = TypeVar("P", bound="Inpainter")
Features: TypeAlias = torch.Tensor | tuple[Any, ...]


class Network:
    """A network with a config (a dataclass) that is stored in one file. A mixin for nn.Module.

    Class attributes of a network:
        NETWORK: its name in checkpoints and error messages.
        CONFIG: the class of its config.
        ALIASES: names of it in files of other projects, in lower case.
        KEY: a state-dict key that no earlier network has; it identifies files without a name.
        PRETRAINED: the checkpoint that ships with the package, or None.
        READS: files of other projects that `from_checkpoint` opens, for its errors.

    Attributes:
        config: what fixes its structure.
        notes: any JSON value that a checkpoint stores with the parameters, such as the training recipe.
    """

    NETWORK: ClassVar[str]
    CONFIG: ClassVar[Callable[..., Any]]
    ALIASES: ClassVar[tuple[str, ...]] = ()
    KEY: ClassVar[str]
    PRETRAINED: ClassVar[Path | None] = None
    READS: ClassVar[str] = ""

    config: Any
    notes: Any

    def save(self, path: checkpoints.FilePath, notes: Any = None, dtype: torch.dtype | None = None) -> None:
        """Writes a safetensors file with the parameters, the network's name, config and notes, atomically.

        Args:
            path: of the file; an existing one is replaced.
            notes: any JSON value; None: the network's own.
            dtype: of the parameters in the file, a floating-point torch.dtype; None: their own.

        Raises:
            OSError: the file cannot be written.
            TypeError: notes is no JSON value, or dtype no torch.dtype.
            ValueError: dtype is not a floating-point type.
        """
        checkpoints.save(self, path, self.notes if notes is None else notes, dtype)

    @classmethod
    def from_checkpoint(cls: type[N], path: checkpoints.FilePath, **options: Any) -> N:
        """Opens what `save` wrote, in eval mode, on the CPU, with parameters in the default dtype.

        Args:
            path: of the file.
            options: DEAR, IN2 and ImplicitAutoencoder: `eager=True`, the network in plain PyTorch. LaMa: `activation`,
                the activation on the output where the file does not name it ("sigmoid" by default). LIIF: none.

        Raises:
            OSError: the file cannot be read.
            TypeError: the network does not have this option, or path is no path.
            ValueError: the option cannot have this value; or the file is damaged, or not a checkpoint of this network:
                the message says what was found, and what is readable.
        """
        cls._check_options(options)
        with checkpoints.errors(path, cls):
            contents = checkpoints.read(path)
        return cls._from_contents(path, contents, options)

    @classmethod
    def _from_contents(cls: type[N], path: checkpoints.FilePath, contents: checkpoints.Contents, options: Any) -> N:
        """`from_checkpoint` of a file that has been read."""
        reading, making = cls._check_options(options)
        make: Callable[..., Any] = cls
        with checkpoints.errors(path, cls):
            checkpoint = cls._read(contents, **reading)
            return checkpoints.build(checkpoint, contents.size, cls, lambda config: make(config, **making))

    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits the options of `from_checkpoint` into those of `_read` and of the class; TypeError for others."""
        of_read, of_class = (inspect.signature(function).parameters for function in (cls._read, cls))
        named = {name for name, parameter in of_class.items() if parameter.kind != parameter.VAR_KEYWORD}
        supported = (of_read.keys() | named) - {"contents", "config"}
        if unknown := sorted(options.keys() - supported):
            names = ", ".join(sorted(supported)) or "none"
            raise TypeError(f"{cls.NETWORK} has no option {', '.join(unknown)}; its options are: {names}")
        reading, making = ({k: v for k, v in options.items() if k in names} for names in (of_read, of_class))
        cls.CONFIG(**reading)  # options of `_read` are entries of the config, which checks their values
        return reading, making

    @classmethod
    def pretrained(cls: type[N], **options: Any) -> N:
        """Opens the small network that ships with the package, in eval mode; options: as `from_checkpoint`.

        Raises:
            TypeError: the network does not have this option.
            ValueError: none ships for this network.
        """
        if cls.PRETRAINED is None:
            raise ValueError(f"no {cls.NETWORK} checkpoint ships with the package; from_checkpoint opens your own")
        return cls.from_checkpoint(cls.PRETRAINED, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> str | None:
        """Writes a folder as the Hugging Face Hub has them, which need not be uploaded; needs the extra `hub`.

        Args:
            folder: is made; holds model.safetensors, the file that `save` writes and `from_checkpoint` opens,
                config.json, and a model card, README.md, unless there is one.
            options: of `huggingface_hub.PyTorchModelHubMixin.save_pretrained`, such as push_to_hub=True.

        Returns:
            The address of the commit if it was uploaded, else None.

        Raises:
            ImportError: huggingface_hub is not installed.
            OSError: the folder cannot be written or uploaded.
        """
        return hub.save(self, folder, options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what `save_pretrained` writes to the repository "user/name"; returns the address of the commit.

        Options: of `huggingface_hub.PyTorchModelHubMixin.push_to_hub`. Errors: as `save_pretrained`.
        """
        return hub.push(self, repo_id, options)

    @classmethod
    def from_pretrained(
        cls: type[N],
        name: str | os.PathLike[str],
        *,
        filename: str = hub.FILE,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> N:
        """Opens a file of a local folder or of a repository of the Hugging Face Hub; needs the extra `hub`.

        Args:
            name: the folder, or "user/name".
            filename: any file that `from_checkpoint` opens.
            revision, token, cache_dir, force_download, local_files_only: of `huggingface_hub.hf_hub_download`.
            options: of `from_checkpoint`.

        Raises:
            ImportError: huggingface_hub is not installed.
            OSError: there is no such file, or it cannot be fetched.
            TypeError, ValueError: as `from_checkpoint`.
        """
        cls._check_options(options)
        how = {"revision": revision, "token": token, "cache_dir": cache_dir}
        how |= {"force_download": force_download, "local_files_only": local_files_only}
        return cls.from_checkpoint(hub.fetch(name, filename, how), **options)

    @classmethod
    def _read(cls, contents: checkpoints.Contents) -> checkpoints.Checkpoint:
        """Finds the checkpoint in a file; a network with further formats or options overrides this."""
        if checkpoint := checkpoints.parse(contents, cls.NETWORK):
            return checkpoint
        raise checkpoints.Unreadable("its metadata has no config")


class Inpainter(Network, nn.Module):
    """The interface of a network that fills the missing pixels of an image. The same in DEAR, IN2, LaMa and
    ImplicitAutoencoder:

        encode(image, mask) -> features       decode(features, size) -> prediction
        predict = decode(encode(image, mask), size), for all pixels, differentiable
        forward = predict, with the known pixels of the input where the output has the input's size
        inpaint = forward in [0, 1], without gradients

    image is [B, 3, H, W], floating point, in [0, 1]; mask [B, 1, H, W] or [B, H, W], bool, integer or floating point,
    1 = missing. `common.masking.check_mask` has the details, and raises the errors. A new network defines `encode`,
    `decode`, `bytes_per_pixel` and, if a pixel of the output needs memory, `bytes_per_output_pixel`.
    """

    bytes_per_output_pixel: int = 0  # working memory of `inpaint` for a pixel of the output

    @property
    def min_side(self) -> int:
        """The shortest side of an image that the network takes, in pixels."""
        return 1

    @property
    def any_size(self) -> bool:
        """Whether it renders other sizes than the image's; if not, `predict` and what follows from it refuse them."""
        return True

    def encode(self, image: torch.Tensor, mask: torch.Tensor) -> Features:
        """Returns what `decode` reads: a tensor or a tuple, whose tensors may be changed (feature refinement).

        Args:
            image: [B, 3, H, W], floating point, in [0, 1]; values under the mask are ignored, NaNs too.
            mask: [B, 1, H, W] or [B, H, W], bool, integer or floating point, 1 = missing.

        Raises:
            TypeError: image or mask is not a tensor of these dtypes.
            ValueError: a shape or device that does not fit, or a side that is too short.
        """
        raise NotImplementedError

    def decode(
        self, features: Any, size: tuple[int, int], *, workspace: int = WORKSPACE, progress: Progress = None
    ) -> torch.Tensor:
        """Renders the features: [B, 3, H', W'] in the network's dtype (autocast's under autocast), not clamped.

        Args:
            features: of `encode`.
            size: (H', W').
            workspace: bytes of working memory that the rendering in bands of rows may use; LaMa, which renders all
                rows at once, does not read it.
            progress: called as progress(done, total), see `common.progress`.
        """
        raise NotImplementedError

    def predict(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        size: tuple[int, int] | None = None,
        *,
        scale: float | None = None,
        progress: Progress = None,
        **options: Any,
    ) -> torch.Tensor:
        """Returns the network's raw output for all pixels, known ones too; what a loss is computed on.

        Args:
            image, mask: as `encode`.
            size: (H', W') of the output; None: the image's.
            scale: instead of size, H' = round(scale H) and W' = round(scale W).
            progress: called as progress(done, total) while encoding and decoding, see `common.progress`.
            options: of `decode`.

        Returns:
            [B, 3, H', W'] in the network's dtype (autocast's under autocast), not clamped.

        Raises:
            TypeError, ValueError: as `encode`; ValueError also for a size or scale that is not positive and finite,
                and for another size than the image's unless `any_size`.
        """
        is_given = size is not None or scale is not None
        size = output_size(image, size, scale)
        if is_given and not self.any_size:
            own = output_size(image, None, None)
            require(size == own, "size", f"be the image's {own}, the only one that this {self.NETWORK} renders", size)
        if progress is None:
            return self.decode(self.encode(image, mask), size, **options)
        encoding, others, decoding = self._work(image, size)
        in_modules, in_encode, in_decode = shares(progress, encoding, others, decoding)
        with reporting(self._encoding_modules, in_modules):
            features = self.encode(image, mask, **({"progress": in_encode} if others else {}))
        return self.decode(features, size, progress=in_decode, **options)

    def _work(self, image: torch.Tensor, size: tuple[int, int]) -> tuple[float, float, float]:
        """The work of `_encoding_modules`, of what `encode` does after them, and of `decode`, in any unit.

        For `progress`. A network that does something after them reports it: its `encode` has an option `progress`.
        """
        return 1, 0, 1

    def _encoding_modules(self) -> Sequence[tuple[nn.Module, float]]:
        """Modules that `encode` runs once each, with their work in any unit, for `progress`."""
        return []

    def forward(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        size: tuple[int, int] | None = None,
        *,
        scale: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Returns `predict` [B, 3, H', W'] in the image's dtype, with the known pixels copied from the image.

        They are copied if the output has the image's size: it is then M prediction + (1 - M) image, and where M = 0
        the image bit for bit. At another size every pixel is the network's. Arguments and errors: as `predict`.
        """
        return self._blended(image, mask, self.predict(image, mask, size, scale=scale, **options))

    @torch.no_grad()
    def inpaint(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        size: tuple[int, int] | None = None,
        *,
        scale: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Returns `forward` without gradients, with the prediction clamped to [0, 1], in bounded working memory.

        Arguments and errors: as `predict`; ValueError also for an image whose known values are not in [0, 1], such as
        0 ... 255 or NaN, and for weights that hold NaN.
        """
        check_range(image, self._mask(image, mask))
        prediction = self.predict(image, mask, size, scale=scale, **options)
        check_weights(self, prediction)
        return self._blended(image, mask, prediction.clamp_(0, 1))

    def _blended(self, image: torch.Tensor, mask: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        prediction = prediction.to(image.dtype)
        if prediction.shape != image.shape:
            return prediction
        return blend(image, self._mask(image, mask).to(image.dtype), prediction)

    def _mask(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Checks both and returns the mask as [B, 1, H, W] in [0, 1]; a network with other limits extends this."""
        return check_mask(image, mask, next(self.parameters()).device, min_side=self.min_side)

    def graphed(
        self, shape: tuple[int, ...], size: tuple[int, int] | None = None, *, scale: float | None = None, **options: Any
    ) -> Graphed:
        """Returns `forward` for images of one shape as a CUDA graph, to be called as (image, mask).

        `Graphed` describes when the graph is captured, and when the plain forward runs instead (on a CPU, always).

        Args:
            shape: [B, 3, H, W] of the image; the mask has [B, 1, H, W].
            size, scale, options: of `forward`.

        Example:
            >>> from inr_kernels.models import IN2, IN2Config
            >>> model = IN2(IN2Config(channels=(16, 16, 32), blocks=1, hidden=(32, 32))).eval()
            >>> fast = model.graphed((1, 3, 32, 48))
            >>> with torch.no_grad():
            ...     fast(torch.rand(1, 3, 32, 48), torch.zeros(1, 1, 32, 48)).shape
            torch.Size([1, 3, 32, 48])
        """
        return graphed_pair(self, shape, size=size, scale=scale, **options)

    def frozen(self: P, workspace: int = WORKSPACE) -> P:
        """Returns a copy in eval mode for gradients of the features only, as feature refinement takes them.

        It shares the memory of the parameters, of which none requires a gradient. Layers may be replaced by equal ones
        that keep less for the backward; a stage in `common.frozen.Recomputed` can be computed again there.

        Args:
            workspace: bytes that layers in bands of rows may use.
        """
        return frozen_copy(self)

    def bytes_per_pixel(self) -> int:
        """Estimates the memory that `inpaint` needs for a pixel of the input, in addition to workspace and output."""
        raise NotImplementedError

    def bytes_per_refined_pixel(self) -> int:
        """Estimates the memory that feature refinement needs for a pixel, in addition to workspace and images."""
        return 3 * (self.bytes_per_pixel() + self.bytes_per_output_pixel)
