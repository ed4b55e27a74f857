"""The structure of a DEAR."""

from dataclasses import dataclass

from inr_kernels._core.checks import require

# alpha, beta, gamma of `elementwise_filter`, so that it gives Z + K_hp * Z.
HIGH_PASS = {"delta": (2, 0, -1), "ones": (1, 1, -1)}
CHOICES = {
    "fill": ("zeros", "smooth"),
    "norm": ("instance", "none"),
    "high_pass": tuple(HIGH_PASS),
    "softmax": ("taps", "all"),
    "padding": ("reflect", "replicate", "zeros"),
}


@dataclass(frozen=True)
class DEARConfig:
    """The structure of a DEAR. The paper leaves many choices open; the defaults follow the code that its group
    published before (MISF, CVPR 2022) and after (SAIR, ECCV 2024) it, unless the paper says otherwise.

    Args:
        channels: of the latent Z; a quarter and a half of them before the two strided convolutions. 256: MISF and SAIR.
        features: of F and E, and between the two convolutions of the importance branch. 64: MISF and SAIR.
        blocks: ResNet blocks of the encoder. 8: the paper.
        filter_blocks: of the filter branch, an encoder "of similar architecture". 8: as the encoder.
        fill: what the encoders see at missing pixels. "zeros": the paper; "smooth": a smooth continuation S of the
            surroundings; the implicit function then adds to the bicubic interpolation of S, so that a short training
            is enough.
        norm: "instance", in the ResNet blocks only, as SAIR, or "none". Before the decoder a norm would remove what the
            literal high-pass filter amplifies.
        filter_size: K_z of the high-pass filters. 3: MISF and SAIR.
        high_pass: "delta", delta - softmax, which removes the mean, as the filters that the paper cites; "ones", the
            paper's literal 1 - softmax, whose taps sum to K_z² - 1.
        softmax: over the "taps" of each filter, which are then positive with sum 1, or over "all" channels, the other
            reading of the paper.
        padding: of the filtered latent. "reflect": constants stay constant at the border; "zeros": MISF.
        importance_size: K of the kernels that reconstruct a pixel from its neighbours. 3: MISF's on images.
        mask_keys: whether attention leaves out the keys of missing pixels, too. False: eq. 7; True: the paper's text.
        hidden: widths of the implicit function's hidden layers. Four of 256: the paper's "four-layer MLP with 256
            latent dimensions", counted as SAIR does.
        feat_unfold: whether the implicit function sees a 3 x 3 neighbourhood. False: eq. 1 lists one pixel.
        cell_decode: whether it sees the size of an output pixel. False: eq. 1 lists none.
        feature_relu: whether F is ReLU of the decoder's output. An addition; the paper names no activation.
        importance_sigmoid: whether W is in (0, 1), by a sigmoid. An addition; the paper's eq. 9 has the convolution
            alone.
        dse, use, pim: the parts that the ablation of the paper's table 5 leaves out: the high-pass filter of Z, the
            attention E, the kernels K with their map W. All False: its "base".

    Strides: the paper has convolutions of 7, 4 and 4 with "strides set to 2", but only two transposed convolutions back
    to the image's size; the 7 x 7 one has stride 1 here, as in MISF and SAIR.

    Raises:
        ValueError: a value that is not supported.
    """

    channels: int = 256
    features: int = 64
    blocks: int = 8
    filter_blocks: int = 8
    fill: str = "zeros"
    norm: str = "instance"
    filter_size: int = 3
    high_pass: str = "delta"
    softmax: str = "taps"
    padding: str = "reflect"
    importance_size: int = 3
    mask_keys: bool = False
    hidden: tuple[int, ...] = (256, 256, 256, 256)
    feat_unfold: bool = False
    cell_decode: bool = False
    feature_relu: bool = True
    importance_sigmoid: bool = True
    dse: bool = True
    use: bool = True
    pim: bool = True

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            value = getattr(self, name)
            require(value in values, name, f"be one of {', '.join(values)}", repr(value))
        fits = self.channels > 0 and self.channels % 4 == 0
        require(fits, "channels", "be a positive multiple of 4", self.channels)
        for name in ("filter_size", "importance_size"):
            side = getattr(self, name)
            require(side > 0 and side % 2 == 1, name, "be odd and positive", side)

    @property
    def depth(self) -> int:
        """The number of repeated layers, each of which has tensors in the state dict."""
        return self.blocks + self.filter_blocks + len(self.hidden)


SMALL = DEARConfig(
    channels=64, features=32, blocks=6, filter_blocks=1, fill="smooth", norm="none", hidden=(128, 128, 128)
)
