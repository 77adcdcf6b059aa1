"""fp4moe.from_pretrained: a checkpoint directory, or a repository of the hub, as a model.

Everything but the experts and the other quantised Linears is loaded by transformers; see
pretrained/quantizer.py. Only safetensors and JSON are read, no code of a checkpoint is run unless
the caller passes trust_remote_code.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from ..checkpoint.files import CheckpointFiles
from ..checkpoint.naming import FLOAT
from ..checkpoint.readers import convention_of
from ..errors import CheckpointError, UnsupportedError, check_choice, must, refuse
from ..formats import DEFAULT_FORMAT, FORMATS
from ..kernels import DEFAULT_HIDDEN_ALIGNMENT, HIDDEN_ALIGNMENTS, ROUTINGS, check_kernel_name
from ..models.from_config import model_class
from ..models.replace import replace_moe
from ..models.sharding import is_supported
from ..models.split_experts import register_gather
from ..models.transformers_registry import register_experts
from ..module import FusedExperts
from .parallelism import check_parallelism
from .placeholder import Options
from .quantizer import METHOD, register_formats, register_method

__all__ = ["from_pretrained", "register_transformers"]

HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
# Other forms of the same weights.
LEFT = ["*/*", "consolidated*.safetensors"]
REFUSED = ("quantization_config", "state_dict", "gguf_file", "variant", "subfolder")


def register_transformers() -> None:
    """Make `experts_implementation="fp4moe"` and quantised checkpoints known to transformers.

    "fp4moe" packs experts as NVFP4, "fp4moe_fp8", "fp4moe_fp8_channel", "fp4moe_fp8_block",
    "fp4moe_mxfp8" and "fp4moe_mxfp4" as these. From transformers 5.23 on, expert parallelism can be
    `ep_implementation="fp4moe_gather"`: the tokens of all processes are gathered, each runs its
    experts on them, and the sums are scattered, in one graph.

    Its own `from_pretrained` then loads what `fp4moe.from_pretrained` reads with fused experts,
    those checkpoints too whose only word of it is hf_quant_config.json, unless it is handed a
    quantization_config of its own; float checkpoints stay float. Safe to repeat; importing fp4moe
    alone registers nothing with transformers.

    Raises:
        UnsupportedError: another library has registered ModelOpt's method.
    """
    import transformers

    register_experts()
    register_formats()
    if is_supported(transformers.__version__):
        register_gather()


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    kernel: str = "auto",
    format: str | None = None,
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
    routing: str = "given",
    progress: bool = True,
    **hf_kwargs: Any,
) -> Any:
    """Load a model with fused experts.

    Quantised checkpoints of ModelOpt, of compressed-tensors, and of transformers' `quant_method`
    fp8, mxfp8 and mxfp4 are taken as they are: experts become packed buffers, other quantised
    Linears become PackedLinear (NVFP4Linear, FP8Linear). The experts of a float checkpoint are
    quantised one after the other while it is read, with method "max".

    Args:
        path_or_id: a directory, or the name of a repository on the Hugging Face hub.
        kernel: see `fp4moe.replace_moe`. On a GPU "auto" also rounds the activations of FP8
            experts if the checkpoint says so (W8A8); "triton" never does.
        hidden_alignment: see `fp4moe.replace_moe`.
        routing: see `fp4moe.replace_moe`.
        progress: see `fp4moe.replace_moe`.
        format: what the experts of a float checkpoint are quantised to, a name of
            `fp4moe.formats.FORMATS`; default "nvfp4". Stored formats stay as they are.
        hf_kwargs: for transformers' from_pretrained: dtype, device_map, attn_implementation,
            trust_remote_code and others; of these revision, token, cache_dir, local_files_only and
            force_download go to the download. Names of the configuration override it.
            distributed_config (transformers 5.23 and newer) and tp_plan="auto" split the model over
            the processes that call this: experts by intermediate columns (tp_size), in whole blocks
            of the format, or by experts (ep_size), and quantised Linears by rows or columns.
            Of quantised checkpoints, and of float ones by experts, each process reads its part.

    Returns:
        The model of the class that config.json names, in evaluation mode.

    Raises:
        CheckpointError: files are unsafe or damaged, a tensor is missing, unexpected, there twice,
            of a wrong shape or not finite, or the quantisation is unknown; processes have other
            files or options, or another process has failed. No model is returned.
        ShapeError: the sizes of a distributed_config do not fit the processes or the experts.
        UnsupportedError: no kernel for the experts, experts of another form, offloading, a split
            that packed modules do not have (pp_size, other plans, older transformers), an argument
            that does not go with this loader, or a format for weights that are quantised already.
    """
    check_kernel_name(kernel, caller="from_pretrained")
    caller = "from_pretrained"
    if format is not None:
        check_choice("format", format, FORMATS, caller=caller)
    check_choice("hidden_alignment", hidden_alignment, HIDDEN_ALIGNMENTS, caller=caller)
    check_choice("routing", routing, ROUTINGS, caller=caller)
    for name in REFUSED:
        if hf_kwargs.get(name):
            must(
                f"from_pretrained: {name}",
                "not be given",
                repr(str(hf_kwargs[name])[:100]),
                "Pass a directory or repository that holds one checkpoint.",
                error=UnsupportedError,
            )
    if not hf_kwargs.pop("use_safetensors", True):
        must(
            "from_pretrained: use_safetensors",
            "not be False",
            "False",
            "Pickle files are never opened.",
            error=UnsupportedError,
        )
    check_parallelism(
        hf_kwargs.get("distributed_config"),
        tp_plan=hf_kwargs.get("tp_plan"),
        tp_size=hf_kwargs.get("tp_size"),
    )
    directory = _directory(path_or_id, hf_kwargs)
    files = CheckpointFiles.open(directory)
    is_float = convention_of(files.quantization) is FLOAT
    if format is not None and not is_float:
        refuse(
            caller,
            f"the experts of {directory!r} cannot be quantised to {format}",
            "they are quantised already and stay as they are stored",
            "Leave format out, or load the float checkpoint.",
        )
    format = format or DEFAULT_FORMAT
    import transformers

    register_method()
    if is_supported(transformers.__version__):
        register_gather()
    config = _config(transformers, directory, hf_kwargs)
    options = Options(kernel, hidden_alignment, routing, progress, files, format)
    config.quantization_config = {
        "quant_method": METHOD,
        "float": is_float,
        "fp4moe_options": options,
    }
    kind = model_class(transformers, config, bool(hf_kwargs.get("trust_remote_code")))
    result = kind.from_pretrained(directory, config=config, use_safetensors=True, **hf_kwargs)
    model = result[0] if isinstance(result, tuple) else result
    if getattr(model.config.quantization_config, "quant_method", None) != METHOD:
        refuse(
            "from_pretrained",
            "the model cannot be loaded",
            f"{kind.__name__} does not load through fp4moe's quantizer",
            "Use transformers 5.17 to 5.24.",
            error=CheckpointError,
        )
    if is_float and not any(isinstance(module, FusedExperts) for module in model.modules()):
        # Experts in a ModuleList are known by their numbers only, once they are loaded.
        replace_moe(
            model,
            kernel,
            progress=progress,
            format=format,
            hidden_alignment=hidden_alignment,
            routing=routing,
        )
    return result


def _directory(path_or_id: str | os.PathLike[str], hf_kwargs: dict[str, Any]) -> str:
    path = os.fspath(path_or_id)
    hub = {name: hf_kwargs.pop(name) for name in HUB if name in hf_kwargs}
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or path.startswith((".", "/", "~")) or os.path.isabs(path):
        must(
            "from_pretrained: path_or_id",
            "be a directory or the name of a repository",
            f"{path!r}, which is neither",
            "Check the path.",
            error=CheckpointError,
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = DOWNLOADED + (["*.py"] if hf_kwargs.get("trust_remote_code") else [])
    try:
        return snapshot_download(path, allow_patterns=patterns, ignore_patterns=LEFT, **hub)
    except HFValidationError as error:
        must(
            "from_pretrained: path_or_id",
            "be a directory or the name of a repository",
            f"{path!r}, which is no directory here and no such name",
            "Check the path.",
            error=CheckpointError,
            cause=error,
        )
    except OSError as error:  # what huggingface_hub raises of the network and of its cache
        why = " ".join(str(error).split())[:300]
        must(
            "from_pretrained: path_or_id",
            "be a directory or a repository that is in the cache or can be fetched",
            f"{path!r}, which is no directory here: {why.rstrip('.')}",
            "Check the path, or the name and the connection.",
            error=CheckpointError,
            cause=error,
        )


def _config(transformers: Any, directory: str, hf_kwargs: dict[str, Any]) -> Any:
    config = hf_kwargs.pop("config", None)
    if isinstance(config, transformers.PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        trust = {name: hf_kwargs[name] for name in ("trust_remote_code",) if name in hf_kwargs}
        config = transformers.AutoConfig.from_pretrained(config or directory, **trust)
    own = {"dtype", "torch_dtype", "distributed_config"}
    for name in set(hf_kwargs) & set(config.to_dict()) - own:
        setattr(config, name, hf_kwargs.pop(name))
    return config
