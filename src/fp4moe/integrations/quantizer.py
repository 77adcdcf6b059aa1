"""How transformers' own `from_pretrained` reaches fp4moe's loading: an HfQuantizer.

Written against transformers 5.17 to 5.23. The quantizer only forwards steps to integrations/
loading.py; registering it is explicit (`fp4moe.register_transformers`), but for METHOD, which
`fp4moe.from_pretrained` uses.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import Any

from ..checkpoint.compressed_tensors import is_nvfp4
from ..errors import UnsupportedError
from .loading import Loading, Options
from .parallelism import refuse_parallelism

__all__ = ["METHOD", "register_formats", "register_method"]

# How fp4moe.from_pretrained asks transformers for this quantizer; never written to a file.
METHOD = "fp4moe"
FILE = "hf_quant_config.json"
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


@functools.cache
def _classes() -> tuple[Any, Any]:
    """Make the classes that derive from transformers'."""
    from transformers.quantizers import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Fp4MoeConfig(QuantizationConfigMixin):
        """Holds a checkpoint's own quantization configuration, and how to load it."""

        def __init__(self, quant_method: str = METHOD, **entries: Any):
            self.quant_method: Any = quant_method
            self.options = entries.pop("fp4moe_options", None) or Options()
            self.entries = entries

        @classmethod
        def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
            config = cls(**config_dict)
            return (config, kwargs) if return_unused_kwargs else config

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": self.quant_method, **self.entries}

    class Fp4MoeQuantizer(HfQuantizer):
        """Hands the steps of from_pretrained to a Loading."""

        is_trainable = False
        is_compileable = True

        def __init__(self, quantization_config, **kwargs):
            super().__init__(quantization_config, **kwargs)
            quantize = not self.pre_quantized or quantization_config.entries.get("float", False)
            # transformers then casts as for float models, loads one tensor after the other, and
            # leaves what it does not know alone.
            self.pre_quantized = False
            self.loading = Loading(quantization_config.options, quantize)

        def is_serializable(self) -> bool:
            return False

        def validate_environment(self, *args, device_map=None, **kwargs) -> None:
            if isinstance(device_map, dict) and "disk" in device_map.values():
                raise UnsupportedError(
                    "from_pretrained: device_map must not name the disk; got one that does. "
                    "Packed experts cannot be offloaded."
                )

        def _process_model_before_weight_loading(
            self, model, checkpoint_files=None, dtype=None, **kwargs
        ):
            refuse_parallelism(getattr(model.config, "distributed_config", None))
            self.loading.open(model, checkpoint_files, dtype or model.dtype)
            return model

        def update_weight_conversions(self, weight_conversions, model=None):
            self.loading.make_plan(weight_conversions)
            own = self.loading.model
            adjust = own._adjust_missing_and_unexpected_keys

            def adjust_and_fill(loading_info):
                # The last step of transformers before it hands the model to its devices.
                adjust(loading_info)
                del own._adjust_missing_and_unexpected_keys
                self.loading.fill(loading_info)

            own._adjust_missing_and_unexpected_keys = adjust_and_fill
            # They merge float experts; packed ones, renamed or not, fit no tensor that is left.
            return weight_conversions

        def _process_model_after_weight_loading(self, model, **kwargs):
            self.loading.finish()
            # It holds the model.
            del self.loading
            return model

    return Fp4MoeConfig, Fp4MoeQuantizer


def _claim(method: str) -> None:
    from transformers.quantizers import auto

    registries: tuple[Any, Any] = (
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
        auto.AUTO_QUANTIZER_MAPPING,
    )
    for registry, kind in zip(registries, _classes(), strict=True):
        if registry.setdefault(method, kind) is not kind:
            raise UnsupportedError(
                f"register_transformers: quantization method {method!r} must be free; got "
                f"{registry[method].__name__} there. Call fp4moe.from_pretrained, which does not "
                "need it."
            )


def register_method() -> None:
    """Register the quantizer under METHOD, for fp4moe.from_pretrained; safe to repeat."""
    _claim(METHOD)


def register_formats() -> None:
    """Register it for ModelOpt's files and for compressed-tensors' NVFP4 ones; safe to repeat.

    compressed-tensors' other formats stay with transformers' own quantizer. Configurations are then
    read together with ModelOpt's hf_quant_config.json, which transformers alone does not open: it
    would leave the experts random.

    Raises:
        UnsupportedError: another quantizer claims ModelOpt's files.
    """
    from transformers.quantizers import auto

    _claim("modelopt")
    _read_hf_quant_config()
    config_class, quantizer_class = _classes()
    configs: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers: Any = auto.AUTO_QUANTIZER_MAPPING
    name = "compressed-tensors"
    other_config, other_quantizer = configs[name], quantizers[name]
    if getattr(other_config, "for_fp4moe", False):
        return

    class CompressedTensorsConfig(other_config):  # type: ignore[misc, valid-type]
        for_fp4moe = True

        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            kind = config_class if is_nvfp4(config_dict) else other_config
            return kind.from_dict(config_dict, **kwargs)

    def make_quantizer(quantization_config, **kwargs):
        ours = isinstance(quantization_config, config_class)
        return (quantizer_class if ours else other_quantizer)(quantization_config, **kwargs)

    configs[name], quantizers[name] = CompressedTensorsConfig, make_quantizer


def _read_hf_quant_config() -> None:
    from transformers import PreTrainedConfig
    from transformers.utils import cached_file

    plain: Any = PreTrainedConfig.get_config_dict.__func__  # type: ignore[attr-defined]
    if hasattr(plain, "for_fp4moe"):
        return

    def get_config_dict(cls, name, **kwargs):
        config, unused = plain(cls, name, **kwargs)
        if "quantization_config" not in config and not os.path.isfile(name):
            hub = {key: kwargs[key] for key in HUB if kwargs.get(key) is not None}
            hub["_commit_hash"] = config.get("_commit_hash")
            file = cached_file(name, FILE, _raise_exceptions_for_missing_entries=False, **hub)
            if file is not None:
                content = json.loads(pathlib.Path(file).read_text())
                config["quantization_config"] = {"quant_method": "modelopt", **content}
        return config, unused

    get_config_dict.for_fp4moe = True  # type: ignore[attr-defined]
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[assignment]
