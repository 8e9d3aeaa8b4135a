"""The sizes and thresholds of the Visual Genome detector: the published ones are the defaults.

Source: Anderson et al., "Bottom-Up and Top-Down Attention" (CVPR 2018), and the network description and test settings
that its authors released with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

PIXEL_MEAN = (102.9801, 115.9465, 122.7717)  # blue, green, red, of 0 to 255; nothing is divided by


@dataclass(frozen=True)
class DetectorConfig:
    """Tests make it narrow and short; weight files fit the defaults alone."""

    # ResNet-101 as He et al. released it for Caffe
    stem_width: int = 64
    width: int = 64  # of the first bottlenecks; doubles with every stage
    blocks: tuple[int, int, int, int] = (3, 4, 23, 3)  # of res2 to res5
    # Region proposals (Ren et al., 2015)
    stride: int = 16  # pixels per cell of res4
    proposal_width: int = 512
    anchor_scales: tuple[int, ...] = (4, 8, 16, 32)  # sides in units of the stride
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height by width
    proposals_before_nms: int = 6000
    proposals: int = 300
    proposal_nms: float = 0.7
    smallest_proposal: int = 16  # pixels of the photo as it was before scaling
    # Heads
    pooled: int = 14  # cells a side that a region is pooled to
    classes: int = 1601  # 1,600 objects, and the background at 0
    attributes: int = 401  # 400, and "none" at 0; 0 where the file has no attribute head
    embedding: int = 256
    attribute_width: int = 512
    # Photos
    shorter_side: int = 600
    longer_side: int = 1000  # at most
    # Which regions are given
    class_nms: float = 0.3
    confidence: float = 0.2
    least_regions: int = 10
    most_regions: int = 100

    @property
    def expansion(self) -> int:
        """Output channels of a bottleneck by its inner ones."""
        return 4

    @property
    def grid_width(self) -> int:
        """Channels of res4, which regions are pooled from: 1,024."""
        return self.width * 4 * self.expansion

    @property
    def feature_width(self) -> int:
        """Numbers per region: 2,048."""
        return self.width * 8 * self.expansion

    @property
    def anchors(self) -> int:
        """Anchors per cell: 12."""
        return len(self.anchor_scales) * len(self.anchor_ratios)
