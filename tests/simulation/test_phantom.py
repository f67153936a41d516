"""The simulated cohort: pure functions, views that show what they should, contrast, levels of difficulty."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kmtr.physics.fourier import fft2c, ifft2c
from kmtr.physics.noise import Purpose, generator
from kmtr.simulation.appearance import FLIP_DEG, LEVELS, TISSUES, balanced_ssfp, level, look, paint
from kmtr.simulation.phantom import simulate
from kmtr.simulation.population import anatomy
from kmtr.types import VIEWS, InputError, Study

LV, MYOCARDIUM, RV, LA, RA = 1, 2, 3, 4, 5
TINY = {
    "seed": 0,
    "views": VIEWS,
    "sax_slices": 2,
    "frames": 8,
    "matrix": (64, 64),
    "snr_db": 30.0,
    "difficulty": "easy",
}


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


@pytest.mark.parametrize("index", [1, 5])
def test_the_short_axis_goes_from_apex_to_base(index: int) -> None:
    """Unlike that of readers: at end-diastole the heart is the larger, the nearer a slice is to the base."""
    sax = simulate(index, **TINY | {"views": ("sax",), "sax_slices": 3, "frames": 2}).views["sax"]
    areas = np.isin(sax.segmentation[:, 0], (LV, MYOCARDIUM, RV)).sum((1, 2))
    assert areas[0] < areas[1]
    assert areas[0] < areas[2]
    cavities = (sax.segmentation[:, 0] == LV).sum((1, 2))
    assert cavities[0] < cavities[1] < 1.3 * cavities[2]


def test_spacing_is_true_so_that_stacked_slices_give_the_volume() -> None:
    study = simulate(4, **TINY | {"sax_slices": 12, "matrix": (128, 128), "views": ("sax",)})
    sax = study.views["sax"]
    volume = (sax.segmentation[:, 0] == LV).sum() * math.prod(sax.spacing_mm) / 1000
    assert volume == pytest.approx(study.labels["lvedv_ml"], rel=0.03)
    assert sax.frame_time_s * 8 * study.labels["lvco_l_min"] * 1000 / 60 == pytest.approx(study.labels["lvsv_ml"])


def test_ejection_fraction_from_the_masks() -> None:
    """Simpson's rule on six gapped slices, of what is drawn: within 3 points on average, at any level."""
    errors = []
    for index, difficulty in enumerate(("easy", "medium", "hard", "easy", "medium", "hard")):
        case = {"views": ("sax",), "sax_slices": 6, "frames": 25, "difficulty": difficulty}
        study = simulate(index, **TINY | case)
        area = (study.views["sax"].segmentation == LV).sum((0, 2, 3))
        errors.append(100 * (1 - area.min() / area[0]) - study.labels["lvef_pct"])
    assert np.abs(errors).mean() < 3
    assert np.abs(errors).max() < 6


def test_labels_and_masks_are_of_the_same_moment() -> None:
    """The LV is largest in the first frame, smallest at end-systole; the left atrium the other way round."""
    study = simulate(2, **TINY | {"views": ("lax_4ch",), "frames": 25})
    classes = study.views["lax_4ch"].segmentation[0]
    lv, la = ((classes == value).sum((1, 2)) for value in (LV, LA))
    systole = round(anatomy(2, seed=0).es_phase * 25)
    assert lv[0] > 0.97 * lv.max()
    assert lv[systole - 1 : systole + 2].min() == lv.min()
    assert la.argmax() in range(systole - 1, systole + 4)
    assert la[0] < 1.05 * la.min()


def test_contrast_is_that_of_a_cine() -> None:
    """Mean intensity by class: blood is bright, muscle dark; the lung darker still, the fat of the chest bright."""
    for index in range(3):
        study = simulate(index, **TINY | {"views": ("sax",), "snr_db": math.inf})
        image = np.abs(ifft2c(study.views["sax"].kspace))[:, 0]
        classes = study.views["sax"].segmentation
        blood, muscle = (image[classes == value].mean() for value in (LV, MYOCARDIUM))
        assert 1.5 < blood / muscle < 4
        assert np.quantile(image, 0.2) < 0.5 * muscle  # lungs and air
        assert image[classes == 0].max() > 0.7 * blood


