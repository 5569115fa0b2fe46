"""llama.cpp's speed on the CPU through llama-cpp-python, for engine_cpu.py: one JSON line.

    PYTHON benchmarks/llama_cpp_peer.py THREADS BATCH PROMPT TOKENS X.gguf

Tokens are given, not sampled, so that nothing but the model is timed. Seconds are of the CPU with one thread, else of
the wall.
"""

import json
import sys
import time

import llama_cpp as lc

THREADS, BATCH, PROMPT, TOKENS = map(int, sys.argv[1:5])
CLOCK = time.process_time if THREADS == 1 else time.perf_counter


def main() -> None:
    quiet = lc.llama_log_callback(lambda *_: None)
    lc.llama_log_set(quiet, None)
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(sys.argv[5].encode(), lc.llama_model_default_params())
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4096, 512, 512, BATCH
    params.n_threads = params.n_threads_batch = THREADS
    context = lc.llama_init_from_model(model, params)
    batch, memory = lc.llama_batch_init(512, 0, BATCH), lc.llama_get_memory(context)

    def run(tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) of each row."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        assert lc.llama_decode(context, batch) == 0
        lc.llama_synchronize(context)

    def prefill() -> float:
        lc.llama_memory_clear(memory, True)
        started = CLOCK()
        run([(5 + i % 100, i, 0, i == PROMPT - 1) for i in range(PROMPT)])
        return PROMPT / (CLOCK() - started)

    def decode() -> float:
        lc.llama_memory_clear(memory, True)
        for sequence in range(BATCH):
            run([(7 + i, i, sequence, i == 7) for i in range(8)])
        started = CLOCK()
        for i in range(TOKENS):
            run([(11 + 97 * i % 20000 + sequence, 8 + i, sequence, True) for sequence in range(BATCH)])
        return TOKENS * BATCH / (CLOCK() - started)

    prefill(), decode()
    print(json.dumps({"prefill": prefill() if BATCH == 1 else None, "decode": decode()}))


if __name__ == "__main__":
    main()
