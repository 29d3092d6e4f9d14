"""Make a model that was opened ready to decode."""

import logging

from gemmule.inference.huge_pages import move_to_huge_pages
from gemmule.inference.quantize import quantize
from gemmule.inference.runners import Decoding, choose_decoding, slow_decoding_reason
from gemmule.model.finite import refuse_nonfinite_weights
from gemmule.model.gemma3 import Gemma3

log = logging.getLogger(__name__)


def prepare_for_decoding(model: Gemma3, name: str, wanted: Decoding, int8: bool) -> tuple[Gemma3, Decoding]:
    """Return a model with its weights in huge pages, quantized to int8 where asked for, and how it decodes.

    Logs why "auto" cannot use the native step. ModelError, which names the model, where a weight is not finite;
    DeviceError as in `choose_decoding`.
    """
    refuse_nonfinite_weights(model, name)
    model = move_to_huge_pages(quantize(model) if int8 else model)
    if wanted == "auto" and (reason := slow_decoding_reason(model)):
        log.info(f"note: {reason}; decoding is slower without the native step")
    return model, choose_decoding(model, wanted)
