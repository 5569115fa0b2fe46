"""Kernels as a Hopper GPU gets them, on a machine without one: they assemble with the arguments of their launches, fit,
and keep what they compute in registers. The interpreter knows nothing of that."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

SETUP = """
import json
import re
import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Hopper:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Hopper())
torch.cuda.is_available, torch.cuda.get_device_capability = (lambda: True), (lambda *_: (9, 0))
found = {}
PATTERNS = {"spills": "STL|LDL", "wide": "LDG[^ ]*128", "products": "[HQ]G?MMA", "waits": "ACQBULK",
            "copies": "UTMALDG"}

def note(*, fn, compile, is_manual_warmup, **_):
    if not is_manual_warmup:
        found[fn.jit_function, compile["specialization_data"]] = None
    return not is_manual_warmup  # which Triton takes for "somebody has done it"

knobs.runtime.jit_cache_hook = note

def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

"""
LAUNCHES = """
from kogia.ops.segments import Segments
from kogia.ops.adamw import Trained, TrainedGroup
from kogia.ops.triton import adamw, blockwise, experts, latent_training, moe, norm, norm_training, prefill
from kogia.ops.triton import router_training, sample, sums

with torch.no_grad():
    tokens, ids, numbers = 4096, dict(dtype=torch.int64), dict(dtype=torch.float32)
    rows, both, hidden = tensor(tokens, 2048), tensor(tokens, 2816), tensor(tokens, 1408)
    norm.add_rms_norm(rows, rows, tensor(2048), 1e-6)
    experts.weighted_silu_mul(both, tensor(tokens, **numbers))
    experts.sum_copies(rows, tensor(tokens, **ids), 4)
    blockwise.quantize_rows(rows)
    blockwise.quantize_both(rows)
    blockwise.quantize_weight(tensor(2, 2816, 2048))
    blockwise.weighted_silu_mul_rows_backward(hidden, both, tensor(tokens, **numbers))
    few = tensor(64, 2048), tensor(64, 6, **ids), tensor(64, 6, **numbers)
    moe.mix_experts(*few, tensor(64, 2, 1408, 2048), tensor(64, 2048, 1408))
    keys, segments = tensor(tokens, 16, 192), Segments(tensor(2, **ids), np.array([tokens]))
    prefill.varlen_attention(keys, keys, tensor(tokens, 16, 128), segments, scale=0.1)
    sample.sample(tensor(64, 32000), tensor(64, **numbers), tensor(64, dtype=torch.float64))

def trained(function, *leaves):
    made = function(*(leaf.requires_grad_() for leaf in leaves))
    made = [each for each in ([made] if isinstance(made, torch.Tensor) else made) if each.is_floating_point()]
    torch.autograd.grad(made, leaves, [torch.empty_like(each) for each in made])

turn = tensor(tokens, 32, **numbers), tensor(tokens, 32, **numbers)
options = dict(score="sigmoid", topk=6, num_groups=1, topk_groups=1, normalize=True, scale=1.0)
route = lambda logits: parts_of(router_training.route_logits(logits, tensor(64, **numbers), None, **options))
parts_of = lambda routed: (routed.expert_ids, routed.weights, routed.scores)
trained(lambda x, delta, w: norm_training.add_rms_norm(x, delta, w, 1e-6), rows, tensor(tokens, 2048), tensor(2048))
trained(lambda q: latent_training.rotate_query(q, *turn, 128), tensor(tokens, 16, 192))
trained(lambda kv, w: latent_training.latent_and_key(kv, w, *turn, 1e-6), tensor(tokens, 576), tensor(512))
trained(lambda b, key: latent_training.keys_and_values(b, key, 128), tensor(tokens, 16, 256), tensor(tokens, 1, 64))
trained(experts.silu_mul, hidden, tensor(tokens, 1408))
trained(route, tensor(tokens, 64, **numbers))
owner, bounds = tensor(tokens, **ids), tensor(3, **ids)
trained(lambda s: router_training.affinity_sums(s, owner, bounds), tensor(tokens, 64, **numbers))
trained(sums.residual_sum, rows, tensor(tokens, 2048), tensor(tokens, 2048))
trained(lambda x: sums.branches(x, 3), rows)
with torch.no_grad():
    router_training.expert_counts(tensor(tokens, 6, **ids), 64)
    weight, moments = tensor(2048, 2048, **numbers), (tensor(2048, 2048), tensor(2048, 2048))
    members = [Trained(weight, tensor(2048, 2048), *moments, tensor(**numbers), tensor(2048, 2048))]
    adamw.adamw(TrainedGroup(members), tensor(**numbers), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    adamw.added_up(tensor(2048, 2048), tensor(2048, 2048))
"""
ROLES = """
from types import SimpleNamespace
from kogia.ops.blockwise import Blocks, Routed, Rows
from kogia.ops.triton import hopper_grouped

torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
codes, numbers, rows = dict(dtype=torch.float8_e4m3fn), dict(dtype=torch.float32), 98304
counts = tensor(64, dtype=torch.int64)
weights = Blocks(tensor(64, 2816, 2048, **codes), tensor(64, 22, 16, **numbers))
x = Rows(tensor(rows, 2048, **codes), tensor(16, rows, **numbers))
hopper_grouped.grouped_product(x, weights, counts, torch.bfloat16)
for stack in tensor(64, 2, 1408, 2048), tensor(64, 2048, 2816).transpose(1, 2):
    hopper_grouped.halves_product(tensor(rows, 2048), stack, counts)
groups = rows // 128 + 64
columns = lambda width: Rows(tensor(width, groups * 128, **codes), tensor(groups, width, **numbers))
a, b = (Routed(columns(width), tensor(65, dtype=torch.int32)) for width in (2816, 2048))
hopper_grouped.routed_outer(a, b, torch.bfloat16)
"""
REPORT = """
for function, variant in found:
    asm, metadata = (kernel := function.preload(variant)).asm, kernel.metadata
    found_in = {name: len(re.findall(pattern, asm["sass"])) for name, pattern in PATTERNS.items()}
    print(json.dumps({"name": function.__name__, "shared": metadata.shared, **found_in}))
"""


MAY_SPILL = {"_gate_up"}
"""Some versions of Triton have no room for its weights; it waits for them anyway."""


def assembled(launches: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", SETUP + launches + REPORT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "ptxas" in done.stderr and "Cannot find" in done.stderr:
        pytest.skip("this Triton comes without an assembler")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_products_of_experts_by_warps_with_roles_assemble_for_a_hopper_gpu_and_stay_in_registers():
    found = [each for each in assembled(ROLES) if each["name"] != "_plan"]
    assert [each["name"] for each in found] == ["_grouped", "_halves", "_halves", "_outer"]
    for each in found:
        assert each["shared"] <= 227 * 1024 and not each["spills"], each
        assert each["products"] and each["copies"], "tiles are copied by the copy engine, for the tensor cores"


def test_kernels_assemble_for_a_hopper_gpu_fit_on_it_and_stay_in_registers():
    found = assembled(LAUNCHES)
    for each in found:
        name = each["name"]
        assert each["shared"] <= 227 * 1024, each
        assert not each["spills"] or name in MAY_SPILL, each
        assert each["waits"] == 1, f"{name} may be put on the device before what it reads is there"
        assert each["wide"] > 0 or name in {"_order"}, f"{name} reads less than 16 bytes at a time"
    assert {each["name"] for each in found if each["products"]} == {"_gate_up", "_down", "_varlen"}