def test_steady_state_signal() -> None:
    """Limits of the formula: at 90 degrees 1 / (1 + T1 / T2) for short repetition; nothing without excitation."""
    for t1, t2 in ((1000.0, 50.0), (1550.0, 240.0)):
        assert balanced_ssfp(t1, t2, 1.0, 90.0, 1e-3) == pytest.approx(1 / (1 + t1 / t2), rel=1e-3)
        assert balanced_ssfp(t1, t2, 1.0, 0.0) == 0
    blood, muscle, fat, lung = (balanced_ssfp(*TISSUES[t], FLIP_DEG) for t in ("blood", "myocardium", "fat", "lung"))
    assert 2 < blood / muscle < 4
    assert fat > 0.8 * blood
    assert lung < 0.4 * muscle


def test_difficulty_changes_the_appearance_and_not_the_labels() -> None:
    studies = {name: simulate(5, **TINY | {"difficulty": name, "views": ("sax",)}) for name in LEVELS}
    easy = studies.pop("easy")
    for study in studies.values():
        assert study.labels == easy.labels
        assert study.views["sax"].spacing_mm == easy.views["sax"].spacing_mm
        assert not np.array_equal(study.views["sax"].kspace, easy.views["sax"].kspace)


def test_nuisance_grows_with_difficulty() -> None:
    spread = {}
    for name in LEVELS:
        places = []
        for index in range(16):
            case = {"views": ("lax_4ch",), "frames": 2, "matrix": (32, 32), "difficulty": name}
            lv = simulate(index, **TINY | case).views["lax_4ch"].segmentation[0, 0] == LV
            places.append([axis.mean() for axis in np.nonzero(lv)])
        spread[name] = float(np.std(places, 0).mean())
    assert spread["easy"] < spread["medium"] < spread["hard"]


def test_appearance_does_not_give_the_labels_away() -> None:
    """What is drawn beside the anatomy knows nothing of it."""
    people = [anatomy(index, seed=0) for index in range(300)]
    known = np.array([[p.lvedv_ml, 1 - p.lvesv_ml / p.lvedv_ml, p.lvm_g, p.lav_max_ml] for p in people]).T
    drawn = [look(level("hard"), seed=0, subject=index) for index in range(300)]
    looks = np.array([[d.signal["blood"], d.signal["fat"], d.inflow, *d.gain[0]] for d in drawn]).T
    assert np.abs(np.corrcoef(known, looks)[:4, 4:]).max() < 0.2


def test_coils_and_oversampling() -> None:
    case = TINY | {"views": ("sax",), "snr_db": math.inf}
    one, many = simulate(1, **case), simulate(1, **case | {"coils": 4, "oversampling": 2.0})
    assert many.views["sax"].kspace.shape == (2, 4, 8, 64, 128)
    assert many.views["sax"].segmentation.shape == (2, 8, 64, 128)
    combined = np.sqrt((np.abs(ifft2c(many.views["sax"].kspace)) ** 2).sum(1))[..., 32:96]
    alone = np.abs(ifft2c(one.views["sax"].kspace))[:, 0]
    np.testing.assert_allclose(combined, alone, atol=1e-3 * alone.max())
    np.testing.assert_array_equal(many.views["sax"].segmentation[..., 32:96], one.views["sax"].segmentation)


def test_edges_are_soft_so_that_motion_below_a_pixel_shows() -> None:
    """The sum over a disc's pixels follows its area while the radius grows by hundredths of a pixel."""
    pixel, radius = 3.75, np.arange(20, 24, 0.05, dtype=np.float32)
    y, x = np.meshgrid(*[(np.arange(32, dtype=np.float32) - 15.6) * pixel] * 2, indexing="ij")
    image = np.full((radius.size, 32, 32), 0.25, np.float32)
    paint(image, 1.0, np.hypot(y, x) - radius[:, None, None], pixel)
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
        ({"difficulty": "cruel"}, "difficulty: expected one of easy, medium, hard, got 'cruel'"),
        ({"coils": 0}, "coils: expected"),
        ({"oversampling": 9.0}, "oversampling: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        simulate(0, **TINY | change)
    assert "\n" not in str(error.value)
