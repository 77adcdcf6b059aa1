"""What tests/parallel runs in several processes: `python parallel_checks.py runs.json`.

Each run of the file has a number of processes, a port, one log for each process, and checks with
their arguments. A check that passes prints its name. Imports are done once: processes are forks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings

import torch
import torch.distributed as dist
import transformers
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed import DistributedConfig

import fp4moe
from fp4moe.errors import CheckpointError, Fp4MoeError, ShapeError, UnsupportedError

RANK = WORLD = 0  # set in each process
IDS = (torch.arange(1, 97) * 7 % 119 + 1).reshape(8, 12)
WAYS = {
    "tp": {"tp_size": 2},
    "ep": {"tp_size": 2, "ep_size": 2},
    "exchange": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "own": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "fp4moe_gather"},
    "own4": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4, "ep_implementation": "fp4moe_gather"},
}
KINDS = {"tp": "intermediate columns", "ep": "experts"}


def load(directory, way=None, **options):
    if way is not None:
        sizes = WAYS[way] if isinstance(way, str) else way
        options["distributed_config"] = DistributedConfig(**sizes)
    return fp4moe.from_pretrained(directory, dtype=torch.float32, progress=False, **options)


def load_plain(directory, way=None):
    options = {} if way is None else {"distributed_config": DistributedConfig(**WAYS[way])}
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory, dtype=torch.float32, **options)


def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def tokens(model, ids=IDS):
    return model.generate(ids[:, :6], max_new_tokens=5, do_sample=False)


def experts(model):
    return [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]


def close(got, expected):
    # float32 sums in another order: a few units of 2^-24 of logits below 1.
    worst = float((got - expected).abs().max())
    assert worst < 1e-6, worst


def refused(error, text, call):
    try:
        call()
    except Fp4MoeError as raised:
        assert type(raised) is error and text in str(raised), raised
    else:
        raise AssertionError(f"not refused: {text}")


def one_graph(model, ids=IDS):
    """Logits of the compiled model, and the operators of its only graph."""
    graphs = []

    def keep(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    found = logits(compiled, ids)
    assert len(graphs) == 1, len(graphs)
    return found, graphs[0]


def equal(names):
    """from_pretrained under both plans: logits, tokens, bytes, whose part, one graph."""
    for name, directory in names.items():
        whole, more = load(directory), name in ("gemma4", "nemotron_h")
        expected = logits(whole)
        for way, kind in KINDS.items():
            model = load(directory, way)
            close(logits(model), expected)
            share = sum(m.nbytes for m in experts(model)) / sum(m.nbytes for m in experts(whole))
            # Scales of which there is one an expert are held by both.
            assert 0.5 <= share < 0.503, share
            (part,) = experts(model)[0].parts
            assert (part.kind, part.index, part.count) == (kind, RANK, 2)
            report = str(fp4moe.explain(model))
            assert f"it holds {part}" in report, report
            if more:
                assert torch.equal(tokens(model), tokens(whole))
                found, targets = one_graph(model)
                close(found, expected)
                where = [i for i, t in enumerate(targets) if t == "fp4moe.nvfp4_moe.default"]
                assert len(where) == 2
                behind = {targets[i + 1] for i in where}
                assert behind == {"_c10d_functional.all_reduce.default"}, behind


def forms(directory, uneven, formats, packed=None):
    """Other checkpoints: unlike parts, other formats, Linears, routers, and an exchange."""
    whole, model = load(uneven), load(uneven, "tp")
    assert experts(model)[0].layer.intermediate_size == (32, 16)[RANK]
    close(logits(model), logits(whole))
    expected = logits(load(directory))
    close(logits(load(directory, "ep", routing="fused")), expected)
    close(logits(load(directory, "exchange")), expected)
    # The same through transformers' own loader.
    fp4moe.register_transformers()
    model = load_plain(directory, "tp")
    assert experts(model)[0].parts
    close(logits(model), expected)
    # FSDP splits the rest; packed experts stay whole.
    close(logits(load(directory, {"fsdp_size": 2})), expected)
    for other in formats:
        whole = logits(load(other))
        for way in KINDS:
            close(logits(load(other, way)), whole)
    if packed is not None:
        whole, kinds = logits(load(packed)), set()
        for way in KINDS:
            model = load(packed, way)
            close(logits(model), whole)
            linears = [m for m in model.modules() if isinstance(m, fp4moe.PackedLinear)]
            kinds |= {m.parts[0].kind for m in linears if m.parts}
        assert kinds == {"output rows", "input columns"}, kinds


def replaced(names):
    """replace_moe on float models that transformers has split."""
    names, mixtral = names[:-1], names[-1]
    expected = logits(fp4moe.replace_moe(load_plain(mixtral), progress=False))
    model = fp4moe.replace_moe(load_plain(mixtral, "ep"), progress=False, routing="fused")
    assert "chooses in one launch" in str(fp4moe.explain(model))
    close(logits(model), expected)
    for directory in names:
        expected = logits(fp4moe.replace_moe(load_plain(directory), progress=False))
        for way in KINDS:
            model = load_plain(directory, way)
            before = str(fp4moe.explain(model))
            fp4moe.replace_moe(model, progress=False)
            (part,) = experts(model)[0].parts
            assert f"this process gets {part}" in before, before
            close(logits(model), expected)
        found, _ = one_graph(model)
        close(found, expected)
    model = load_plain(names[0], "tp")
    refused(UnsupportedError, "it is split over processes", fp4moe.calibrate(model).__enter__)
    if RANK == 1:
        module = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
        module.gate_up_proj.data._local_tensor[3, 0, 0] = torch.inf
    replace = lambda: fp4moe.replace_moe(model, progress=False)  # noqa: E731
    refused(UnsupportedError, "gate_up_proj, expert 3, holds inf or NaN", replace)
    assert not experts(model)


def refusals(directory, other, damaged, small):
    """What one process cannot do alone, and bad input: named before loading, on each process."""
    model = load(directory, "ep")
    saved = f"{directory}_saved"
    refused(UnsupportedError, " of 2)", lambda: model.save_pretrained(saved))
    assert not os.path.exists(saved)
    refused(UnsupportedError, "ranges are those of all of it", fp4moe.calibrate(model).__enter__)
    state = model.state_dict()
    model.load_state_dict(state)
    key = next(key for key in state if key.endswith("experts._extra_state"))
    text = bytes(state[key].tolist()).replace(b"part %d" % (RANK + 1), b"part %d" % (2 - RANK))
    state[key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    refused(ShapeError, "must equal that of this layer", lambda: model.load_state_dict(state))

    def directories(*either, **options):
        return lambda: load(either[RANK], "tp", **options)

    alike = "must be the same in all processes; got "
    refused(CheckpointError, alike, directories(directory, other))
    kernel = "reference" if RANK else "auto"
    refused(CheckpointError, alike, directories(directory, directory, kernel=kernel))
    # NaN among the scales of the last expert, which process 1 reads.
    text = "block scales that are numbers" if RANK else "process 1 failed: CheckpointError"
    refused(CheckpointError, text, lambda: load(damaged, "ep"))
    text = "tp_size must be the number of processes, 2; got 4"
    refused(ShapeError, text, lambda: load(directory, {"tp_size": 4}))
    text = "be at most 1, its blocks of 16 in nvfp4; got 2"
    refused(ShapeError, text, lambda: load(small, "tp"))
    text = "not dealt out layer by layer"
    refused(UnsupportedError, text, lambda: load(directory, {"pp_size": 2}))
    plan = {"model.layers.*.mlp.experts": "local_params"}
    text = "the plan gives it the style 'local_params'"
    refused(UnsupportedError, text, lambda: load(directory, {"tp_size": 2, "tp_plan": plan}))
    whole = load(directory)
    refused(ShapeError, "mesh must be a DeviceMesh", lambda: fp4moe.split_experts(whole, 2))
    mesh = init_device_mesh("cpu", (WORLD,))
    refused(UnsupportedError, "holds experts", lambda: fp4moe.split_experts(model, mesh))
    unlike = load(directory)
    if RANK:
        experts(unlike)[1].prepared_down_packed[0, 0, 0] += 1
    refused(CheckpointError, alike, lambda: fp4moe.split_experts(unlike, mesh))
    assert experts(unlike)[0].num_experts == experts(unlike)[0].weights.local_experts


def own_batch(names, way):
    """Each process, or each two of four, with its own tokens: split_experts and transformers."""
    sharing = WORLD // 2
    ids = IDS[4 * (RANK // sharing) :][: 4 if sharing == 1 else 3]
    axes = {"mesh_dim_names": ("batch", "tp")}
    mesh = (
        init_device_mesh("cpu", (2, 2), **axes) if sharing == 2 else init_device_mesh("cpu", (2,))
    )
    for name, directory in names.items():
        whole = load(directory)
        expected, sequence = logits(whole, ids), tokens(whole, ids)
        model = fp4moe.split_experts(load(directory), mesh)
        close(logits(model, ids), expected)
        # The number of tokens in a step is odd, too, where two processes share a batch.
        assert torch.equal(tokens(model, ids), sequence)
        if sharing == 1:
            found, targets = one_graph(model, ids)
            close(found, expected)
            scatters = targets.count("_c10d_functional.reduce_scatter_tensor.default")
            assert scatters == 2 and targets.count("fp4moe.nvfp4_moe.default") == 2, targets
            same_gradients(model, whole, ids)
        # transformers itself cannot split Gemma4 so: its dense layers have expert rules.
        if name != "gemma4":
            close(logits(load(directory, way), ids), expected)


def same_gradients(model, whole, ids):
    with torch.enable_grad():
        embedded = whole.get_input_embeddings()(ids).detach()
        found = []
        for one in (model, whole):
            leaf = embedded.clone().requires_grad_()
            one(inputs_embeds=leaf, use_cache=False).logits.square().mean().backward()
            found.append(leaf.grad)
    scale = float(found[1].abs().max())
    assert scale > 0 and float((found[0] - found[1]).abs().max()) < 1e-5 * scale


def killed(directory):
    """The last: process 1 ends, and the others do not wait for it."""
    model = load(directory, "tp")
    if RANK == 1:
        sys.stdout.flush()
        os._exit(0)
    try:
        logits(model)
    except RuntimeError as error:
        sys.stdout.write(f"after the other has ended: {type(error).__name__}\n")
    else:
        raise AssertionError("it went on alone")


def process(rank, run):
    """Be one process of a run; returns its exit code."""
    global RANK, WORLD
    RANK, WORLD = rank, len(run["logs"])
    log = os.open(run["logs"][rank], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(run["port"])}
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo")
    for check, options in run["checks"].items():
        globals()[check](**options)
        sys.stdout.write(f"{check} passed\n")
        sys.stdout.flush()
    return 0


def main(runs):
    for run in runs:
        children = []
        for rank in range(len(run["logs"])):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = process(rank, run)
                except BaseException:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(code)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with open(sys.argv[1]) as file:
        main(json.load(file))
