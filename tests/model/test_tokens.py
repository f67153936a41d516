"""Tokens hold what may be seen, say where they are, and lead back to the k-space and images that they came from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inside import prepared, shown
from torch import Tensor

from kmtr.config import RunConfig, override
from kmtr.data.dataset.reader import Reader
from kmtr.data.loader import statistics
from kmtr.data.loader.batch import Batch
from kmtr.data.loader.collate import collate
from kmtr.model.encoder import Grid, Position
from kmtr.model.packing import gather
from kmtr.model.tokenizers import LineTokenizer, PatchTokenizer, Tokens
from kmtr.physics.cycle import static_dynamic
from kmtr.physics.fourier import fftc
from kmtr.physics.lines import compress, compression, mix, phase_gain, static_part
from kmtr.tasks import Preparer
from kmtr.tasks.masked import hidden_lines, hidden_patches

CPU = torch.device("cpu")
Tables = dict[str, Tensor]

VARIANTS: dict[str, dict[str, object]] = {
    "as in tiny": {},
    "whole": {"model.line_parts": "whole"},
    "hybrid": {"model.readout": "hybrid"},
    "hybrid, whole": {"model.readout": "hybrid", "model.line_parts": "whole"},
    "per line": {"model.normalisation": "line", "model.remove": "gain"},
    "per line, whole": {"model.normalisation": "line", "model.line_parts": "whole"},
    "raw": {"model.normalisation": "none", "model.remove": "none"},
    "both": {"model.encoder_inputs": "both"},
    "virtual coil": {"model.coils": 1, "model.normalisation": "none"},
}
"""Ways to make tokens of lines."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, small: RunConfig, reader: Reader) -> tuple[RunConfig, Tables]:
    """A configuration that makes tokens in one of the ways, and its statistics."""
    config = override(small, VARIANTS[request.param])
    return config, statistics.fit(config, reader).tensors()


@pytest.fixture
def uneven(batch: Batch) -> Batch:
    """A batch in which the first subject has no long axis and only three frames, so fewer tokens."""
    padded, sampled, kspace = batch.padded.clone(), batch.sampled.clone(), batch.kspace.clone()
    padded[0, 2] = True
    padded[0, :, 3] = True
    sampled[0][padded[0]] = False
    kspace[0].transpose(1, 2)[padded[0]] = 0
    acquired = batch.acquired & ~padded[..., None]
    return replace(batch, padded=padded, kspace=kspace, acquired=acquired, sampled=sampled)


def equal(a: Tokens | None, b: Tokens | None) -> bool:
    assert a is not None
    assert b is not None
    return a.lengths.host == b.lengths.host and torch.equal(a.index, b.index) and torch.equal(a.values, b.values)


# ------------------------------------------------------------------------------------------------------------- gather


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_gather_lists_the_chosen_cells_in_order(seed: int, share: float) -> None:
    chosen = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(seed)) < share
    chosen[0] = False
    places = gather(chosen)
    assert torch.equal(torch.cat([places.lengths.subject[:, None], places.index], 1), chosen.nonzero())
    assert places.lengths.host == tuple(places.lengths.counts.tolist()) == tuple(chosen.sum((1, 2, 3)).tolist())
    assert places.lengths.starts.tolist() == [0, 0, int(chosen[1].sum()), int(chosen.sum())]


# --------------------------------------------------------------------------------------------------------------- lines


@pytest.mark.parametrize("stage", ["masked", "align"])
def test_hidden_and_unsampled_lines_never_reach_the_encoder(
    variant: tuple[RunConfig, Tables], uneven: Batch, stage: str
) -> None:
    prepare = Preparer(*variant, CPU)
    before = shown(prepared(prepare, uneven, stage))
    hidden, _ = hidden_lines(variant[0], uneven)
    visible = uneven.sampled & ~hidden
    for what, spoilt in (("hidden", hidden), ("unsampled", ~uneven.sampled)):
        kspace = torch.where(spoilt[:, :, None, :, :, None], uneven.kspace * -3e3 + 7j, uneven.kspace)
        after = shown(prepared(prepare, replace(uneven, kspace=kspace), stage))
        assert equal(after.lines, before.lines), what
        assert equal(after.zerofilled, before.zerofilled), what
        if variant[0].model.encoder_inputs != "zerofilled":
            assert torch.equal(after.lines.index, visible.nonzero()[:, 1:])
        changed = not torch.equal(after.line_targets.values, before.line_targets.values)
        assert changed == (what == "hidden")
        if stage == "align":
            assert equal(after.all_lines, before.all_lines) == (what == "unsampled")
            assert equal(after.all_zerofilled, before.all_zerofilled) == (what == "unsampled")


