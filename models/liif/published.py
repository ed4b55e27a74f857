"""Reads the checkpoints of other LIIF and LTE implementations: yinboc/liif's, mmagic's and jaewon-lee-b/lte's."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from inr_kernels.local_implicit.module import from_published

from ..common.checkpoints import Checkpoint, Contents, Unreadable, state_dict
from .edsr import MeanShift

# yinboc/liif's encoders, with the defaults of their arguments.
DEFAULTS: dict[str, dict[str, Any]] = {
    "edsr-baseline": {"n_resblocks": 16, "n_feats": 64, "res_scale": 1.0},
    "edsr": {"n_resblocks": 32, "n_feats": 256, "res_scale": 0.1},
    "rdn": {"G0": 64, "RDNkSize": 3, "RDNconfig": "B"},
}
# RDN's two configurations: blocks, convolutions in a block, channels that each of them adds.
RDN_CONFIGS = {"A": (20, 6, 32), "B": (16, 8, 64)}
# mmagic's names of the encoder's layers, and ours. The last convolution of an EDSR is the entry after its blocks.
MMAGIC = {
    r"conv_first": "encoder.head.0",
    r"body\.(\d+)\.conv1": r"encoder.body.\1.body.0",
    r"body\.(\d+)\.conv2": r"encoder.body.\1.body.2",
    r"conv_after_body": "encoder.body.{blocks}",
    r"sfe([12])": r"encoder.SFENet\1",
    r"rdbs\.(\d+)\.layers\.(\d+)\.conv": r"encoder.RDBs.\1.convs.\2.conv.0",
    r"rdbs\.(\d+)\.lff": r"encoder.RDBs.\1.LFF",
    r"gff\.([01])": r"encoder.GFF.\1",
}


def read(contents: Contents, key: str) -> Checkpoint:
    """Returns the checkpoint in a file of yinboc/liif, or in a state dict with its names or mmagic's.

    Args:
        key: a name that every LIIF's state dict has.

    Raises:
        Unreadable: it is none of them, or another network's.
    """
    spec = contents.data.get("model") if isinstance(contents.data, dict) else None
    if isinstance(spec, dict) and "sd" in spec:
        return Checkpoint(_config_of_spec(spec), spec["sd"], {})
    state = state_dict(contents, key)
    blocks = sum(bool(re.fullmatch(r"body\.\d+\.conv1\.weight", name)) for name in state)
    state = {_renamed(name, blocks): value for name, value in state.items()}
    config = _config_of_state(state)
    if config["encoder"] == "edsr":  # mmagic has no mean shifts
        for name, sign in (("sub_mean", -1), ("add_mean", 1)):
            shift = MeanShift(sign).state_dict()
            state = {f"encoder.{name}.{part}": value for part, value in shift.items()} | state
    return Checkpoint(config, state, {})


def read_lte(contents: Contents, key: str) -> Checkpoint:
    """Returns the checkpoint in a file of jaewon-lee-b/lte, LTE or LTE+, or in a state dict with its names.

    Raises:
        Unreadable: it is none of them, or another network's.
    """
    spec = contents.data.get("model") if isinstance(contents.data, dict) else None
    encoder = None
    if isinstance(spec, dict) and "sd" in spec:
        encoder, state = _encoder_of_spec(spec, "lte", "lte-fast"), spec["sd"]
    else:
        state = state_dict(contents, key)
    try:
        decoder = from_published(state)
    except ValueError as error:
        raise Unreadable(str(error).removeprefix("state ")) from error
    state = {name: value for name, value in state.items() if name.startswith("encoder.")} | decoder
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    config = {**(encoder or _encoder_of_state(shapes)), "hidden_dim": shapes["coef.weight"][0]}
    return Checkpoint(config | {"hidden": _hidden(shapes)}, state, {})


def _encoder_of_spec(spec: Mapping[str, Any], *networks: str) -> dict[str, Any]:
    """The encoder's part of the config of {"name": one of networks, "args": ..., "sd": state dict}."""
    if spec.get("name") not in networks:
        raise Unreadable(f"it contains the network {spec.get('name')!r}")
    if not isinstance(spec["sd"], dict) or not all(isinstance(value, torch.Tensor) for value in spec["sd"].values()):
        raise Unreadable("its model's sd is not a state dict of tensors")
    encoder = _entry(_entry(spec, "args"), "encoder_spec")
    name = encoder.get("name")
    if name not in DEFAULTS:
        raise Unreadable(f"its encoder is {name!r}, supported are {', '.join(DEFAULTS)}")
    options = {**DEFAULTS[name], **(encoder.get("args") or {})}
    if not options.get("no_upsampling"):
        raise Unreadable("its encoder has an upsampler")
    return _encoder_config(name, options)


