"""After every test of the engine: what has ended has given back its blocks and rows."""

from collections.abc import Iterator

import pytest

from kogia.engine.engine import Engine


@pytest.fixture(autouse=True)
def no_block_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engines: list[Engine] = []
    init = Engine.__init__

    def noted(self: Engine, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", noted)
    yield
    for engine in engines:
        if engine.num_unfinished == 0 and not engine._flights:
            pool, table = engine.scheduler.pool, engine.scheduler.table
            assert pool.num_free == pool.num_blocks and not any(pool.ref_counts), "a block was leaked"
            assert table.num_rows_free == engine.config.max_sequences, "a row was leaked"