def test_lines_that_only_the_source_has_are_targets_and_nothing_else(
    small: RunConfig, tables: Tables, reader: Reader
) -> None:
    config = override(small, {"masked.target": "all", "model.readout_fraction": 1.0})
    batch = collate(reader.samples(range(8)), config).to(CPU)
    prepare = Preparer(config, tables, CPU)
    before = shown(prepared(prepare, batch, "masked"))
    visible = batch.sampled & ~hidden_lines(config, batch)[0]
    assert torch.equal(before.line_targets.index, (~visible).nonzero()[:, 1:])
    spoilt = torch.where(visible[:, :, None, :, :, None], batch.kspace, batch.kspace * -3e3 + 7j)
    after = shown(prepared(prepare, replace(batch, kspace=spoilt), "masked"))
    assert equal(after.lines, before.lines)
    assert not torch.equal(after.line_targets.values, before.line_targets.values)
    fixed, moving = prepare.readers["kspace"].lines.parts(before.line_targets.values, before.line_targets.index)
    factor = phase_gain(batch.kspace, visible, samples=config.model.readout_samples(config.data.matrix[1]))
    canonical = batch.kspace / factor[..., None, None, None]
    row, (z, t, ky) = before.line_targets.lengths.subject, before.line_targets.index.unbind(-1)
    mean = canonical.mean(3)[row, z, :, ky]  # over all frames, which the source has
    torch.testing.assert_close(fixed, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fixed + moving, canonical[row, z, :, t, ky], rtol=1e-4, atol=1e-5)


def test_hidden_patches_never_reach_the_image_encoder(small: RunConfig, tables: Tables, uneven: Batch) -> None:
    tokenizer = PatchTokenizer(small.data, small.model, tables, CPU)
    images = tokenizer.images(uneven)
    hidden = hidden_patches(small, uneven)
    spoilt = hidden.repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    others = torch.where(spoilt, images * 100 + 5, images)
    assert equal(tokenizer(uneven, others, ~hidden), tokenizer(uneven, images, ~hidden))
    assert not equal(tokenizer(uneven, others, hidden), tokenizer(uneven, images, hidden))


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_tokens_lead_back_to_their_lines(
    variant: tuple[RunConfig, Tables], reader: Reader, uneven: Batch, fraction: float
) -> None:
    config, tables = variant
    if fraction != config.model.readout_fraction:
        config = override(config, {"model.readout_fraction": fraction})
        tables = statistics.fit(config, reader).tensors()
    tokenizer = LineTokenizer(config.data, config.model, tables, CPU)
    tokens = tokenizer(uneven, known=uneven.sampled, chosen=uneven.sampled)
    assert tokens.values.shape[-1] == LineTokenizer.features(config.data, config.model)
    samples = config.model.readout_samples(config.data.matrix[1])
    factor = phase_gain(uneven.kspace, uneven.sampled, config.model.remove, samples)
    canonical = uneven.kspace / factor[..., None, None, None]
    fixed, moving = tokenizer.parts(tokens.values, tokens.index)
    row, (z, t, ky) = tokens.lengths.subject, tokens.index.unbind(-1)
    expected = canonical[row, z, :, t, ky][..., tokenizer.kx]
    torch.testing.assert_close(fixed + moving, expected, rtol=1e-4, atol=1e-5)
    if config.model.line_parts == "whole":
        assert not moving.any()
    else:
        static = static_part(canonical, uneven.sampled)[row, z, :, ky][..., tokenizer.kx]
        torch.testing.assert_close(fixed, static, rtol=1e-4, atol=1e-5)


