"""What can't work dies in the configuration, on one line with the key; names of runs follow what changes numbers."""

from __future__ import annotations

import pytest

from kmtr.config import RunConfig, Workers, flatten, from_json, keys, override, parse, to_json
from kmtr.config.recipes import RECIPES, tiny
from kmtr.types import InputError

DIGEST = "0" * 64


def refusal(**changes: object) -> str:
    with pytest.raises(InputError) as error:
        override(tiny(), {key.replace("__", "."): value for key, value in changes.items()})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_valid_and_says_its_command(recipe: str) -> None:
    assert RECIPES[recipe]().recipe == recipe
    assert f"python jobs/pretrain.py {recipe}" in (RECIPES[recipe].__doc__ or "")


def test_every_key_says_what_it_means() -> None:
    assert not [key for key, info in keys(RunConfig) if not info.description]


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("masked.mask_ration", "masked.mask_ratio"),
        ("model.widht", "model.width"),
        ("workers", "train.workers"),
    ],
)
def test_an_unknown_key_names_the_nearest(typed: str, nearest: str) -> None:
    with pytest.raises(InputError, match="unknown key") as error:
        override(tiny(), {typed: "1"})
    assert repr(typed) in str(error.value)
    assert repr(nearest) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.workers", "two"),
        ("train.workers", "1.5"),
        ("train.workers", "0"),
        ("train.workers", "4..2"),
        ("train.workers", "0..2"),
        ("train.workers", "2..3..4"),
        ("train.workers", "..4"),
        ("train.bf16", "perhaps"),
        ("masked.mask_ratio", "1.0"),
        ("masked.kspace_loss", "l2"),
        ("train.zero_stage", "4"),
        ("data.matrix", "64"),
        ("data.matrix", "64,64,64"),
        ("data.matrix", "64,sixty"),
        ("data.views", "sax,lax_5ch"),
        ("sampling.accelerations", "4,x"),
        ("data.sax_slices", "-1"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_came(key: str, value: str) -> None:
    line = refusal(**{key: value})
    assert line.startswith(f"{key}: ")
    assert value in line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.views": "sax,sax"}, "data.views: expected one or more different views, got sax,sax"),
        ({"data.views": ""}, "data.views: expected one or more different views, got none"),
        ({"data.matrix": "63,64"}, "data.matrix: expected even sizes from 8 to 16384, got (63, 64)"),
        ({"data.matrix": "64,6"}, "data.matrix: expected even sizes from 8 to 16384, got (64, 6)"),
        ({"sampling.accelerations": ""}, "expected one or more integers from 1"),
        ({"sampling.accelerations": "0,4"}, "expected one or more integers from 1"),
        ({"model.width": "100"}, "model.width: expected a multiple of model.head_width=32"),
        ({"model.decoder_width": "100"}, "model.decoder_width: expected a multiple of model.head_width=32"),
        ({"data.global_batch": "33"}, "data.global_batch: expected a multiple of train.workers * train.accumulation"),
        ({"train.accumulation": "3"}, "2 * 3, got 32"),
        ({"sampling.accelerations": "32"}, "sampling.accelerations: R = 32 leaves 2 of 64 lines"),
        ({"evaluate.accelerations": "32"}, "evaluate.accelerations: R = 32 leaves 2 of 64 lines"),
        ({"model.coils": "2"}, "model.coils: expected at most data.coils=1, got 2"),
        ({"model.patch": "3,16,16"}, "model.patch: expected a divisor"),
        ({"model.patch": "2,16,24"}, "model.patch: expected a divisor"),
        ({"train.eval_every": "15"}, "train.eval_every: expected a multiple of train.log_every=10, got 15"),
        ({"masked.steps": "0", "align.steps": "0"}, "expected at least one step"),
        ({"stage": "align", "align.steps": "0"}, "expected at least one step"),
        ({"align.steps": "40"}, "align.steps: expected more than align.head_steps=40, in which the encoder does not"),
        ({"data.global_batch": "4"}, "alignment needs at least 8 distinct subjects"),
    ],
)
def test_each_impossible_combination_is_refused(changes: dict[str, str], said: str) -> None:
    assert said in refusal(**changes)


def test_what_only_alignment_forbids_is_allowed_without_it() -> None:
    assert override(tiny(), {"data.global_batch": "4", "stage": "masked"}).total_steps == tiny().masked.steps
    assert override(tiny(), {"stage": "align"}).total_steps == tiny().align.steps
    assert override(tiny(), {"sampling.accelerations": "1"}).sampling.accelerations == (1,)


@pytest.mark.parametrize("text", ["4,8", "(4, 8)", "[4,8]", " 4 , 8 ", "4,8,"])
def test_tuples_are_read_as_people_type_them(text: str) -> None:
    assert override(tiny(), {"sampling.accelerations": text}).sampling.accelerations == (4, 8)
    views = override(tiny(), {"data.views": "['sax', \"lax_2ch\"]"}).data.views
    assert views == ("sax", "lax_2ch")


