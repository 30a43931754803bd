"""TRIPLEX: a spot, the tiles around it and its whole slide, fused.

After Chung, Ha, Im & Lee 2024, *Accurate Spatial Gene Expression Prediction by Integrating
Multi-Resolution Features* (CVPR). The trunk is :class:`seq2expr.model.multiscale.MultiScale`; a
linear head reads what it fuses. Each scale has a head of its own that learns with it, and from it
(see :class:`seq2expr.model.multiscale_system.MultiScaleSystem`).

The preset ``faithful`` counts errors in units of the targets and reads features as they are, as
published; by default genes count alike and features are standardised. In both,

- an answer in evaluation is always the same: in the authors' code dropout stays on in the slide
  encoder (a module that does not pass evaluation mode on), so that answers differ from run to run;
- tiles outside the picture count in no mean; there the head of the window sees them, as black;
- the positional block looks spots up, where there their order and a sum other than 0 matter;
- one turn serves a patch and the tiles around it; there the patch alone is turned;
- the best epoch is chosen on validation spots, never on those that are tested.

Without window and slide (``use_window`` and ``use_slide`` false) what is left is a regression on
the patch, like ST-Net, through the blocks of the fusion.
"""

from typing import ClassVar

from seq2expr.model.multiscale_system import MultiScaleConfig, MultiScaleSystem


class TriplexConfig(MultiScaleConfig):
    """Configuration of TRIPLEX: that of its trunk."""

    model_type: ClassVar[str] = "triplex"


class Triplex(MultiScaleSystem):
    """Predict by three scales.

    Parameters
    ----------
    config
        A :class:`TriplexConfig` whose data fields are filled in.
    """

    config_class = TriplexConfig

    def __init__(self, config: TriplexConfig):
        super().__init__(config)
        self.build_trunk()
        self.build_heads()
        self.post_init()


SYSTEM = Triplex
