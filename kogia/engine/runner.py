"""One step on the device: plan -> one upload -> model -> samples -> drafts -> one download.

`launch` queues all of that and waits for nothing; `Flight.wait` waits for the result. What the host learns only then is
computed on the device in the meantime: how many drafts were accepted, what the last token is, where the next drafts go.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.engine.activation import ActiveExperts
from kogia.engine.drafting import DraftGraphs, DraftState
from kogia.engine.graphs import DecodeGraphs
from kogia.engine.inputs import Arrived, Bundle, Download, Staging, Upload
from kogia.engine.prompts import Prompts, Surroundings
from kogia.engine.scoring import (
    prompt_scores,
    put_prompt_scoring,
    put_scoring,
    put_tracing,
    routes,
    top_tokens,
    wants_prompt_top,
)
from kogia.engine.sequences import SequenceTable
from kogia.engine.steering import edits_of, put_rules, rule_arrays
from kogia.engine.step import StepPlan, StepResult, TopTokens
from kogia.engine.views import CacheView, TokenRuns, WholeCache, token_runs
from kogia.model.cache import PagedCache, StepCache
from kogia.model.layers import StepContext
from kogia.model.packed import PackedTokens
from kogia.model.routing import Routing
from kogia.model.transformer import Transformer
from kogia.ops.adjust import sample_adjusted
from kogia.ops.drafts import accept_drafts, most_likely_tokens
from kogia.ops.moe import Activation
from kogia.ops.sample import counter_uniforms, sample
from kogia.ops.segments import Segments


@dataclass(slots=True, eq=False)
class Flight:
    """A step under way."""

    plan: StepPlan
    _download: Download | Arrived
    """The tensors of a `StepResult`, by name."""
    _width: int = 0
    """Samples of every sequence, where the device draws as many of all; 0 where it draws what the plan asks for."""

    def wait(self) -> StepResult:
        """Block until the device is done with the step."""
        arrays = self._download.wait()
        drafts = arrays["drafts"] if "drafts" in arrays else np.empty((len(self.plan.sampled), 0), dtype=np.int64)
        tokens, logprobs = arrays["tokens"], arrays["logprobs"]
        if self._width:
            tokens, logprobs = tokens.reshape(-1, self._width), logprobs.reshape(-1, self._width)
            if self.plan.num_tokens < tokens.size:
                is_asked = np.arange(self._width) < self.plan.num_samples[:, None]
                tokens, logprobs = tokens[is_asked], logprobs[is_asked]
        elif self.plan.only_decodes:  # a recorded step draws for nobody's sequences too
            tokens, logprobs = tokens[: len(self.plan.rows)], logprobs[: len(self.plan.rows)]
        scores, experts = arrays.get("prompt_logprobs"), arrays.get("routes")
        top, prompt_top = _top(arrays, "top_ids", "top_logprobs"), _top(arrays, "prompt_top_ids", "prompt_top_logprobs")
        return StepResult(tokens, logprobs, drafts, top, scores, prompt_top, experts)


def _top(arrays: Mapping[str, NDArray], ids: str, logprobs: str) -> TopTokens | None:
    return TopTokens(arrays[ids], arrays[logprobs]) if ids in arrays else None


class Runner:
    """Runs plans over one model and its paged cache."""

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        table: SequenceTable,
        view: CacheView,
        experts: ActiveExperts,
        longest: int | None = None,
        num_drafts: int = 0,
    ) -> None:
        """With `longest`, the most tokens of a sequence, decode steps are recorded as graphs, those with `num_drafts`
        drafts per sequence too; on a CPU also prompts."""
        self.model = model
        self.cache = cache
        self.table = table
        self.view = view
        self.experts = experts
        self.device = model.device
        self._staging = Staging(self.device)
        self._newest = torch.zeros(len(table.requests) + 1, dtype=torch.long, device=self.device)
        """[table rows, and nobody's] what each sequence sampled last: a step may be planned before that is known."""
        self.graphs = self.draft_graphs = self.prompts = None
        if longest is not None:
            assert isinstance(view, WholeCache), "graphs know no other view"
            self.graphs, state = DecodeGraphs(model, cache, self._newest, experts, len(table.requests), longest), None
            if num_drafts:
                state = DraftState(self._newest, num_drafts)
                self.draft_graphs = DraftGraphs(model, view, state, experts, len(table.requests), longest)
            if self.device.type == "cpu":
                self.prompts = Prompts(Surroundings(model, view, self._newest, state, experts, longest))

    def launch(self, plan: StepPlan, num_drafts: int = 0) -> Flight:
        """Start a step: run every planned token, sample where the plan asks for it, draft `num_drafts` more."""
        if self.graphs is not None and not num_drafts and self._is_recorded(plan, self.graphs):
            return self._replay(plan, token_runs(plan), self.graphs)
        if self.draft_graphs is not None and num_drafts and plan.only_newest and self.records_drafts(plan.rows):
            return self._verify(plan, self.draft_graphs)
        if self.prompts is not None and self.prompts.takes(plan, self.table, drafts=num_drafts > 0):
            return Flight(plan, self.prompts.run(plan, self.table, drafts=num_drafts > 0))
        return self._run(plan, num_drafts)

    @torch.no_grad()
    def _run(self, plan: StepPlan, num_drafts: int) -> Flight:
        """A step that is not recorded. Logits exist for sampled rows only."""
        assert not (num_drafts and plan.is_pending.any()), "a step whose start the host does not know was not recorded"
        runs = token_runs(plan)
        upload = self._upload(plan, runs, num_drafts)
        batch = self._batch(plan, upload)
        activation = self.experts.of_step(upload, self.table, plan.rows)
        routing = Routing() if "traced_rows" in upload else None
        step = self.model.step(batch, self.view.step_cache(upload, runs), routing, activation=activation)
        hidden = self.model(batch, step=step)
        found = self._sample(plan, upload, hidden) | routes(upload, routing)
        found |= prompt_scores(self.model, upload, hidden, has_top=wants_prompt_top(self.table, plan))
        if num_drafts:
            found["drafts"] = self._draft(plan, upload, batch, step, hidden, found["tokens"], num_drafts)
        else:
            self._newest.index_copy_(0, upload["sampled_rows"], found["tokens"])
        return Flight(plan, Download(Bundle(found)))

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Within the block, no step is recorded or replayed."""
        kept = self.graphs, self.draft_graphs, self.prompts
        self.graphs = self.draft_graphs = self.prompts = None
        try:
            yield
        finally:
            self.graphs, self.draft_graphs, self.prompts = kept

    def records_drafts(self, rows: NDArray[np.int64]) -> bool:
        """Whether steps of these sequences are recorded, when each runs its newest token and drafts alone: not with
        rules or likeliest tokens, which ask for the exact samples of each."""
        graphs, settings = self.draft_graphs, self.table.settings(rows)
        if graphs is None or len(rows) > graphs.most or settings.ruled or settings.has_top or settings.is_traced:
            return False
        return self.experts.are_own(self.table, rows)

    def _is_recorded(self, plan: StepPlan, graphs: DecodeGraphs) -> bool:
        fits = plan.only_decodes and plan.num_tokens <= graphs.most
        fits = fits and not self.table.settings(plan.rows).is_traced
        return fits and self.experts.are_own(self.table, plan.rows)

    def _replay(self, plan: StepPlan, runs: TokenRuns, graphs: DecodeGraphs) -> Flight:
        """A step in which every sequence runs one token: its graph, then the sampling, which is one too where there are
        no rules and nothing comes with the samples, and one kernel on a CPU where there are rules."""
        assert isinstance(self.view, WholeCache), "graphs know no other view"
        settings, token_ids = self.table.settings(plan.rows), self._token_ids(plan, runs)
        slots, contexts, tables = self.view.numbers(self.table, runs)
        step = graphs.run((token_ids, runs.positions, slots, contexts, settings.drawing), tables)
        filtered = settings.is_filtered
        if filtered in step.draws and not settings.has_top:
            if not settings.ruled:
                return Flight(plan, graphs.draw(step, filtered=filtered))
            if not graphs.is_gpu:
                arrays = rule_arrays(self.table, plan, self.model.config.vocab_size)
                edits = edits_of({name: torch.from_numpy(array) for name, array in arrays.items()})
                found = graphs.draw(step, filtered=filtered) if edits is None else graphs.draw_adjusted(step, edits)
                return Flight(plan, found)
        upload = Upload(self._staging)
        self._put_sampling(upload, plan, np.cumsum(plan.counts))
        upload.send()
        found = self._draw(upload, step.logits[: plan.num_tokens])
        self._newest.index_copy_(0, upload["sampled_rows"], found["tokens"])
        return Flight(plan, Download(Bundle(found)))

    def _verify(self, plan: StepPlan, graphs: DraftGraphs) -> Flight:
        """A step in which every sequence runs its newest token and drafts: two graphs and the sampling in between, or
        one for all three."""
        if graphs.draws:
            return Flight(plan, graphs.run(plan, self.table), graphs.width)
        upload, whole = Upload(self._staging), graphs.whole(plan)
        upload.put("step", graphs.layout(plan, self.table))
        self._put_sampling(upload, whole, np.cumsum(whole.counts))
        upload.send()
        found = graphs.verify(upload["step"])
        upload.replace("sample_positions", found.inputs.sample_positions[: whole.num_tokens])
        drawn = self._draw(upload, found.logits[: whole.num_tokens])
        drawn["drafts"] = graphs.draft(upload["step"], drawn["tokens"])
        return Flight(plan, Download(Bundle(drawn)), graphs.width)

    @torch.no_grad()
    def clear(self, blocks: list[int]) -> None:
        """Zero blocks whose rows may not be finite, before they are written."""
        size = self.cache.block_size
        slots = (np.array(blocks)[:, None] * size + np.arange(size)).ravel()
        self.cache.rows.index_fill_(1, torch.from_numpy(slots).to(self.device), 0)

    def _upload(self, plan: StepPlan, runs: TokenRuns, num_drafts: int) -> Upload:
        table, upload = self.table, Upload(self._staging)
        ends = np.cumsum(plan.counts)
        upload.put("token_ids", self._token_ids(plan, runs))
        upload.put("positions", runs.positions)
        upload.put("cu_seqlens", np.concatenate([np.zeros(1, dtype=np.int64), ends]))
        self.view.put(upload, table, runs)
        self.experts.put(upload, table, runs)
        self._put_sampling(upload, plan, ends)
        put_prompt_scoring(upload, table, plan)
        put_tracing(upload, table, plan)
        if num_drafts:
            self._put_drafting(upload, plan, runs)
        upload.send()
        return upload

    def _token_ids(self, plan: StepPlan, runs: TokenRuns) -> NDArray[np.int64]:
        """-1 - row stands for the token that this row of the table is about to get."""
        token_ids = self.table.token_ids[runs.rows, runs.positions]
        waits = plan.is_pending.nonzero()[0]
        if len(waits):
            last = waits if plan.only_decodes else np.cumsum(plan.counts)[waits] - 1
            token_ids[last] = -1 - plan.rows[waits]
        return token_ids

    def _put_sampling(self, upload: Upload, plan: StepPlan, ends: NDArray[np.int64]) -> None:
        """What samples come from and how they are drawn; filters only where one is on, rules where there are any."""
        put_rules(upload, self.table, plan, self.model.config.vocab_size)
        put_scoring(upload, self.table, plan)
        table, samples = self.table, plan.num_samples
        if plan.only_decodes:
            rows, offsets = plan.rows, np.zeros_like(samples)
        else:
            rows = np.repeat(plan.rows, samples)
            offsets = np.arange(len(rows)) - np.repeat(np.cumsum(samples) - samples, samples)
        upload.put("sampled_rows", plan.rows[plan.sampled])
        # sample j of a sequence comes from row count - num_samples + j of its run
        upload.put("sample_rows", ends - samples if plan.only_decodes else np.repeat(ends - samples, samples) + offsets)
        temperature = table.temperature[rows]
        upload.put("temperature", temperature)
        if not temperature.any():
            return
        upload.put("seeds", table.seed[rows])
        pending = table.num_pending[rows] - 1  # the plan counts its own sample among them
        upload.put("sample_positions", table.num_known[rows] + pending + offsets)
        active = np.zeros(len(rows), dtype=bool)
        for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            values = getattr(table, name)[rows]
            if (values != off).any():
                upload.put(name, values)
                active |= values != off
        if active.any():
            upload.put("filtered", np.flatnonzero(active & (temperature > 0)))

    def _put_drafting(self, upload: Upload, plan: StepPlan, runs: TokenRuns) -> None:
        """What the MTP module needs: the token after each row, as far as it is known, and where samples belong."""
        table, entries = self.table, plan.sampled
        rows = plan.rows[entries]
        upload.put("next_ids", table.token_ids[runs.rows, runs.positions + 1])
        upload.put("entries", entries)
        upload.put("sample_grid", plan.grid(np.arange(plan.num_samples.sum()), fill=0)[entries])
        upload.put("num_samples", plan.num_samples[entries])
        upload.put("num_known", table.num_known[rows])
        upload.put("num_slots", table.num_blocks[rows] * table.block_size)

    def _batch(self, plan: StepPlan, upload: Upload) -> PackedTokens:
        token_ids = upload["token_ids"]
        if plan.is_pending.any():  # see `_token_ids`
            newest = self._newest[(-1 - token_ids).clamp_min(0)]
            token_ids = torch.where(token_ids < 0, newest, token_ids)
        return PackedTokens(token_ids, upload["positions"], Segments(upload["cu_seqlens"], plan.counts))

    def _sample(self, plan: StepPlan, upload: Upload, hidden: Float[Tensor, "tokens dim"]) -> dict[str, Tensor]:
        rows = upload["sample_rows"]
        if not len(rows):
            return {"tokens": rows, "logprobs": upload["temperature"]}
        return self._draw(upload, self.model.logits(hidden if len(rows) == plan.num_tokens else hidden[rows]))

    def _draw(self, upload: Upload, logits: Float[Tensor, "samples vocab"]) -> dict[str, Tensor]:
        """Samples as the requests' rules want them, with log-probabilities that know of no rules."""
        seeds, temperature, edits = upload.get("seeds"), upload["temperature"], edits_of(upload)
        uniforms = None if seeds is None else counter_uniforms(seeds, upload["sample_positions"])
        filters = [upload.get(name) for name in ("top_k", "top_p", "min_p", "filtered")]
        if edits is None:
            tokens, logprobs = sample(logits, temperature, uniforms, *filters)
        else:
            tokens, logprobs = sample_adjusted(logits, temperature, uniforms, *edits, *filters)
        return {"tokens": tokens, "logprobs": logprobs, **top_tokens(upload, logits)}

    def _draft(
        self,
        plan: StepPlan,
        upload: Upload,
        batch: PackedTokens,
        step: StepContext,
        hidden: Float[Tensor, "tokens dim"],
        tokens: Int[Tensor, " samples"],
        num_drafts: int,
    ) -> Int[Tensor, "sampled drafts"]:
        """Write MTP cache rows for this step's tokens, and guess behind each sampled sequence.

        Row i joins hidden[i] with the token after it. Rows of rejected drafts get a stale one, and are overwritten when
        their positions run again. The last MTP row of a prefix block shared by two sequences holds the next token of
        whoever wrote it first: that can cost a draft, never a wrong token, since every draft is verified.
        """
        next_ids = upload["next_ids"].index_copy(0, upload["sample_rows"], tokens)
        if not len(plan.sampled):
            self.model.mtp_hidden(0, hidden, next_ids, step)
            return tokens[:0, None].expand(0, num_drafts)
        samples, rows = tokens[upload["sample_grid"]], upload["sample_rows"][upload["sample_grid"]]
        accepted = accept_drafts(samples, batch.token_ids[rows], upload["num_samples"], upload["num_known"])
        places = rows.flatten()[accepted.places]
        activation = self.experts.of_step(upload, self.table, plan.rows, places)
        step = replace(step, routing=None, activation=activation)
        hidden = self.model.mtp_hidden(0, hidden, next_ids, step, places)
        drafts = [most_likely_tokens(self.model.mtp_logits(0, hidden))]
        tables = upload["block_tables"][upload["entries"]]
        bounds = self.table.num_known[plan.rows[plan.sampled]] + plan.num_samples[plan.sampled]
        for index in range(num_drafts - 1):
            # one more pass, a position further: the module's own output and draft stand in for the main model's
            positions = accepted.positions + index
            cache = self.view.drafting(tables, positions, upload["num_slots"], bounds + index)
            step = self._one_each(drafts[-1], positions, cache, activation)
            hidden = self.model.mtp_hidden(0, hidden, drafts[-1], step)
            drafts.append(most_likely_tokens(self.model.mtp_logits(0, hidden)))
        if self.draft_graphs is not None:  # the next step may be launched before anyone has read this
            self.draft_graphs.state.write(upload["sampled_rows"], accepted.newest, accepted.lengths, drafts)
        return torch.stack(drafts, 1)

    def _one_each(
        self, token_ids: Tensor, positions: Tensor, cache: StepCache, activation: Activation | None
    ) -> StepContext:
        count = len(token_ids)
        segments = Segments(torch.arange(count + 1, device=self.device), np.ones(count, dtype=np.int64))
        return self.model.step(PackedTokens(token_ids, positions, segments), cache, activation=activation)
