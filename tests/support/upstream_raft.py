"""torchvision's RAFT by its names: a forward that calls the function `upsample_flow` for every update of the flow."""

import torch
import torch.nn.functional as F
from torch import nn

SIGN = 1


def upsample_flow(flow, up_mask=None):
    """Eight times as large: by the weights, or bilinear without them."""
    if up_mask is None:
        return 8 * F.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=True)
    batch, _, height, width = flow.shape
    windows = F.unfold(8 * flow, 3, padding=1).view(batch, 2, 9, 1, 1, height, width)
    out = (windows * up_mask.view(batch, 1, 9, 8, 8, height, width).softmax(2)).sum(2)
    return out.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * height, 8 * width)


class RAFT(nn.Module):
    """Its encoders, correlations and update block are one convolution here."""

    def __init__(self, *, large=True):
        super().__init__()
        self.feature_encoder = nn.Conv2d(6, 4, 8, stride=8)
        self.update_block = nn.Conv2d(4, 2, 3, padding=1)
        self.mask_predictor = nn.Conv2d(4, 576, 1) if large else None
        self.calls = 0

    def forward(self, image1, image2, num_flow_updates: int = 12):
        self.calls += 1
        hidden, predictions = self.feature_encoder(torch.cat((image1, image2), 1)), []
        flow = torch.zeros_like(hidden[:, :2])
        for _ in range(num_flow_updates):
            flow = flow + SIGN * self.update_block(hidden)
            hidden = hidden.tanh()
            up_mask = None if self.mask_predictor is None else self.mask_predictor(hidden)
            predictions.append(upsample_flow(flow=flow, up_mask=up_mask))
        return predictions


def blurred(flow, up_mask=None):
    """Another function."""
    return F.avg_pool2d(upsample_flow(flow, up_mask), 3, 1, 1)


def with_mode(flow, up_mask, mode):
    """With another argument."""
    return upsample_flow(flow, up_mask) if mode else flow
