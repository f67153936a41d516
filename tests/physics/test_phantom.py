"""The simulated cohort: exact labels, a heart that keeps its muscle, k-space that keeps its energy, pure functions."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from kmtr.physics.coils import phase_map
from kmtr.physics.fourier import fft2c, ifft2c
from kmtr.physics.noise import Purpose, add_noise, generator
from kmtr.physics.phantom import _paint, anatomy, contraction, distances, heart, labels, segment, simulate
from kmtr.types import DISEASES, PHENOTYPES, VIEWS, InputError, Study

LV, MYOCARDIUM, RV, LA, RA = 1, 2, 3, 4, 5
TINY = {"seed": 0, "views": VIEWS, "sax_slices": 4, "frames": 8, "matrix": (64, 64), "snr_db": 30.0}


def volumes_ml(index: int, phase: float) -> dict[int, float]:
    """Class -> volume by counting points of a 1 mm grid through the same implicit geometry."""
    shape = heart(anatomy(index, seed=0), np.array([phase]))
    axes = [np.arange(a, b, dtype=np.float32) + np.float32(0.5) for a, b in ((-70, 110), (-90, 90), (-3, 185))]
    counts = np.zeros(6)
    for w in np.array_split(axes[2], 8):
        classes = segment(distances(shape, *np.meshgrid(axes[0], axes[1], w, indexing="ij")))
        counts += np.bincount(classes.ravel(), minlength=6)
    return dict(enumerate(counts / 1000))


def same(a: Study, b: Study) -> bool:
    return (a.subject_id, a.labels) == (b.subject_id, b.labels) and all(
        a.views[v].kspace.tobytes() == b.views[v].kspace.tobytes()
        and a.views[v].segmentation.tobytes() == b.views[v].segmentation.tobytes()
        for v in a.views
    )


def test_a_subject_is_a_pure_function_of_seed_and_index() -> None:
    study = simulate(7, **TINY)
    assert study.subject_id == "sim-0-0000007"
    simulate(8, **TINY)
    assert same(study, simulate(7, **TINY))
    assert not same(study, simulate(8, **TINY))
    assert not same(study, simulate(7, **TINY | {"seed": 1}))


def test_a_view_does_not_depend_on_which_others_are_asked_for() -> None:
    every, one = simulate(3, **TINY), simulate(3, **TINY | {"views": ("lax_4ch",)})
    assert tuple(every.views) == VIEWS
    np.testing.assert_array_equal(one.views["lax_4ch"].kspace, every.views["lax_4ch"].kspace)


def test_random_streams_differ_in_every_part_of_their_key() -> None:
    keys = [(0, 0, p, s) for p in Purpose for s in (0, 1)] + [
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (2**32, 0, 0, 0),
        (0, 2**32, 0, 0),
    ]
    assert len({generator(a, b, Purpose(p), s).random() for a, b, p, s in keys}) == len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 3])
def test_labels_are_the_volumes_of_the_geometry(index: int) -> None:
    who = anatomy(index, seed=0)
    for phase, expected in (
        (0.0, (who.lvedv_ml, who.rvedv_ml, who.lav_min_ml, who.rav_min_ml)),
        (who.es_phase, (who.lvesv_ml, who.rvesv_ml, who.lav_max_ml, who.rav_max_ml)),
    ):
        counted = volumes_ml(index, phase)
        for name, want in zip((LV, RV, LA, RA), expected, strict=True):
            assert counted[name] == pytest.approx(want, rel=0.01)
        assert counted[MYOCARDIUM] * 1.05 == pytest.approx(who.lvm_g, rel=0.01)


def test_labels_hold_together() -> None:
    for index in range(50):
        y = labels(anatomy(index, seed=0))
        assert set(y) == {*PHENOTYPES, "dcm", "hcm", "rv_disease"}
        assert set(y) - set(PHENOTYPES) <= set(DISEASES)
        for chamber, full, empty in (
            ("lv", "edv", "esv"),
            ("rv", "edv", "esv"),
            ("la", "v_max", "v_min"),
            ("ra", "v_max", "v_min"),
        ):
            stroke = y[f"{chamber}{full}_ml"] - y[f"{chamber}{empty}_ml"]
            assert y[f"{chamber}sv_ml"] == pytest.approx(stroke)
            assert y[f"{chamber}ef_pct"] == pytest.approx(100 * stroke / y[f"{chamber}{full}_ml"])


def test_the_cycle_begins_full_and_is_emptiest_at_end_systole() -> None:
    who = anatomy(2, seed=0)
    phase = np.linspace(0, 1, 1001)
    s = contraction(who, phase)
    assert s[0] == 0
    assert s[-1] == pytest.approx(0)
    assert s.min() >= 0
    assert s.max() == pytest.approx(1)
    assert 0.30 <= phase[s > 1 - 1e-9][0] <= 0.45
    assert (np.diff(s[phase < who.es_phase]) > 0).all()
    assert (np.diff(s[phase > who.filling_phase]) <= 1e-12).all()


@pytest.mark.slow
def test_the_muscle_keeps_its_volume_so_the_wall_thickens_while_the_base_descends() -> None:
    who = anatomy(1, seed=0)
    shape = heart(who, np.linspace(0, 1, 9)[:-1])
    muscle = [volumes_ml(1, phase)[MYOCARDIUM] for phase in (0.0, 0.15, 0.4, 0.6)]
    assert max(muscle) / min(muscle) < 1.01
    wall = shape.epi_radius - shape.endo_radius
    assert wall.max() > 1.25 * wall[0]
    assert 8 < shape.base[0] - shape.base.min() < 20
    assert wall.argmax() == shape.base.argmin() == shape.la_radius.argmax() == 3


def test_every_heart_of_a_large_population_can_be_built() -> None:
    """No NaN, the cavity inside the epicardium, the muscle between 3 and 30 mm, the RV outside of the LV."""
    for index in range(400):
        shape = heart(anatomy(index, seed=5), np.linspace(0, 1, 12))
        wall = shape.epi_radius - shape.endo_radius
        assert (wall > 2.5).all()
        assert (wall < 30).all()
        assert (np.abs(shape.endo_u) < wall).all()
        assert (shape.endo_radius > 5).all()
        assert (shape.rv_width > 0.1).all()
        assert (shape.rv_width < 4).all()


def test_population() -> None:
    people = [anatomy(index, seed=0) for index in range(1000)]
    for group in (people[:200], people):  # the small one as an early warning, with its own error of the mean
        slack = 3 / math.sqrt(len(group))
        edv = np.array([p.lvedv_ml for p in group])
        assert abs(edv.mean() - 145) < 3 + 35 * slack
        assert abs(edv.std() - 35) < 3 + 35 * slack
        ef = np.array([100 * (1 - p.lvesv_ml / p.lvedv_ml) for p in group if not (p.dcm or p.hcm)])
        assert abs(ef.mean() - 59.5) < 1 + 6 * slack
        assert abs(ef.std() - 5.5) < 1 + 6 * slack
        for male, mean, spread in ((False, 42, 7), (True, 53, 9)):
            mass = np.array([p.lvm_g / p.bsa_m2 for p in group if p.male == male and not (p.dcm or p.hcm)])
            assert abs(mass.mean() - mean) < 2 + 1.5 * spread * slack
            assert abs(mass.std() - spread) < 2 + 1.5 * spread * slack
    assert 0.45 < np.mean([p.male for p in people]) < 0.55
    for disease in ("dcm", "hcm", "rv_disease"):
        assert 0.04 < np.mean([getattr(p, disease) for p in people]) < 0.11
    assert min(1 - p.lvesv_ml / p.lvedv_ml for p in people) < 0.25
    table = np.array(
        [[p.bsa_m2, p.lvedv_ml, p.rvedv_ml, p.lvm_g] for p in people if not (p.dcm or p.hcm or p.rv_disease)]
    )
    assert (np.corrcoef(table.T) > 0.5).all()


@pytest.mark.parametrize("index", [0, 5, 9])
def test_every_view_shows_what_it_should(index: int) -> None:
    study = simulate(index, **TINY)
    for view, expected in (
        ("sax", {LV, MYOCARDIUM, RV}),
        ("lax_2ch", {LV, MYOCARDIUM, LA}),
        ("lax_3ch", {LV, MYOCARDIUM, RV, LA}),
        ("lax_4ch", {LV, MYOCARDIUM, RV, LA, RA}),
    ):
        classes = study.views[view].segmentation
        for frame in range(8):
            assert expected <= set(np.unique(classes[:, frame]).tolist())
        if view == "lax_2ch":
            assert not {RV, RA} & set(np.unique(classes).tolist())


def test_spacing_is_true_so_that_stacked_slices_give_the_volume() -> None:
    study = simulate(4, **TINY | {"sax_slices": 12, "matrix": (128, 128), "views": ("sax",)})
    sax = study.views["sax"]
    volume = (sax.segmentation[:, 0] == LV).sum() * math.prod(sax.spacing_mm) / 1000
    assert volume == pytest.approx(study.labels["lvedv_ml"], rel=0.03)
    assert sax.frame_time_s * 8 * study.labels["lvco_l_min"] * 1000 / 60 == pytest.approx(study.labels["lvsv_ml"])


def test_edges_are_soft_so_that_motion_below_a_pixel_shows() -> None:
    """The sum over a disc's pixels follows its area while the radius grows by hundredths of a pixel."""
    pixel, radius = 3.75, np.arange(20, 24, 0.05, dtype=np.float32)
    y, x = np.meshgrid(*[(np.arange(32, dtype=np.float32) - 15.6) * pixel] * 2, indexing="ij")
    image = np.full((radius.size, 32, 32), 0.25, np.float32)
    _paint(image, 1.0, np.hypot(y, x) - radius[:, None, None], pixel)
    area = ((image - 0.25) / 0.75).sum((1, 2)) * pixel**2
    np.testing.assert_allclose(area, np.pi * radius**2, rtol=0.01)
    assert (np.diff(area) > 0).all()


