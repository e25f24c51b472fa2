"""One function per pipeline step: (its folder, inputs, settings). The only place where disk meets models."""

from collections.abc import Callable
from dataclasses import dataclass

from tag2mask.data.source import Source
from tag2mask.pipeline import Stage
from tag2mask.stages.affinity import check_irn, check_psa, irn, psa
from tag2mask.stages.amn import amn, amn_maps, check_amn
from tag2mask.stages.attention import attention, check_attention, check_integrate, integrate
from tag2mask.stages.background import check_background
from tag2mask.stages.cams import cams
from tag2mask.stages.classify import check_classifier, classify
from tag2mask.stages.clip_es import check_clip_es, clip_es
from tag2mask.stages.context import Context
from tag2mask.stages.crf import crf
from tag2mask.stages.evaluate import check_split, evaluate_classifier, evaluate_maps, evaluate_masks
from tag2mask.stages.few_masks import check_few_masks, few_masks
from tag2mask.stages.labels import labels
from tag2mask.stages.pacam import check_pacam, pacam
from tag2mask.stages.segment import check_segmenter, predict, segment
from tag2mask.stages.walk import walk


@dataclass(frozen=True)
class StageKind:
    """What a recipe can `do`.

    function: does it. preflight: looks at (source, stage) before any stage runs and raises UserError for what the
    signature cannot tell: a backbone that does not exist, images to score that will have no mask. version: raised by
    hand when the meaning of the output changes.
    """

    function: Callable[..., None]
    preflight: Callable[[Source, Stage], None] | None = None
    version: int = 1


STAGES = {
    "classify": StageKind(classify, check_classifier),
    "attention": StageKind(attention, check_attention),
    "integrate": StageKind(integrate, check_integrate),
    "cams": StageKind(cams),
    "clip_es": StageKind(clip_es, check_clip_es),
    "pacam": StageKind(pacam, check_pacam),
    "amn": StageKind(amn, check_amn),
    "amn_maps": StageKind(amn_maps),
    "psa": StageKind(psa, check_psa),
    "irn": StageKind(irn, check_irn),
    "walk": StageKind(walk),
    "labels": StageKind(labels, check_background),
    "crf": StageKind(crf, check_background),
    "segment": StageKind(segment, check_segmenter),
    "few_masks": StageKind(few_masks, check_few_masks),
    "predict": StageKind(predict),
    "evaluate_classifier": StageKind(evaluate_classifier),
    "evaluate_maps": StageKind(evaluate_maps, check_split),
    "evaluate_masks": StageKind(evaluate_masks, check_split),
}

__all__ = ["STAGES", "Context", "StageKind"]
