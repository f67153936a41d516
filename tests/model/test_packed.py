"""Packed sequences are what each subject gives on its own: values and gradients, of attention up to both stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inside import flat, prepared, shown
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.config.recipes import RECIPES
from kmtr.data.loader.batch import Batch
from kmtr.model.encoder import Encoder, Grid, LineEmbed, PatchEmbed, Position
from kmtr.model.packing import Lengths, Places, attend, indices, join
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer
from kmtr.model.transformer import Block
from kmtr.physics.cycle import static_dynamic
from kmtr.systems.base import depth_draws
from kmtr.tasks import Model, Preparer
from kmtr.tasks.losses import masked_reconstruction
from kmtr.tasks.masked import hidden_lines
from kmtr.types import InputError

CPU = torch.device("cpu")
DRAWS = 3
"""Place of stochastic depth's numbers among an encoder's arguments."""
Tables = dict[str, Tensor]


def lengths_of(*counts: int) -> Lengths:
    return Lengths(counts, torch.tensor(counts))


@pytest.fixture
def uneven(batch: Batch) -> Batch:
    """Both R, and: a subject without long axis and with three frames, one with a single slice, one with no data."""
    padded = batch.padded.clone()
    padded[0, 2] = padded[0, :, 3] = True
    padded[1, 1:] = True
    padded[3] = True
    sampled = batch.sampled & ~padded[..., None]
    kspace = batch.kspace.masked_fill(padded[:, :, None, :, None, None], 0)
    acquired = batch.acquired & ~padded[..., None]
    changed = replace(batch, padded=padded, kspace=kspace, acquired=acquired, sampled=sampled)
    assert len({int(n) for n in changed.sampled.sum((1, 2, 3))}) > 3
    return changed


# --------------------------------------------------------------------------------------------------------- sequences

counts = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=6)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, queries: Lengths, sources: Lengths) -> Tensor:
    """The same over all pairs of tokens at once, those of different subjects masked out."""
    same = queries.subject[:, None] == sources.subject
    scores = torch.einsum("thc,shc->hts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hts,shc->thc", scores.masked_fill(~same, -torch.inf).softmax(-1), v)


@given(counts, st.integers(0, 2**32))
def test_attention_stays_within_a_subject(sizes: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, sources = (lengths_of(*each) for each in zip(*sizes, strict=True))

    def draw(lengths: Lengths) -> Tensor:
        x = torch.randn(lengths.total, 2, 8, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    given_to = draw(queries), draw(sources), draw(sources)
    results = []
    for attention in (attend, masked_attention):
        out = attention(*given_to, queries, sources)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), given_to)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=5))
def test_joining_keeps_every_subject_together_and_in_order(sizes: list[tuple[int, int, int]]) -> None:
    kinds = [lengths_of(*each) for each in zip(*sizes, strict=True)]
    named = [
        torch.stack([lengths.subject, torch.full((lengths.total,), kind), torch.arange(lengths.total)], 1).double()
        for kind, lengths in enumerate(kinds)
    ]
    x, lengths, places = join(list(zip(named, kinds, strict=True)))
    assert lengths.host == tuple(map(sum, sizes)) == tuple(lengths.counts.tolist())
    assert [tuple(row) for row in x.tolist()] == sorted(tuple(row) for part in named for row in part.tolist())
    assert torch.equal(lengths.subject, x[:, 0].long())
    for place, part in zip(places, named, strict=True):
        assert torch.equal(x[place], part)


def test_half_precision_on_a_gpu_is_one_kernel_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU in bf16: flash attention over `starts`, and no value is asked back from the device."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    queries, sources = (Lengths(c, torch.tensor(c, device="cuda")) for c in ((5, 0, 70), (3, 2, 90)))
    q, k, v = (torch.randn(n.total, 2, 32, device="cuda", requires_grad=True) for n in (queries, sources, sources))
    weight = torch.randn_like(q)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attend(*half, queries, sources)
        (out * weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = attend(q, k, v, queries, sources)
    (exact * weight).sum().backward()
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
    for a, b in zip(half, (q, k, v), strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------------------- model


def gradients(module: torch.nn.Module, losses: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        largest = max(1.0, float(value.detach().abs().max()))
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5 * largest, msg=name)


def terms(module: Model, prepare: Preparer, batch: Batch, stage: str) -> dict[str, Tensor]:
    """All that `stage` says of each subject; of an absent slice nothing is asked."""
    inputs = prepared(prepare, batch, stage)
    out = flat(module(inputs))
    if "z" in out:
        out["z"] = out["z"].masked_fill(shown(inputs).absent.all(-1)[..., None, None], 0.0)
    return out


def added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("changes", [{}, {"model.depth": 3, "model.decoder_depth": 2, "model.checkpointing": True}])
@pytest.mark.parametrize("stage", ["masked", "align"])
def test_packed_is_one_by_one_is_masked(
    small: RunConfig, tables: Tables, uneven: Batch, stage: str, changes: dict[str, Any]
) -> None:
    """Three ways: all subjects packed; each subject alone; and packed with attention as one masked softmax."""
    config = override(small, changes | {"align.train_image_encoder": True})
    torch.manual_seed(0)
    module, prepare = Model(config), Preparer(config, tables, CPU)

    def result(out: dict[str, Tensor]) -> dict[str, Tensor]:
        weighted = torch.cat([x.flatten() * torch.linspace(0.5, 2, x.numel()) for x in out.values()])
        return out | gradients(module, weighted)

    packed = result(terms(module, prepare, uneven, stage))
    close(result(added([terms(module, prepare, uneven[i : i + 1], stage) for i in range(len(uneven))])), packed)
    for block in module.modules():
        if isinstance(block, Block):
            block.attention.attend = masked_attention
    close(result(terms(module, prepare, uneven, stage)), packed)


def test_no_subject_hears_of_another(small: RunConfig, tables: Tables, uneven: Batch) -> None:
    torch.manual_seed(0)
    module, prepare = Model(small).eval(), Preparer(small, tables, CPU)
    kspace = uneven.kspace.clone()
    kspace[2] = kspace[2] * -3 + 1
    with torch.no_grad():
        before, after = (terms(module, prepare, batch, "align") for batch in (uneven, replace(uneven, kspace=kspace)))
    others = torch.arange(len(uneven)) != 2
    for name in before:
        assert torch.equal(before[name][others], after[name][others]), name
        assert not torch.equal(before[name][2], after[name][2]), name


def test_hidden_lines_and_padding_never_reach_the_encoder(small: RunConfig, tables: Tables, uneven: Batch) -> None:
    """What it says of the visible lines is the same bit for bit whatever was hidden, unsampled or padded."""
    torch.manual_seed(0)
    module, prepare = Model(small), Preparer(small, tables, CPU)
    visible = (uneven.sampled & ~hidden_lines(small, uneven)[0])[:, :, None, :, :, None]
    spoilt = torch.where(visible, uneven.kspace, torch.full_like(uneven.kspace, complex(1e4, torch.nan)))
    encoded = []
    for kspace in (uneven.kspace, spoilt):
        inputs = shown(prepared(prepare, replace(uneven, kspace=kspace), "masked"))
        encoded.append(module.systems["kspace"]([inputs.lines], inputs.cells, inputs.absent))
    assert torch.equal(encoded[0].tokens, encoded[1].tokens)
    assert torch.equal(encoded[0].vectors, encoded[1].vectors)
    assert not encoded[0].frames[uneven.padded].any()


@pytest.mark.parametrize("domain", ["lines", "patches"])
def test_the_order_of_tokens_means_nothing(small: RunConfig, tables: Tables, uneven: Batch, domain: str) -> None:
    """A subject's tokens permuted, its encoded tokens are permuted; its frame vectors stay."""
    torch.manual_seed(0)
    module, inputs = Model(small), shown(prepared(Preparer(small, tables, CPU), uneven, "masked"))
    encoder = module.systems["kspace" if domain == "lines" else "image"]
    where = (inputs.cells, inputs.absent) if domain == "lines" else (inputs.patch_cells, inputs.absent_patches)
    tokens = getattr(inputs, domain)
    order = torch.cat([place[torch.randperm(len(place))] for place in _split(torch.arange(len(tokens.index)), tokens)])
    plain = encoder([tokens], *where)
    turned = encoder([replace(tokens, index=tokens.index[order], values=tokens.values[order])], *where)
    torch.testing.assert_close(turned.tokens, plain.tokens[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(turned.vectors, plain.vectors, rtol=0, atol=1e-5)


def _split(x: Tensor, places: Places) -> tuple[Tensor, ...]:
    return x.split(list(places.lengths.host))


def test_several_vocabularies_are_one_sequence(small: RunConfig, tables: Tables, uneven: Batch) -> None:
    """Lines and patches through one encoder: packed as one by one."""
    torch.manual_seed(0)
    data, model = small.data, small.model
    line = LineEmbed(LineTokenizer.features(data, model), data.matrix[0], model.width)
    patch = PatchEmbed(PatchTokenizer.features(model), model.width)
    encoder = Encoder([(Grid.lines(data), line), (Grid.patches(data, model), patch)], model)
    prepare = Preparer(small, tables, CPU)

    def run(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        inputs = shown(prepared(prepare, batch, "masked"))
        encoded = encoder([inputs.lines, inputs.patches], inputs.cells, inputs.absent)
        assert encoded.lengths.host == tuple(
            a + b for a, b in zip(inputs.lines.lengths.host, inputs.patches.lengths.host, strict=True)
        )
        return encoded.tokens, encoded.vectors, encoded.frames

    alone = [torch.cat(parts) for parts in zip(*(run(uneven[i : i + 1]) for i in range(8)), strict=True)]
    for ours, theirs in zip(run(uneven), alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inputs", ["kspace", "zerofilled", "both"])
def test_what_the_k_space_encoder_reads_may_be_lines_patches_or_both(
    small: RunConfig, tables: Tables, uneven: Batch, inputs: str
) -> None:
    """One vector per frame slot of the lines in any case, packed as one by one, and losses with a gradient."""
    config = override(small, {"model.encoder_inputs": inputs})
    torch.manual_seed(0)
    module, prepare = Model(config), Preparer(config, tables, CPU)

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        vector = module(prepare.embedding(batch))["embedding"]["vector"]
        return terms(module, prepare, batch, "masked")["kspace"], vector

    loss, embedding = run(uneven)
    alone = [torch.cat(parts) for parts in zip(*(run(uneven[i : i + 1]) for i in range(8)), strict=True)]
    torch.testing.assert_close(loss, alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(embedding, alone[1], rtol=0, atol=1e-5)
    assert embedding.shape == (8, 3 * 3 * small.model.width)
    loss.sum().backward()
    embeds = [p.grad for name, p in module.named_parameters() if name.startswith("systems.kspace.embed.")]
    assert all(grad is not None and grad.any() for grad in embeds)


def test_a_patch_counts_in_each_frame_that_it_covers(small: RunConfig, tables: Tables, uneven: Batch) -> None:
    config = override(small, {"model.encoder_inputs": "zerofilled"})
    inputs = shown(prepared(Preparer(config, tables, CPU), uneven, "masked"))
    tokens = inputs.zerofilled
    assert tokens is not None
    encoder = Model(config).systems["kspace"]
    assert encoder.spans == [2]
    x = torch.randn(len(tokens.index), 5)
    means = encoder._pool(x, tokens, 2, inputs.cells)
    for cell in range(0, len(means), 7):
        row, (z, t) = inputs.cells.lengths.subject[cell], inputs.cells.index[cell]
        ours = (tokens.lengths.subject == row) & (tokens.index[:, 0] == z) & (tokens.index[:, 1] == t // 2)
        assert int(ours.sum()) == 4 * 4
        torch.testing.assert_close(means[cell], x[ours].mean(0))


def test_frame_vectors_lie_on_their_grid(small: RunConfig, tables: Tables, uneven: Batch) -> None:
    torch.manual_seed(0)
    inputs = shown(prepared(Preparer(small, tables, CPU), uneven, "masked"))
    encoded = Model(small).systems["kspace"]([inputs.lines], inputs.cells, inputs.absent)
    assert torch.equal(encoded.frames[~inputs.absent], encoded.vectors)
    assert not encoded.frames[inputs.absent].any()
    row, (z, t, _) = inputs.line_targets.lengths.subject, inputs.line_targets.index.unbind(-1)
    assert torch.equal(encoded.vectors[encoded.vector_of(inputs.line_targets)], encoded.frames[row, z, t])
    assert not torch.cat(static_dynamic(encoded.frames, encoded.absent), -1)[3].any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_positions_of_a_recipe_have_different_codes(recipe: str) -> None:
    """A code is (slice, t, places), each in channels of its own, so that codes differ where those of one axis do."""
    config = RECIPES[recipe]()
    for grid in (Grid.lines(config.data), Grid.patches(config.data, config.model)):
        position = Position(grid, config.model.width)
        assert position.tables == 2 + len(grid.places)
        for axis in range(position.tables):
            table = position.get_buffer(f"table{axis}")
            assert torch.pdist(table).min() > 0.1, (recipe, axis)


# ------------------------------------------------------------------------------------------------------- drop path


def test_stochastic_depth_leaves_out_whole_branches_of_a_subject(
    small: RunConfig, tables: Tables, uneven: Batch
) -> None:
    config = override(small, {"model.depth": 3, "model.drop_path": 0.5})
    torch.manual_seed(0)
    encoder = Model(config).systems["kspace"]
    assert encoder.rates == [0.0, 0.25, 0.5]
    inputs = shown(prepared(Preparer(config, tables, CPU), uneven, "masked"))
    run = partial(encoder, [inputs.lines], inputs.cells, inputs.absent)
    never, always = torch.ones(8, 3, 2), torch.zeros(8, 3, 2)
    mixed = torch.where(torch.arange(8)[:, None, None] == 2, always, never)
    out = run(mixed)
    rows = inputs.lines.lengths.subject
    with torch.no_grad():
        x = encoder.embed[0](inputs.lines.values, inputs.lines.index) + encoder.position[0](inputs.lines.index)
        first = encoder.blocks[0](x, inputs.lines.lengths)
        torch.testing.assert_close(out.tokens[rows == 2], encoder.norm(first)[rows == 2])  # rate 0 never leaves out
        y = encoder.norm(_scaled(encoder.blocks, first, inputs.lines.lengths, (1 / 0.75, 2.0)))
        torch.testing.assert_close(out.tokens[rows != 2], y[rows != 2])


def _scaled(blocks: torch.nn.ModuleList, x: Tensor, lengths: Lengths, factors: tuple[float, ...]) -> Tensor:
    for block, factor in zip(list(blocks)[1:], factors, strict=True):
        y = block.norm_attention(x)
        x = x + factor * block.attention(y, y, lengths, lengths)
        x = x + factor * block.mlp(block.norm_mlp(x))
    return x


def test_stochastic_depth_is_a_function_of_seed_visit_and_subject(
    small: RunConfig, tables: Tables, batch: Batch
) -> None:
    config = override(small, {"model.depth": 2, "model.drop_path": 0.5})
    prepare = Preparer(config, tables, CPU)
    whole = depth_draws(config, batch, 2)
    assert whole is not None
    assert whole.shape == (8, 2, 2)
    for i in (0, 5):
        assert torch.equal(depth_draws(config, batch[i : i + 1], 2), whole[i : i + 1])
    assert batch.epoch is not None
    assert not torch.equal(depth_draws(config, replace(batch, epoch=batch.epoch + 1), 2), whole)
    assert not torch.equal(depth_draws(config, batch, 0), whole), "each pass has its own"
    assert depth_draws(config, replace(batch, epoch=None), 2) is None, "validation"
    assert torch.equal(shown(prepared(prepare, batch, "align")).all_lines.lengths.counts, batch.sampled.sum((1, 2, 3)))
    inputs = prepared(prepare, batch, "align").tasks["align"]
    assert torch.equal(inputs.lines.arguments[DRAWS], whole)
    assert inputs.teacher.arguments[DRAWS] is None, "what is frozen is whole"
    assert depth_draws(small, batch, 2) is None


@pytest.mark.parametrize("stage", ["masked", "align"])
def test_stochastic_depth_draws_the_same_when_a_block_is_run_again(
    small: RunConfig, tables: Tables, batch: Batch, stage: str
) -> None:
    results = []
    for checkpointing in (False, True):
        config = override(small, {"model.depth": 3, "model.drop_path": 0.9, "model.checkpointing": checkpointing})
        torch.manual_seed(0)
        module = Model(config)
        out = flat(module(prepared(Preparer(config, tables, CPU), batch, stage)))
        results.append(out | gradients(module, torch.cat([x.flatten() for x in out.values()])))
    close(*results)
    whole = Model(override(small, {"model.depth": 3}))
    whole.load_state_dict(module.state_dict())
    assert not torch.equal(flat(whole(prepared(Preparer(small, tables, CPU), batch, stage)))["kspace"], out["kspace"])


@pytest.mark.parametrize("width", [4, 20, 264])
def test_heads_that_no_kernel_takes_are_refused(small: RunConfig, width: int) -> None:
    changes = {"model.head_width": width, "model.width": 2 * width, "model.decoder_width": width}
    with pytest.raises(InputError, match=rf"model\.head_width: expected a multiple of 8 up to 256.*got {width}"):
        override(small, changes)


# ----------------------------------------------------------------------------------------------------------- compile


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["some", pytest.param("all", marks=pytest.mark.full)])
def test_compiled_is_eager_and_other_lengths_compile_nothing(blocks: str) -> None:
    """Self- and cross-attention, stochastic depth, with and without activation checkpointing."""
    script = Path(__file__).parents[1] / "compiled_blocks.py"
    here = os.environ | {
        "TORCHINDUCTOR_COMPILE_THREADS": "1"
    }  # else processes that import torch anew, to compile little
    done = subprocess.run([sys.executable, str(script), blocks], capture_output=True, text=True, timeout=900, env=here)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] < 1e-5
    assert 0 < found["first"] == found["last"], "other lengths, the same kernels"


def test_compiling_changes_no_name_of_a_weight(small: RunConfig) -> None:
    plain, compiled = (Model(override(small, {"train.compile": how})) for how in (False, True))
    assert list(plain.state_dict()) == list(compiled.state_dict())
    blocks = [module for module in compiled.modules() if isinstance(module, Block)]
    assert len(blocks) == 2 * (small.model.depth + 1 + small.model.decoder_depth)
    assert all(block._compiled_call_impl is not None for block in blocks)


# ---------------------------------------------------------------------------------------------- a known optimum


def test_a_linear_predictor_finds_the_conditional_mean() -> None:
    """Gaussian lines with a known covariance: masked reconstruction has its minimum at the conditional mean.

    Let a subject's lines be y = (v, h) with zero mean and covariance S, v visible and h hidden. E|h - W v|^2 is least
    at the orthogonal projection, W = S_hv S_vv^-1, where the residual is uncorrelated with v (normal equations); for
    Gaussian y that is E[h | v], which no predictor beats. The loss left is the trace of the Schur complement
    S_hh - S_hv S_vv^-1 S_vh, over the features. On a finite sample the same holds with the sample's S.
    """
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64) / 2 + torch.eye(6, dtype=torch.float64)
    y = torch.randn(4000, 6, generator=generator, dtype=torch.float64) @ mixing.T
    v, h = y[:, :4], y[:, 4:].float()
    sample = y.T @ y / len(y)
    closed = sample[4:, :4] @ torch.linalg.inv(sample[:4, :4])
    least = torch.trace(sample[4:, 4:] - closed @ sample[:4, 4:]) / 2
    each = torch.tensor([2500, 0, 1500])  # subjects with different numbers of hidden lines

    def loss(weight: Tensor) -> Tensor:
        means = masked_reconstruction(v.float() @ weight.T, h, each)
        return (means * each).sum() / each.sum()  # a mean per subject: weighed back to one over the lines

    weight = closed.float().requires_grad_()
    loss(weight).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-5
    torch.testing.assert_close(loss(weight).double(), least, rtol=1e-5, atol=0)
    learnt = torch.zeros(2, 4, requires_grad=True)
    optimizer = torch.optim.LBFGS([learnt], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(learnt)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(learnt.detach().double(), closed, rtol=0, atol=1e-3)
    with torch.no_grad():
        assert all(loss(closed.float() + 0.05 * torch.randn(2, 4, generator=generator)) > least for _ in range(20))


@pytest.mark.parametrize("values", [(), (3,), (0, 1, 2, 3), (0, 1, 5, 6, 4, 4)])
def test_numbers_are_made_on_the_device(values: tuple[int, ...]) -> None:
    assert indices(values, torch.device("cpu")).tolist() == list(values)