@pytest.mark.parametrize("matrix", [(64, 64), (48, 80), (65, 64)])
def test_kspace_keeps_the_energy_of_the_image(matrix: tuple[int, int]) -> None:
    study = simulate(0, **TINY | {"matrix": matrix, "snr_db": math.inf})
    for view in study.views.values():
        image = ifft2c(view.kspace)
        assert view.kspace.shape[-2:] == matrix
        assert (np.abs(image) ** 2).sum() == pytest.approx((np.abs(view.kspace) ** 2).sum(), rel=1e-4)
        np.testing.assert_allclose(fft2c(image), view.kspace, atol=1e-4 * np.abs(view.kspace).max())


@pytest.mark.parametrize("snr_db", [0.0, 20.0, 30.0])
def test_noise_has_the_snr_asked_for(snr_db: float) -> None:
    noisy, clean = (simulate(0, **TINY | {"snr_db": value}) for value in (snr_db, math.inf))
    for view in VIEWS:
        signal = clean.views[view].kspace
        noise = noisy.views[view].kspace - signal
        measured = 10 * math.log10((np.abs(signal) ** 2).sum() / (np.abs(noise) ** 2).sum())
        assert measured == pytest.approx(snr_db, abs=0.3)
        assert abs(noise.mean()) < 5 * noise.std() / math.sqrt(noise.size)
        assert noise.real.std() == pytest.approx(noise.imag.std(), rel=0.03)


