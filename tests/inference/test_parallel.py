"""An engine over two processes: the tokens of one, whatever is asked of it, and a clear end when a rank is lost."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from inference.tiny import CONFIG

from kogia.checkpoint.hf import load_model, save_model
from kogia.cli import main
from kogia.distributed import team
from kogia.engine.config import EngineConfig, PruneConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.inference import parallel
from kogia.inference.llm import LLM
from kogia.inference.parallel import DrawnModel, ParallelEngine, open_parallel
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.layers import Head
from kogia.model.linear import Linear
from kogia.model.packed import pack
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import train_bpe

MLA = replace(CONFIG, num_layers=3, moe=MoEConfig(num_experts=8, num_shared_experts=2, topk=3, expert_dim=16))
GQA = replace(
    CONFIG,
    vocab_size=291,  # no part of which is the same on two ranks
    attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True),
    moe=None,
    num_mtp_layers=0,
)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PROMPTS = [[5, 9, 11, 3], list(range(2, 40)), [2] * 17, [12], list(range(40, 2, -1))]
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12, seed=3, ignore_eos=True, logprobs=True, n=2)
GREEDY = replace(SAMPLED, temperature=0.0, n=1)
SMALL = EngineConfig(block_size=4, num_blocks=40, max_sequences=5, max_batch_tokens=23, adaptive_drafts=False)
"""Too small for all at once: prompts run in chunks, sequences wait and are preempted."""


def opened(config: ModelConfig, engine: EngineConfig, size: int = 2, **options) -> ParallelEngine:
    return open_parallel(DrawnModel(config, torch.float32, seed=1), engine, size, device="cpu", **options)


def outputs(engine: Engine, params: SamplingParams = SAMPLED) -> list[tuple[list[int], list[float]]]:
    return [(each.token_ids, each.logprobs or []) for group in engine.generate(PROMPTS, params) for each in group]


def assert_same(found: Engine, want: Engine, params: SamplingParams = SAMPLED) -> None:
    got, expected = outputs(found, params), outputs(want, params)
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, logprobs), (_, others) in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(others), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config, options, engine",
    [
        (MLA, {}, SMALL),
        (MLA, {}, replace(SMALL, num_draft_tokens=2)),
        (MLA, {"whole_experts": True}, replace(SMALL, num_draft_tokens=1)),
        (GQA, {"size": 4}, replace(SMALL, overlap=True, deterministic=True)),
        (replace(GQA, tie_embeddings=True), {}, SMALL),
    ],
)
def test_several_processes_give_the_tokens_of_one(config, options, engine):
    found, want = opened(config, engine, **options), Engine(build_model(config, seed=1), None, engine)
    try:
        with found.deterministic():
            assert_same(found, want, SAMPLED)
        assert_same(found, want, GREEDY)  # over cached prefixes
        assert found.stats.num_prefix_hit_tokens == want.stats.num_prefix_hit_tokens > 0
        assert found.stats.num_preemptions == want.stats.num_preemptions
        assert found.stats.num_accepted == want.stats.num_accepted
        new = build_model(config, seed=2)
        found.update_weights(new)
        want.update_weights(new)
        assert_same(found, want)
        assert found.weights_version == 1
        with pytest.raises(ValueError, match="new weights do not fit the model: lm_head.weight"):
            found.update_weights({name: x for name, x in new.state_dict().items() if name != "lm_head.weight"})
        for _ in range(2):
            first = found.add(PROMPTS[2], GREEDY)[0]
            found.step()
            assert found.abort(first) is not None
        assert_same(found, want)
    finally:
        found.close()


def test_a_rank_that_is_killed_ends_the_engine_with_the_reason():
    engine = opened(MLA, SMALL)
    engine.add(PROMPTS[0], SAMPLED)
    engine.step()
    os.kill(engine.team._children[0].process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(ChildProcessError, match=r"over 2 processes has ended: rank 1: it ended \(signal SIGKILL\)"):
            engine.generate(PROMPTS, SAMPLED)
    assert engine.team._children[0].process.poll() is not None


def test_ranks_that_sample_differently_are_found_out():
    engine = opened(MLA, SMALL)
    engine.digest += 1
    with pytest.raises(ChildProcessError, match="sampled other tokens than rank 0"):
        engine.generate(PROMPTS, SAMPLED)


def test_ctrl_c_in_a_step_comes_after_it_and_the_engine_goes_on():
    engine, want = opened(MLA, SMALL), Engine(build_model(MLA, seed=1), None, SMALL)
    try:
        calls = []

        def interrupt(*_: int) -> None:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        plan = engine.scheduler.plan
        engine.scheduler.plan = lambda: interrupt() or plan()
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, SAMPLED)
        assert_same(engine, want)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tokenizer = train_bpe(["the answer is 42. " * 20], 280)
    return save_model(build_model(CONFIG, seed=5), tmp_path_factory.mktemp("models") / "tiny", tokenizer)


def test_a_stored_model_is_opened_with_its_tokenizer_and_stops_at_texts_alike(directory):
    want = LLM(directory, device="cpu", block_size=4)
    found = LLM(directory, device="cpu", block_size=4, tensor_parallel=2)
    for stop in ((), ("e", "4")):
        params = SamplingParams(max_tokens=12, seed=3, stop=stop)
        assert found.generate(["the answer", "is"], params) == want.generate(["the answer", "is"], params)
    assert "".join(e.text for e in found.stream("the", params)) == want.generate("the", params)[0][0].text
    found.engine.close()


def test_fp8_weights_stay_fp8_on_every_rank(tmp_path):
    config = ModelConfig(
        vocab_size=290,
        dim=128,
        num_layers=2,
        ffn_dim=256,
        attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64),
        moe=MoEConfig(num_experts=4, num_shared_experts=1, topk=2, expert_dim=256),
        max_position=256,
        init_std=0.2,
    )
    model = build_model(config, dtype=torch.bfloat16, seed=5)
    for module in model.modules():
        if isinstance(module, Linear) and not isinstance(module, Head):
            module.pack("fp8")
    tokenizer = train_bpe(["the answer is 42. " * 20], 280)
    directory = save_model(model, tmp_path / "model", tokenizer)
    found = LLM(directory, device="cpu", dtype="fp8", tensor_parallel=2)
    packed = [m for m in found.model.modules() if isinstance(m, Linear) and m.format == "fp8"]
    assert packed
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    want = Engine(load_model(directory, quantize="stored", dtype=torch.float32), tokenizer)
    got = found.generate(prompts, params)
    assert [c[0].token_ids for c in got] == [c[0].token_ids for c in want.generate(prompts, params)]
    found.engine.close()


@pytest.mark.parametrize(
    "engine, size, config, message",
    [
        (EngineConfig(), 3, MLA, "tensor_parallel = 3: does not divide attention.num_heads = 2"),
        (EngineConfig(), 1, MLA, "tensor_parallel = 1: must be at least 2"),
        (EngineConfig(graphs=True), 2, MLA, "engine.graphs = true: sums over processes are not recorded on a CPU"),
        (EngineConfig(num_draft_tokens=1), 2, GQA, "the model has no MTP module"),
        (EngineConfig(prefix_cache=False, prune=PruneConfig(8, 8, 4)), 2, MLA, "engine.prune"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_leaves_no_process(engine, size, config, message, monkeypatch):
    teams = []
    start = team.Team.__init__
    monkeypatch.setattr(parallel.Team, "__init__", lambda self, *args: teams.append(self) or start(self, *args))
    with pytest.raises(ValueError, match=message):
        open_parallel(DrawnModel(config, torch.float32), engine, size, device="cpu")
    assert all(child.process.poll() is not None for each in teams for child in each._children)


def test_commands_take_the_number_of_processes(directory, tmp_path, capsys):
    words = ["--device", "cpu", "--tensor-parallel", "2", "--temperature", "0", "--max-tokens", "5"]
    assert main(["generate", str(directory), "--prompt", "the", *words]) == 0
    shared = capsys.readouterr().out
    assert main(["generate", str(directory), "--prompt", "the", "--device", "cpu", *words[4:]]) == 0
    assert capsys.readouterr().out == shared
    out = tmp_path / "bench.json"
    words = ["--random-weights", "--device", "cpu", "--tensor-parallel", "2", "--batches", "2", "--rounds", "1"]
    words += ["--prompt-tokens", "8", "--max-tokens", "4", "--out", str(out)]
    assert main(["bench", "kogia-demo", *words]) == 0
    assert '"tensor_parallel": 2' in out.read_text()
    assert main(["bench", "kogia-demo", *words, "--quantize", "int8"]) == 2
    assert "quantize = 'int8': drawn weights are packed in one process only" in capsys.readouterr().err
    assert main(["bench", "kogia-demo", "--random-weights", "--device", "cpu", "--tensor-parallel", "7"]) == 2
    assert "tensor_parallel = 7: does not divide" in capsys.readouterr().err


def near(found: Engine, model: Transformer) -> None:
    """Log-probabilities of what an engine samples beside those of the same weights in float32."""
    gaps = []
    for (ids, logprobs), prompt in zip(outputs(found, GREEDY), PROMPTS, strict=True):
        want = model.logprobs(pack([prompt + ids]).to("cuda"))[len(prompt) :]
        gaps.append((torch.tensor(logprobs) - want.detach().cpu()).abs())
    assert torch.cat(gaps).mean() < 0.1


@two_gpus
@pytest.mark.parametrize("graphs", [False, None])
@pytest.mark.parametrize(
    "config, whole_experts, drafts", [(MLA, False, 0), (MLA, True, 0), (MLA, False, 1), (GQA, False, 0)]
)
def test_two_gpus_compute_what_the_whole_model_does(config, whole_experts, drafts, graphs):
    wide = ModelConfig(**{**vars(config), "dim": 64, "ffn_dim": 64, "max_position": 256})
    if wide.moe is not None:
        wide = replace(
            wide,
            attention=MLAConfig(num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16),
            moe=replace(wide.moe, expert_dim=32),
        )
    else:
        wide = replace(wide, attention=replace(wide.attention, head_dim=16))
    settings = EngineConfig(block_size=4, num_blocks=300, max_sequences=16, graphs=graphs, num_draft_tokens=drafts)
    source = DrawnModel(wide, torch.bfloat16, seed=1)
    engine = open_parallel(source, settings, 2, device="cuda", whole_experts=whole_experts)
    try:
        assert (engine.runner.graphs is None) == (graphs is False)
        whole = build_model(wide, device="cuda", dtype=torch.bfloat16, seed=1).float()
        near(engine, whole)
        new = build_model(wide, device="cuda", dtype=torch.bfloat16, seed=2)
        engine.update_weights(new)
        near(engine, new.float())
    finally:
        engine.close()


@two_gpus
def test_a_killed_rank_does_not_leave_the_other_gpu_waiting():
    engine = open_parallel(DrawnModel(GQA, torch.bfloat16), replace(SMALL, prefix_cache=False), 2, device="cuda")
    engine.add(PROMPTS[0], replace(SAMPLED, max_tokens=100))
    engine.step()
    os.kill(engine.team._children[0].process.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"rank 1: it ended \(signal SIGKILL\)"):
        engine.generate(PROMPTS, replace(SAMPLED, max_tokens=100))