def test_a_command_line_becomes_a_configuration() -> None:
    config = parse(["train.workers=1", "storage.root=/a=b"], "tiny", RECIPES)
    assert (config.train.workers, config.storage.root) == (Workers(1, 1), "/a=b")
    for words, said in (
        (["train.workers"], "expected key=value, got 'train.workers'"),
        (["seed=1", "seed=2"], "seed: given twice"),
    ):
        with pytest.raises(InputError, match=said):
            parse(words, "tiny", RECIPES)
    with pytest.raises(InputError, match="recipe: expected one of tiny, base, large, got 'tinny'"):
        parse([], "tinny", RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_and_flat_keys_give_the_same_configuration_back(recipe: str) -> None:
    config = override(RECIPES[recipe](), {"ingest.matrix": "64,64", "optimizer.betas": "0.8,0.99"})
    assert from_json(to_json(config)) == config
    flat = flatten(config)
    assert list(flat) == [key for key, _ in keys(RunConfig)]
    assert override(RunConfig(), flat) == config


def test_json_that_is_no_configuration_is_one_line() -> None:
    for text in ("{", '{"data": {"matrix": [63, 64]}}', '{"data": {"bogus": 1}}'):
        with pytest.raises(InputError) as error:
            from_json(text)
        assert "\n" not in str(error.value)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny().data.frames = 3  # type: ignore[misc]


def test_a_range_of_workers_uses_the_divisors_of_the_batch_and_no_larger_micro_batch() -> None:
    config = override(tiny(), {"train.workers": "2..8", "data.global_batch": 24, "train.accumulation": 1})
    assert config.train.workers.sizes(24) == (2, 3, 4, 6, 8)
    assert config.train.workers.sizes(28) == (2, 4, 7)
    for workers in (1, 2, 3, 4, 6, 8, 12, 24):
        micro = config.accumulation(workers)
        assert 24 % (workers * micro) == 0
        assert 24 // (workers * micro) <= 3, "no micro-batch may be larger than at eight workers"
    assert [config.accumulation(n) for n in (8, 4, 2)] == [1, 2, 4]
    assert override(config, {"train.accumulation": 3}).accumulation(4) == 6
    assert from_json(to_json(config)) == config
    assert flatten(config)["train.workers"] == Workers(2, 8)
    assert str(Workers(2, 8)) == "2..8"
    assert str(Workers(3, 3)) == "3"
    with pytest.raises(InputError, match=r"multiple of train\.workers \* train\.accumulation = 5\.\.7 \* 1, got 32"):
        override(tiny(), {"train.workers": "5..7"})


@pytest.mark.parametrize(
    "changes",
    [
        {"train.workers": 1},
        {"train.workers": "1..4"},
        {"train.on_nonfinite": "skip"},
        {"train.deterministic": True},
        {"train.accumulation": 2},
        {"train.zero_stage": 3},
        {"train.device": "cpu"},
        {"train.checkpoint_every": 7},
        {"train.max_failures": 0},
        {"data.root": "/elsewhere"},
        {"data.loader": "threads"},
        {"data.prefetch": 5},
        {"data.readers": 3},
        {"data.read_cpus": 1.0},
        {"data.verify_pages": "never"},
        {"storage.root": "/elsewhere"},
        {"tracking.uri": "http://somewhere"},
        {"tracking.experiment": "other"},
        {"run.fresh": True},
        {"evaluate.labels": 3},
        {"search.trials": 3},
        {"simulate.subjects": 3},
        {"shards.rows": 3},
    ],
)
def test_a_run_keeps_its_name_where_numbers_do_not_change(changes: dict[str, object]) -> None:
    assert override(tiny(), changes).run_name(DIGEST) == tiny().run_name(DIGEST)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"stage": "masked"},
        {"data.views": ("sax",)},
        {"data.sax_slices": 3},
        {"data.frames": 4},
        {"data.matrix": (32, 64), "sampling.accelerations": (4,), "evaluate.accelerations": (4,)},
        {"data.global_batch": 64},
        {"data.crop": True},
        {"sampling.accelerations": (4,)},
        {"sampling.acs_lines": 3},
        {"model.depth": 3},
        {"model.patch": (4, 16, 16)},
        {"model.readout_fraction": 1.0},
        {"model.line_parts": "whole"},
        {"masked.mask_ratio": 0.6},
        {"masked.steps": 221},
        {"align.temperature": 0.2},
        {"align.teacher": "encoder"},
        {"align.teacher": "encoder", "align.train_image_encoder": True},
        {"align.head_steps": 7},
        {"optimizer.ema": 0.9},
        {"optimizer.weight_decay": 0.1},
        {"train.bf16": True},
    ],
)
def test_a_run_is_another_where_numbers_change(changes: dict[str, object]) -> None:
    assert override(tiny(), changes).run_name(DIGEST) != tiny().run_name(DIGEST)


def test_other_data_is_another_run_and_a_given_name_wins() -> None:
    assert tiny().run_name(DIGEST).startswith("tiny-")
    assert tiny().run_name(DIGEST) != tiny().run_name("1" * 64)
    assert override(tiny(), {"run.name": "mine"}).run_name(DIGEST) == "mine"


def test_the_zero_stage_may_be_typed() -> None:
    assert override(tiny(), {"train.zero_stage": "1"}).train.zero_stage == 1
    assert "train.zero_stage: input should be 0, 1, 2 or 3, got '4'" in refusal(**{"train.zero_stage": "4"})


def test_slots_of_views_follow_their_order() -> None:
    data = override(tiny(), {"data.views": "lax_4ch,sax", "data.sax_slices": "3"}).data
    assert (data.slices, data.view_types) == (4, (3, 0, 0, 0))
