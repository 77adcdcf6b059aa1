"""How transformers' own `from_pretrained` reaches fp4moe's loading: an HfQuantizer.

Written against transformers 5.17 to 5.23. The quantizer only forwards steps to loading.py;
registering it is explicit (`fp4moe.register_transformers`), but for METHOD, which
`fp4moe.from_pretrained` uses.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from ..checkpoint.compressed_tensors import is_read
from ..checkpoint.header import read_json
from ..checkpoint.huggingface import HUGGINGFACE_METHODS
from ..checkpoint.modelopt import MODELOPT_METHODS, announces_nvfp4, resembles_modelopt
from ..errors import refuse
from ..models.quantized import METHOD, findable, quantizer_classes
from .loading import Loading
from .parallelism import check_parallelism
from .placeholder import Options

__all__ = ["METHOD", "register_formats", "register_method"]

FILE = "hf_quant_config.json"
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


@functools.cache
def _classes() -> tuple[Any, Any]:
    """Make the classes that derive from transformers'."""
    config_class, quantizer_class = quantizer_classes()

    class Fp4MoeQuantizer(quantizer_class):  # type: ignore[misc, valid-type]
        """Hands the steps of from_pretrained to a Loading."""

        def __init__(self, quantization_config, **kwargs):
            super().__init__(quantization_config, **kwargs)
            quantize = not self.pre_quantized or quantization_config.entries.get("float", False)
            # transformers then casts as for float models, loads one tensor after the other, and
            # leaves what it does not know alone.
            self.pre_quantized: bool = False
            self.loading = Loading(quantization_config.options or Options(), quantize)

        def validate_environment(self, *args, device_map=None, **kwargs) -> None:
            if isinstance(device_map, dict) and "disk" in device_map.values():
                refuse(
                    "from_pretrained",
                    "device_map cannot name the disk",
                    "packed experts cannot be offloaded",
                    "Name devices that hold them.",
                )

        def _process_model_before_weight_loading(
            self, model, checkpoint_files=None, dtype=None, **kwargs
        ):
            config = getattr(model.config, "distributed_config", None)
            # A dictionary is what an earlier run left in config.json, and asks for nothing.
            check_parallelism(None if isinstance(config, dict) else config)
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

    return config_class, findable(__name__, Fp4MoeQuantizer)


def __getattr__(name: str) -> Any:
    # A process that unpickles a model has not made the class yet.
    if name == "Fp4MoeQuantizer":
        return _classes()[1]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _claim(method: str) -> None:
    from transformers.quantizers import auto

    registries: tuple[Any, Any] = (
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
        auto.AUTO_QUANTIZER_MAPPING,
    )
    for registry, kind in zip(registries, _classes(), strict=True):
        if registry.setdefault(method, kind) is not kind:
            refuse(
                "register_transformers",
                f"the quantization method {method!r} cannot be registered",
                f"{registry[method].__name__} is registered under that name",
                "Call fp4moe.from_pretrained, which does not need it.",
            )


def register_method() -> None:
    """Register the quantizer under METHOD, for fp4moe.from_pretrained; safe to repeat."""
    _claim(METHOD)


def register_formats() -> None:
    """Register it for ModelOpt's files, compressed-tensors' and transformers' own; safe to repeat.

    Of compressed-tensors those of a format that is read here: the others stay with transformers'
    own quantizer, as do all methods that are not named here, and whatever is loaded with a
    quantization_config of transformers' own as an argument. Configurations are then read together
    with ModelOpt's hf_quant_config.json, which transformers alone does not open: it would leave
    the experts random.

    Raises:
        UnsupportedError: another quantizer claims ModelOpt's files.
    """
    for method in MODELOPT_METHODS:
        _claim(method)
    _read_hf_quant_config()
    _share("compressed-tensors", is_read)
    for method in HUGGINGFACE_METHODS:
        _share(method, lambda entry: True)
    _respect_arguments()


