"""A mixture layer and a whole layer as one graph, in processes of their own: shape checks cannot be traced."""

import subprocess
import sys
from pathlib import Path

import pytest

COMPILED = """
import torch
from kogia.model.config import MoEConfig
from kogia.model.layers import StepContext
from kogia.model.moe import MoE
from kogia.model.routing import Routing
from kogia.ops.dispatch import which
from kogia.ops.segments import segments_of

torch.manual_seed(0)
torch.set_num_threads(1)
moe = MoE(32, MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=16, num_groups=4, topk_groups=2), 0)
for parameter in moe.parameters():
    torch.nn.init.normal_(parameter)
moe = moe.bfloat16()
moe.gate.e_score_correction_bias = moe.gate.e_score_correction_bias.float()
x = torch.randn(24, 32).bfloat16().requires_grad_()
graphs, nothing = [], torch.empty(0, 0)


def step(losses):
    routing = Routing(losses=True) if losses else None
    return StepContext(segments_of([10, 14]), nothing, nothing, routing=routing)


def count(graph, inputs):
    graphs.append(graph)
    return graph.forward


which("cpu")  # loads the backends: imports cannot be traced
for losses in (False, True):
    eager, compiled = step(losses), step(losses)
    want = moe(x, eager)
    graphs.clear()
    torch._dynamo.reset()
    got = torch.compile(moe, backend=count)(x, compiled)
    assert got.equal(want), (got - want).abs().max()
    grads = [torch.autograd.grad(y.float().square().sum(), [x, *moe.parameters()]) for y in (got, want)]
    assert all(a.equal(b) for a, b in zip(*grads))
    if losses:
        assert compiled.routing.loads(1).equal(eager.routing.loads(1))
        assert compiled.routing.balance_loss().equal(eager.routing.balance_loss())
    print(len(graphs))
"""


@pytest.mark.timeout(200)
def test_a_bfloat16_mixture_layer_compiles_into_two_graphs_at_most_and_computes_the_same():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    without_losses, with_losses = map(int, done.stdout.split())
    assert without_losses == 1
    assert with_losses <= 2


LAYERS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from kogia.train.loss import LossWeights, supervised_loss
from train.tiny import make_batch, random_sequences, tiny_model

torch.set_num_threads(1)
graphs = []


def count(graph, inputs):
    graphs.append(graph)
    return graph.forward


def run(compiled, lengths):
    model = tiny_model(num_layers=2).bfloat16()
    if compiled:
        model.compile_layers(backend=count)
    batch = make_batch(random_sequences(lengths))
    loss = supervised_loss(model, batch, LossWeights(mtp=0.3, balance=1e-3))
    loss.total.backward()
    return loss, [p.grad for p in model.parameters()]


for lengths in ([20, 20, 20], [7, 31, 2]):
    (want, want_grads), (got, got_grads) = run(False, lengths), run(True, lengths)
    assert got.total.equal(want.total)
    assert got.loads.equal(want.loads)
    assert all(got.metrics[name].equal(value) for name, value in want.metrics.items())
    assert all(a.equal(b) for a, b in zip(got_grads, want_grads))
    print(len(graphs))
    graphs.clear()
    torch._dynamo.reset()
"""


@pytest.mark.timeout(200)
def test_every_layer_compiles_into_one_graph_with_the_same_loss_loads_and_gradients():
    command = [sys.executable, "-c", LAYERS, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "3"]  # two decoder layers and the module that predicts one token further
