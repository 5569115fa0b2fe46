"""Modules own their forwards: sharded from outside, layer by layer, the model computes the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from train.tiny import make_batch, random_sequences, tiny_model
from kogia.model.transformer import SharedHead
from kogia.train.loss import LossWeights, supervised_loss

rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
batch = make_batch(random_sequences([20, 13, 30]))
weights = LossWeights(mtp=0.3, balance=1e-2)


def loss_and_norm(shard):
    model = tiny_model()
    if shard:
        mesh = dist.init_device_mesh("cpu", (world,))
        heads = [module for module in model.modules() if isinstance(module, SharedHead)]
        for part in (*heads, *model.model.layers, model.model.embed_tokens, model.lm_head):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    loss = supervised_loss(model, batch, weights).total
    loss.backward()
    grads = [p.grad.full_tensor() if shard else p.grad for p in model.parameters()]
    return torch.stack([loss.detach(), torch.stack([g.norm() for g in grads]).norm()])


whole, parts = loss_and_norm(False), loss_and_norm(True)
torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
dist.destroy_process_group()
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world", [1, 2])
def test_fully_sharded_layers_heads_and_prediction_modules_give_the_same_loss_and_gradient(tmp_path, world):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", SHARDED]
    processes = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "store")], env=env, stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors.decode()[-3000:]