def _share(method: str, is_ours: Callable[[dict[str, Any]], bool]) -> None:
    """Take over what is ours of a method that transformers has a quantizer for."""
    from transformers.quantizers import auto

    config_class, quantizer_class = _classes()
    configs: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers: Any = auto.AUTO_QUANTIZER_MAPPING
    if method not in configs:
        # A version of transformers that does not have it yet.
        _claim(method)
        return
    other_config, other_quantizer = configs[method], quantizers[method]
    if other_config is config_class or getattr(other_config, "for_fp4moe", False):
        return

    class SharedConfig(other_config):  # type: ignore[misc, valid-type]
        for_fp4moe = True
        plain = other_config

        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            kind = config_class if is_ours(config_dict) else other_config
            return kind.from_dict(config_dict, **kwargs)

    def make_quantizer(quantization_config, **kwargs):
        ours = isinstance(quantization_config, config_class)
        return (quantizer_class if ours else other_quantizer)(quantization_config, **kwargs)

    configs[method], quantizers[method] = SharedConfig, make_quantizer


def _respect_arguments() -> None:
    """Give a configuration of transformers' own, passed as an argument, its own quantizer."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    plain = AutoHfQuantizer.merge_quantization_configs
    if hasattr(plain, "for_fp4moe"):
        return

    def merge(quantization_config, quantization_config_from_args):
        if isinstance(quantization_config, dict):
            method = str(quantization_config.get("quant_method"))
            shared: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
            own = getattr(shared, "plain", None)
            if own is not None and isinstance(quantization_config_from_args, own):
                quantization_config = own.from_dict(quantization_config)
        return plain(quantization_config, quantization_config_from_args)

    merge.for_fp4moe = True  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge)  # type: ignore[method-assign]


def _read_hf_quant_config() -> None:
    from transformers import PreTrainedConfig

    plain: Any = PreTrainedConfig.get_config_dict.__func__  # type: ignore[attr-defined]
    if hasattr(plain, "for_fp4moe"):
        return

    def get_config_dict(cls, name, **kwargs):
        config, unused = plain(cls, name, **kwargs)
        entry = _entry(config)
        known = _has_quantizer(entry)
        if known and (entry.get("quant_method") in MODELOPT_METHODS or is_read(entry)):
            return config, unused
        content = None if os.path.isfile(name) else _hf_quant_config(name, config, kwargs, known)
        if content is not None and (not known or announces_nvfp4(content)):
            config["quantization_config"] = content | {"quant_method": "modelopt"}
        elif not known and resembles_modelopt(entry):
            # Claimed, whatever its name: loading reads it, or says what it is.
            config["quantization_config"] = entry | {"quant_method": "modelopt"}
        return config, unused

    get_config_dict.for_fp4moe = True  # type: ignore[attr-defined]
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[assignment]


def _entry(config: dict[str, Any]) -> dict[str, Any]:
    """The quantization entry where transformers looks for it; {} where there is none."""
    entry, text = config.get("quantization_config"), config.get("text_config")
    if entry is None and isinstance(text, dict):
        entry = text.get("quantization_config")
    return entry if isinstance(entry, dict) else {}


def _has_quantizer(entry: dict[str, Any]) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if entry.get("load_in_8bit") or entry.get("load_in_4bit"):
        return True  # bitsandbytes: transformers adds the rest of its name
    method = entry.get("quant_method")
    return isinstance(method, str) and method in AUTO_QUANTIZATION_CONFIG_MAPPING


def _hf_quant_config(
    name: Any, config: dict[str, Any], kwargs: Any, known: bool
) -> dict[str, Any] | None:
    """The content of hf_quant_config.json beside a configuration, None where there is none.

    Where another quantizer is known to load the model, the hub need not answer.
    """
    from transformers.utils import cached_file

    hub = {key: kwargs[key] for key in HUB if kwargs.get(key) is not None}
    hub["_commit_hash"] = config.get("_commit_hash")
    flags = ("missing_entries", *(("connection_errors", "gated_repo") if known else ()))
    hub |= {f"_raise_exceptions_for_{flag}": False for flag in flags}
    file = cached_file(name, FILE, **hub)
    return None if file is None else read_json(file)
