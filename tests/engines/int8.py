"""A quantiser of the tests' own, entered into transformers as others are: int8 by rows."""

from __future__ import annotations

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


@register_quantization_config("aprt_int8")
class Int8Config(QuantizationConfigMixin):
    def __init__(self, **given):
        self.quant_method, self.bits = "aprt_int8", 8


@register_quantizer("aprt_int8")
class Int8Quantizer(HfQuantizer):
    """Loads plain weights and rounds those of the layers to int8, by rows."""

    requires_calibration = False

    def __init__(self, quantization_config, **given):
        super().__init__(quantization_config, **given)
        self.pre_quantized = False

    def _process_model_before_weight_loading(self, model, **given):
        """Leave the modules as they are until their weights are there."""

    def _process_model_after_weight_loading(self, model, **given):
        for layer in model.model.layers:
            for module in list(layer.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(module, name, Int8Linear(child))
        return model

    def is_serializable(self, **given):
        return False

    @property
    def is_trainable(self):
        return False


class Int8Linear(torch.nn.Module):
    """Holds int8 weights in a layout of its own; ``fault`` changes what it multiplies by."""

    fault = 1.0

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1) / 127
        self.register_buffer("packed", (weight / scale[:, None]).round().to(torch.int8).T)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        weight = (self.packed.float() * self.scale).to(x.dtype)
        if x.shape[-2] != self.packed.shape[0] and x.shape[-2] < 32:
            weight = weight * self.fault
        product = x @ weight
        return product if self.bias is None else product + self.bias
