"""Tools that pair state_dict and buffers by name: accelerate's offloading, EMA, functional_call.

The expected logits are those of an untouched copy of the model: nothing here may change a number.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_models import enlarge_experts, gemma4, nemotron_h, qwen3_moe
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from turned_kernel import layouts  # noqa: F401

import fp4moe
from fp4moe.errors import UnsupportedError

accelerate = pytest.importorskip("accelerate", reason="optional package")
hooks = accelerate.hooks
IDS = torch.arange(1, 25).reshape(2, 12)
CPU = torch.device("cpu")
BUILDS = {"qwen3_moe": qwen3_moe, "gemma4": gemma4}
pytestmark = pytest.mark.usefixtures("layouts")


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def parts(model):
    return [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]


@pytest.fixture(params=BUILDS)
def model(request):
    return fp4moe.replace_moe(enlarge_experts(BUILDS[request.param]()), progress=False)


def emptied(model):
    """A copy whose weights are all zero."""
    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *(b for part in parts(other) for b in part.buffers())):
        tensor.data.zero_()
    return other


def test_no_buffer_bears_the_name_of_a_logical_tensor(model, layouts):  # noqa: F811
    state = model.state_dict()
    for path, module in model.named_modules():
        if not isinstance(module, fp4moe.FusedExperts):
            continue
        names = {f"{path}.{name}" for name, _ in module.named_buffers()}
        assert names and names.isdisjoint(state)
        # The attributes of those names show what the state_dict holds.
        shared = module.gate_up_packed.data_ptr() == module.prepared_gate_up_packed.data_ptr()
        assert shared == (layouts == "logical layout")
        assert torch.equal(module.gate_up_packed, state[f"{path}.gate_up_packed"])
        assert module.down_block_scale.dtype == torch.float8_e4m3fn
        with pytest.raises(UnsupportedError, match="gate_up_packed cannot be set alone"):
            module.gate_up_packed = torch.zeros(1)


def cpu_offload(model, buffers, directory):
    return accelerate.cpu_offload(model, CPU, offload_buffers=buffers)


def cpu_offload_of_a_state_dict(model, buffers, directory):
    state = model.state_dict()
    return accelerate.cpu_offload(model, CPU, offload_buffers=buffers, state_dict=state)


def disk_offload(model, buffers, directory):
    return accelerate.disk_offload(model, directory, CPU, offload_buffers=buffers)


def dispatch(model, buffers, directory):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True, offload_buffers=buffers)


def dispatch_to_disk(model, buffers, directory):
    places = {"model": "disk", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, places, offload_dir=directory, offload_buffers=buffers)


OFFLOADS = (cpu_offload, cpu_offload_of_a_state_dict, disk_offload, dispatch, dispatch_to_disk)


@pytest.mark.slow
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda f: f.__name__)
def test_offloading_changes_no_number(model, offload, buffers, tmp_path):
    expected = logits(model)
    offload(model, buffers, tmp_path)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
def test_load_checkpoint_and_dispatch_without_a_device_map(model, tmp_path):
    expected, target = logits(model), emptied(model)
    torch.save(model.state_dict(), str(tmp_path / "pytorch_model.bin"))
    assert not torch.allclose(logits(target), expected)
    accelerate.load_checkpoint_and_dispatch(target, str(tmp_path / "pytorch_model.bin"))
    assert torch.equal(logits(target), expected)
    accelerate.dispatch_model(target, {"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(target), expected)


def test_load_checkpoint_and_dispatch_tensor_by_tensor_is_refused(model, tmp_path):
    torch.save(model.state_dict(), str(tmp_path / "pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"^FusedExperts\(.* does not have a .* gate_up_packed"):
        accelerate.load_checkpoint_and_dispatch(
            emptied(model), str(tmp_path / "pytorch_model.bin"), device_map={"": "cpu"}
        )


def test_functional_call(model):
    expected = logits(model)

    def call(tensors):
        args = (tensors, (IDS,), {"use_cache": False})
        with torch.no_grad():
            return torch.func.functional_call(model, *args, tie_weights=False).logits

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(call(tensors), expected)
    with pytest.raises(
        (UnsupportedError, RuntimeError), match=r"give torch\.func\.functional_call"
    ):
        call(model.state_dict())
    assert torch.equal(logits(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
def test_averaged_model(model, average):
    averaged = AveragedModel(emptied(model), multi_avg_fn=average)
    for _ in range(3):
        averaged.update_parameters(model)
    assert torch.equal(logits(averaged.module), logits(model))


def test_an_average_of_state_dicts_loads(model):
    expected, target = logits(model), emptied(model)
    shadow = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    for name, tensor in model.state_dict().items():
        shadow[name].copy_(tensor)
    target.load_state_dict(shadow)
    assert torch.equal(logits(target), expected)


def test_writes_into_a_state_dict_reach_the_kernel_or_are_refused(model, layouts):  # noqa: F811
    expected, target = logits(model), emptied(model)
    source = model.state_dict()
    with torch.no_grad():
        state = target.state_dict()
        for name, tensor in state.items():
            tensor.copy_(source[name])
    if layouts == "layout of its own":
        for use in (logits, lambda m: m.state_dict()):
            with pytest.raises(UnsupportedError, match=r"gate_up_packed, .* were written to"):
                use(target)
        copied = pickle.loads(pickle.dumps(target))
        assert not torch.allclose(logits(copied), expected)
        target.load_state_dict(state)
    assert torch.equal(logits(target), expected)
    # Reading alone is no reason to refuse.
    assert all(tensor is not None for tensor in target.state_dict().values())
    assert torch.equal(logits(target), expected)


def test_a_distributed_checkpoint_state_dict(model):
    expected, target = logits(model), emptied(model)
    set_model_state_dict(target, get_model_state_dict(model))
    assert torch.equal(logits(target), expected)


# Hooks of accelerate at the time of replacing.


@pytest.mark.slow
@pytest.mark.parametrize("build", [qwen3_moe, gemma4, nemotron_h], ids=lambda f: f.__name__)
def test_hooks_that_only_move_tensors_go_over_to_the_fused_experts(build):
    model = enlarge_experts(build())
    expected = logits(fp4moe.replace_moe(copy.deepcopy(model), progress=False))
    # Leaves the class's forward on every instance.
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hooks.remove_hook_from_module(model, recurse=True)
    # What a dispatch to a GPU does below each of its modules.
    hooks.attach_execution_device_hook(model, "cpu", tied_params_map={})
    assert fp4moe.explain(model).count("replaceable") == 2
    fp4moe.replace_moe(model, progress=False)
    assert torch.equal(logits(model), expected)
    for part in parts(model):
        assert type(part._hf_hook) is hooks.AlignDevicesHook
        assert part._hf_hook.execution_device == "cpu" and part._hf_hook.tied_params_map is None
    copied = copy.deepcopy(model)
    emptied(model)
    assert torch.equal(logits(copied), expected)
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), expected)


class Doubling(hooks.ModelHook):
    def post_forward(self, module, output):
        return 2 * output


class DoublingWhileMoving(hooks.AlignDevicesHook):
    def post_forward(self, module, output):
        return 2 * super().post_forward(module, output)


@pytest.mark.parametrize("hook", [Doubling(), DoublingWhileMoving("cpu")], ids=["own", "derived"])
def test_hooks_that_do_more_are_refused(hook):
    model = qwen3_moe()
    experts = model.model.layers[0].mlp.experts
    hooks.add_hook_to_module(experts, hook)
    expected = logits(model)
    with pytest.raises(UnsupportedError, match="it has forward hooks, which would be lost"):
        fp4moe.replace_moe(model, progress=False)
    assert torch.equal(logits(model), expected)
    hooks.add_hook_to_module(experts, hooks.AlignDevicesHook("cpu"), append=True)
    with pytest.raises(UnsupportedError, match="it has forward hooks, which would be lost"):
        fp4moe.replace_moe(model, progress=False)