def test_noise_differs_between_slices_and_not_between_calls() -> None:
    k = np.ones((1, 2, 16, 16), np.complex64)
    one, again, other = (add_noise(k, 10.0, seed=0, subject=0, slice_index=n) for n in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_phase_is_smooth_and_spans_up_to_a_full_turn() -> None:
    maps = [phase_map((64, 64), seed=0, subject=n, slice_index=0) for n in range(100)]
    spans = [float(np.ptp(m)) for m in maps]
    assert max(spans) > 0.9 * 2 * math.pi
    assert max(spans) <= 2 * math.pi + 1e-5
    assert min(spans) < 0.2 * 2 * math.pi
    for m, span in zip(maps, spans, strict=True):
        assert np.abs(np.diff(m, axis=0)).max() < 0.2 * span + 1e-5
    fine = phase_map((128, 128), seed=0, subject=0, slice_index=0)
    np.testing.assert_allclose(fine[::2, ::2], maps[0], atol=0.2)


def test_phase_belongs_to_the_slice_and_not_to_the_frame() -> None:
    study = simulate(0, **TINY | {"snr_db": math.inf})
    image = ifft2c(study.views["sax"].kspace)[:, 0]
    bright = np.abs(image) > 0.1
    turned = np.angle(image * np.conj(image[:, :1]))
    assert np.abs(turned[bright & bright[:, :1]]).max() < 1e-3
    for a, b in pairwise(image[:, 0]):
        both = (np.abs(a) > 0.1) & (np.abs(b) > 0.1)
        assert np.abs(np.angle(a * np.conj(b)))[both].max() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": ("sax", "sax")}, "views: expected"),
        ({"views": ("top",)}, "views: expected"),
        ({"views": ()}, "views: expected .* got none"),
        ({"sax_slices": 0}, "sax_slices: expected"),
        ({"frames": 1}, "frames: expected"),
        ({"matrix": (8, 64)}, "matrix: expected"),
        ({"snr_db": math.nan}, "snr_db: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        simulate(0, **TINY | change)
    assert "\n" not in str(error.value)