def test_filling_puts_acquired_lines_back_exactly(
    variant: tuple[RunConfig, Tables], reader: Reader, batch: Batch
) -> None:
    config = override(variant[0], {"model.readout_fraction": 1.0})
    tables = statistics.fit(config, reader).tensors()
    tokenizer = LineTokenizer(config.data, config.model, tables, CPU)
    missing = ~batch.sampled
    true = tokenizer(batch, known=batch.sampled, chosen=missing)
    filled = tokenizer.fill(batch.kspace, batch.sampled, true.values, true)
    acquired = batch.sampled[:, :, None, :, :, None].expand_as(filled)
    assert torch.equal(filled[acquired], batch.kspace[acquired])
    scale = batch.kspace.abs().amax((1, 2, 3, 4, 5), keepdim=True)
    torch.testing.assert_close(filled / scale, batch.kspace / scale, rtol=1e-4, atol=1e-6)
    guess = tokenizer.fill(batch.kspace, batch.sampled, torch.randn_like(true.values), true)
    assert torch.equal(guess[acquired], batch.kspace[acquired])


def test_hybrid_tokens_are_profiles_along_x(small: RunConfig, batch: Batch) -> None:
    """An object at one x is there and nowhere else, at the resolution of the central half of kx."""
    profile = torch.zeros(32, dtype=torch.complex64)
    profile[10] = 1.0
    kspace = fftc(profile, (-1,)).expand(batch.kspace.shape).clone()
    config = override(small, {"model.readout": "hybrid", "model.line_parts": "whole"})
    flat = torch.ones(3, 1, 32, 16)
    tables = {"static_mean": torch.zeros_like(flat) + 0j, "static_sd": flat, "dynamic_sd": flat}
    tokens = LineTokenizer(config.data, config.model, tables, CPU)(
        replace(batch, kspace=kspace), batch.sampled, batch.sampled
    )
    size = torch.view_as_complex(tokens.values.unflatten(-1, (16, 2))).abs()
    expected = torch.zeros(16)
    expected[5] = 1.0  # all of the unit energy that gain leaves the band
    torch.testing.assert_close(size, expected.expand_as(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("readout", ["kspace", "hybrid"])
def test_training_lines_have_about_unit_variance(small: RunConfig, reader: Reader, batch: Batch, readout: str) -> None:
    everything = torch.ones_like(batch.sampled)
    config = override(small, {"model.readout": readout})
    tokenizer = LineTokenizer(config.data, config.model, statistics.fit(config, reader).tensors(), CPU)
    values = tokenizer(batch, known=everything, chosen=everything).values.unflatten(-1, (2, -1, 2))
    power = values.square().sum(-1).mean((0, 2))
    assert ((power > 0.3) & (power < 3)).all()


def test_lines_that_are_normalised_one_by_one_have_unit_rms_and_keep_its_logarithm(
    small: RunConfig, tables: Tables, batch: Batch
) -> None:
    config = override(small, {"model.normalisation": "line", "model.line_parts": "whole"})
    tokenizer = LineTokenizer(config.data, config.model, tables, CPU)
    chosen = batch.sampled

    def numbers(kspace: Tensor) -> Tensor:
        tokens = tokenizer(replace(batch, kspace=kspace), chosen, chosen)
        return torch.view_as_complex(tokens.values.unflatten(1, (-1, 2)))

    values = numbers(batch.kspace)
    assert values.shape[1] == 17  # half of kx, and the logarithm
    torch.testing.assert_close(values[:, :16].abs().square().mean(1), torch.ones(len(values)))
    outer = torch.arange(32)[:, None] == 3
    others = numbers(torch.where(outer, 10 * batch.kspace, batch.kspace))
    ours = gather(chosen).index[:, 2] == 3
    assert ours.any()
    torch.testing.assert_close(others[:, :16], values[:, :16])
    torch.testing.assert_close(others[:, 16].real - values[:, 16].real, ours.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("parts", ["static+dynamic", "whole"])
def test_raw_lines_differ_from_the_source_by_one_factor(
    small: RunConfig, tables: Tables, batch: Batch, parts: str
) -> None:
    config = override(small, {"model.normalisation": "none", "model.remove": "none", "model.line_parts": parts})
    tokenizer = LineTokenizer(config.data, config.model, tables, CPU)
    every = torch.ones_like(batch.sampled)
    lines = batch.kspace[:, :, 0, :, :, 8:24].flatten(0, 3)
    values = torch.view_as_complex(tokenizer(batch, every, every).values.unflatten(1, (-1, 16, 2))).sum(1)
    factor = (values / lines).real.median()
    torch.testing.assert_close(values, lines * factor, rtol=1e-4, atol=1e-5)
    config = override(config, {"model.remove": "phase+gain"})
    values = LineTokenizer(config.data, config.model, tables, CPU)(batch, every, every).values
    assert values.square().sum(1).mean() / (16 * (2 if parts == "static+dynamic" else 1)) == pytest.approx(1, abs=0.3)


@pytest.fixture
def array(small: RunConfig, batch: Batch) -> tuple[RunConfig, Batch]:
    """The batch as four unlike coils with noise would have seen it, and a configuration of two virtual ones."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(8, 3, 4, 1, 1, 1, dtype=torch.complex64, generator=generator)
    kspace = batch.kspace * weights
    kspace = kspace + 0.2 * kspace.abs().mean() * torch.randn(kspace.shape, dtype=torch.complex64, generator=generator)
    extent = batch.extent.clone()
    extent[..., 0] = 4
    return override(small, {"data.coils": 4, "model.coils": 2}), replace(batch, kspace=kspace, extent=extent)


def flat(config: RunConfig) -> Tables:
    """Statistics of a population without structure."""
    ny, nx = config.data.matrix
    sd = torch.ones(config.data.slices, config.model.coils or config.data.coils, ny, nx)
    return {"static_mean": torch.zeros_like(sd) + 0j, "static_sd": sd, "dynamic_sd": sd}


@pytest.mark.parametrize("readout", ["kspace", "hybrid"])
def test_tokens_of_virtual_coils_do_not_depend_on_how_coils_are_mixed_or_on_what_is_hidden(
    array: tuple[RunConfig, Batch], readout: str
) -> None:
    config = override(array[0], {"model.readout": readout})
    tokenizer, batch = LineTokenizer(config.data, config.model, flat(config), CPU), array[1]
    visible = batch.sampled & ~hidden_lines(config, batch)[0]

    def lines(kspace: Tensor) -> Tokens:
        return tokenizer(replace(batch, kspace=kspace), visible, visible)

    tokens = lines(batch.kspace)
    assert tokens.blank is None
    assert tokens.values.shape[1] == LineTokenizer.features(config.data, config.model) == 2 * 2 * 16 * 2
    unitary, _ = torch.linalg.qr(torch.randn(8, 3, 4, 4, dtype=torch.complex64))
    torch.testing.assert_close(lines(mix(batch.kspace, unitary)).values, tokens.values, rtol=1e-2, atol=1e-3)
    spoilt = torch.where(visible[:, :, None, :, :, None], batch.kspace, 1e3j)
    assert torch.equal(lines(spoilt).values, tokens.values)


@pytest.mark.parametrize("coils", [2, 4])
def test_filling_leads_from_virtual_coils_back(array: tuple[RunConfig, Batch], coils: int) -> None:
    config = override(array[0], {"model.coils": coils, "model.readout_fraction": 1.0})
    tokenizer, batch = LineTokenizer(config.data, config.model, flat(config), CPU), array[1]
    true = tokenizer(batch, known=batch.sampled, chosen=~batch.sampled)
    filled = tokenizer.fill(batch.kspace, batch.sampled, true.values, true)
    acquired = batch.sampled[:, :, None, :, :, None].expand_as(filled)
    assert torch.equal(filled[acquired], batch.kspace[acquired])
    projected = mix(compress(batch.kspace, batch.sampled, coils), compression(batch.kspace, batch.sampled, coils).mH)
    torch.testing.assert_close(filled[~acquired], projected[~acquired], rtol=1e-3, atol=1e-3)
    if coils == 4:  # all of them: nothing is lost
        torch.testing.assert_close(filled, batch.kspace, rtol=1e-3, atol=1e-3)


def by_place(tokens: Tokens) -> dict[tuple[int, ...], Tensor]:
    """Values by (subject, slice, t, ky)."""
    places = torch.cat([tokens.lengths.subject[:, None], tokens.index], 1).tolist()
    return dict(zip(map(tuple, places), tokens.values, strict=True))


def test_slices_may_be_permuted(small: RunConfig, tables: Tables, batch: Batch) -> None:
    order = torch.tensor([2, 0, 1])
    turned = {name: table[order] if table.ndim else table for name, table in tables.items()}
    sampled = batch.sampled
    plain = LineTokenizer(small.data, small.model, tables, CPU)(batch, sampled, sampled)
    moved = replace(batch, kspace=batch.kspace[:, order], sampled=sampled[:, order])
    other = LineTokenizer(small.data, small.model, turned, CPU)(moved, moved.sampled, moved.sampled)
    ours = by_place(plain)
    theirs = {(subject, int(order[z]), *place): value for (subject, z, *place), value in by_place(other).items()}
    assert ours.keys() == theirs.keys()
    assert len(ours) == int(sampled.sum())
    for place, value in ours.items():
        torch.testing.assert_close(theirs[place], value, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- patches


def test_patches_make_up_the_image(small: RunConfig, tables: Tables, batch: Batch) -> None:
    tokenizer = PatchTokenizer(small.data, small.model, tables, CPU)
    images = tokenizer.images(batch)
    assert abs(float(images.square().mean()) - 1) < 0.5
    tokens = tokenizer(batch, images, torch.ones_like(hidden_patches(small, batch)))
    back = torch.zeros_like(images)
    pt, py, px = small.model.patch
    for values, row, (z, t, y, x) in zip(
        tokens.values, tokens.lengths.subject.tolist(), tokens.index.tolist(), strict=True
    ):
        place = back[row, z, t * pt : (t + 1) * pt, y * py : (y + 1) * py, x * px : (x + 1) * px]
        place += values.reshape(pt, py, px)
    assert torch.equal(back, images)


def test_zero_filled_patches_are_those_of_the_image_where_all_lines_are_seen(
    small: RunConfig, tables: Tables, batch: Batch
) -> None:
    tokenizer = PatchTokenizer(small.data, small.model, tables, CPU)
    whole = tokenizer(batch, tokenizer.images(batch), tokenizer.present(batch))
    assert equal(tokenizer.zerofilled(batch, torch.ones_like(batch.sampled)), whole)
    seen = tokenizer.zerofilled(batch, batch.sampled)
    kept = replace(batch, kspace=batch.kspace * batch.sampled[:, :, None, :, :, None])
    assert equal(seen, tokenizer(kept, tokenizer.images(kept), tokenizer.present(kept)))
    assert torch.equal(seen.index, whole.index)
    assert not torch.equal(seen.values, whole.values)


# ------------------------------------------------------------------------------------------------------------- encoder


def test_every_position_has_its_own_code(small: RunConfig) -> None:
    for grid in (Grid.lines(small.data), Grid.patches(small.data, small.model)):
        sizes = (len(grid.views), len(grid.frames), *map(len, grid.places))
        index = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), -1).flatten(0, -2)
        code = Position(grid, small.model.width)(index).detach()
        distance = torch.cdist(code, code).fill_diagonal_(torch.inf)
        assert distance.min() > 1e-2


def test_both_domains_share_the_axes_of_slice_and_time(small: RunConfig) -> None:
    lines, patches = Grid.lines(small.data), Grid.patches(small.data, small.model)
    assert lines.views == patches.views == (0, 0, 3)
    assert lines.frames == (0, 1, 2, 3)
    assert patches.frames == (0.5, 2.5)  # centres of two frames each
    assert lines.places[0][16] == 0
    assert sum(patches.places[0]) == 0


def test_the_embedding_tells_what_stays_from_what_moves() -> None:
    t = (torch.arange(8) + 0.5) / 8 * 2 * torch.pi
    frames = (3 + 2 * t.cos() - 0.5 * t.sin() + 0.7 * (3 * t).cos())[None, None, :, None]
    absent = torch.zeros(1, 1, 8, dtype=torch.bool)
    static, dynamic = static_dynamic(frames, absent)
    torch.testing.assert_close(static, torch.tensor([[[3.0]]]))
    torch.testing.assert_close(dynamic, torch.tensor([[[2.0, -0.5]]]))
    still = static_dynamic(torch.full_like(frames, 5.0), absent)
    assert torch.equal(still[1], torch.zeros(1, 1, 2))
    assert not torch.cat(static_dynamic(frames, ~absent), -1).any()  # a slice that is not there