def _config_of_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The config of yinboc/liif's {"name": "liif", "args": ..., "sd": state dict}."""
    config = _encoder_of_spec(spec, "liif")
    args = dict(_entry(spec, "args"))
    imnet = _entry(args, "imnet_spec")
    decoder = _entry(imnet, "args")
    del args["encoder_spec"], args["imnet_spec"]
    if (
        imnet.get("name") != "mlp"
        or decoder.get("out_dim") != 3
        or not isinstance(decoder.get("hidden_list"), list | tuple)
    ):
        raise Unreadable(f"its decoder is not an mlp with three outputs: {dict(imnet)}")
    return {**config, "hidden": decoder["hidden_list"], **args}


def _encoder_config(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    if name != "rdn":
        names = {"n_resblocks": "blocks", "n_feats": "features", "res_scale": "res_scale"}
        return {ours: options[theirs] for theirs, ours in names.items()}
    if options["RDNkSize"] != 3 or options["RDNconfig"] not in RDN_CONFIGS:
        raise Unreadable(f"its RDN is not one of 3 x 3 convolutions and the configuration A or B: {dict(options)}")
    blocks, convolutions, growth = RDN_CONFIGS[options["RDNconfig"]]
    sizes = {"blocks": blocks, "convolutions": convolutions, "growth": growth}
    return {"encoder": "rdn", "features": options["G0"], **sizes}


def _entry(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    entry = values.get(name)
    if not isinstance(entry, dict):
        raise Unreadable(f"its model has no {name}")
    return entry


def _renamed(name: str, blocks: int) -> str:
    """yinboc/liif's name of mmagic's layer; other names are unchanged."""
    layer, _, parameter = name.rpartition(".")
    for pattern, ours in MMAGIC.items():
        if found := re.fullmatch(pattern, layer):
            return f"{found.expand(ours.replace('{blocks}', str(blocks)))}.{parameter}"
    return name


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return sum(bool(re.fullmatch(pattern, name)) for name in shapes)


def _encoder_of_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The encoder's part of the config of a state dict with yinboc/liif's names."""
    if "encoder.SFENet1.weight" in shapes:
        features, growth = shapes["encoder.SFENet1.weight"][0], shapes["encoder.RDBs.0.convs.0.conv.0.weight"][0]
        blocks = _count(shapes, r"encoder\.RDBs\.\d+\.LFF\.weight")
        convolutions = _count(shapes, r"encoder\.RDBs\.0\.convs\.\d+.*weight")
        config = {"encoder": "rdn", "growth": growth, "convolutions": convolutions}
    elif "encoder.head.0.weight" in shapes:
        features = shapes["encoder.head.0.weight"][0]
        blocks = _count(shapes, r"encoder\.body\.\d+\.body\.0\.weight")
        large = DEFAULTS["edsr"]
        same = (blocks, features) == (large["n_resblocks"], large["n_feats"])
        config = {"encoder": "edsr", "res_scale": large["res_scale"] if same else 1.0}
    else:
        raise Unreadable("its encoder is neither an EDSR nor an RDN")
    return {"blocks": blocks, "features": features, **config}


def _hidden(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """The widths of imnet's hidden layers."""
    layers = _count(shapes, r"imnet\.layers\.\d+\.weight")
    return [shapes[f"imnet.layers.{2 * layer}.weight"][0] for layer in range(layers - 1)]


def _config_of_state(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The config of a LIIF's state dict with yinboc/liif's names."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    config = _encoder_of_state(shapes)
    columns, features = shapes["imnet.layers.0.weight"][1], config["features"]
    unfold = columns - 9 * features in (2, 4)
    if not unfold and columns - features not in (2, 4):
        raise Unreadable(f"its imnet has {columns} inputs, which are not {features} features, an offset and a cell")
    cell = columns - (9 if unfold else 1) * features == 4
    return {**config, "hidden": _hidden(shapes), "feat_unfold": unfold, "cell_decode": cell}
