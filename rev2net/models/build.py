"""From a configuration to its network."""

from __future__ import annotations

import logging

from torch import nn

from rev2net.config import Config
from rev2net.models.actionflownet import R3D18, ActionFlowNet
from rev2net.models.dann import DomainDiscriminator
from rev2net.models.heads import EncoderOnly, Network
from rev2net.models.i3d import I3D
from rev2net.models.imagenet import load_imagenet
from rev2net.models.off import OFF
from rev2net.models.rev2net import Rev2Net
from rev2net.models.stm import STM
from rev2net.models.tsm import TSM
from rev2net.models.tsn import TSN

log = logging.getLogger("rev2net")

IMAGE_NETWORKS = {"tsn": TSN, "tsm": TSM, "stm": STM, "off": OFF}


def build_encoder(config: Config, num_classes: int) -> nn.Module:
    """The network that is left at test time.

    Raises:
        UserError: a backbone that the network cannot stand on.
    """
    model = config.model
    channels = {"rgb": 3, "flow": 2}[model.input]
    if model.name in ("rev2net", "i3d"):
        return I3D(
            num_classes,
            channels,
            model.width,
            dropout=model.dropout,
            activation_checkpointing=model.activation_checkpointing,
        )
    if model.name == "actionflownet":
        return R3D18(num_classes, channels, model.width, dropout=model.dropout)
    network: type[nn.Module] = IMAGE_NETWORKS[model.name]
    return network(
        num_classes,
        channels,
        stack=config.data.stack,
        backbone=model.backbone,
        dropout=model.dropout,
        partial_bn=model.partial_bn,
    )


def build_network(config: Config, num_classes: int) -> Network:
    """The network in training: ImageNet start, configured decoders and domain discriminator included.

    Raises:
        UserError: as `build_encoder`, or the ImageNet weights are missing or of another network.
    """
    encoder = build_encoder(config, num_classes)
    if config.model.imagenet is not None:
        log.info("starting from ImageNet: %s", load_imagenet(encoder, config.model.imagenet))
    clip = (config.data.frames, config.data.size, config.data.size)
    network: Network
    if isinstance(encoder, I3D):
        decoders = config.decoders
        network = Rev2Net(
            encoder,
            clip,
            flow_decoder="flow" in decoders,
            frame_decoder="frame" in decoders,
            hidden=config.model.decoder_channels,
            skip=config.model.decoder_skip,
            noise=config.model.latent_noise,
        )
    elif isinstance(encoder, R3D18):
        network = ActionFlowNet(encoder, clip)
    else:
        network = EncoderOnly(encoder)
    if config.target.dann:
        network.discriminator = DomainDiscriminator(encoder.feature_channels, config.target.hidden)  # type: ignore[arg-type]
    return network
