"""Which split a subject belongs to: pure functions of pseudonyms, of what is known of them, and of earlier splits.

hash         each subject by itself: 70/10/20 % in expectation, and adding subjects moves nobody
stratified   exact shares in every stratum (sex and diseases, where they are known before reading): a stratum's
             subjects in the order of their hashes, dealt by quota. Adding subjects can move others, unless the
             earlier dataset is named (``shards.split_from``): then its subjects stay, and the new ones fill up
train, test  all subjects in that one
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from kmtr.types import DISEASES, InputError

SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}
MIN_SPLIT_SUBJECTS = 20
"""Fewer are not split unless that is asked for."""

_SHARES = {name: Fraction(str(share)) for name, share in SPLITS.items()}


def assign(
    subject_ids: Sequence[str],
    how: str,
    strata: Sequence[str] | None = None,
    earlier: Mapping[str, str] | None = None,
) -> list[str]:
    """Split of each subject.

    Args:
        subject_ids: pseudonyms, all different.
        how: ``config.shards.split``: auto, hash, stratified, train or test.
        strata: of each subject, for stratified. None: one stratum.
        earlier: pseudonym -> split, of subjects that keep theirs.

    Raises:
        InputError: a subject comes twice.
    """
    if len(set(subject_ids)) < len(subject_ids):
        twice, times = Counter(subject_ids).most_common(1)[0]
        raise InputError(f"subjects: expected each once, got {twice} {times} times; give each subject one name")
    if how == "auto":
        how = "hash" if len(subject_ids) >= MIN_SPLIT_SUBJECTS else "train"
    known = earlier or {}
    if how == "stratified":
        return stratified(subject_ids, strata or [""] * len(subject_ids), known)
    return [known.get(s) or (split_of(s) if how == "hash" else how) for s in subject_ids]


def split_of(subject_id: str) -> str:
    """Split of a subject by a hash of its pseudonym: adding subjects moves nobody."""
    share = _hash(subject_id) / 2**64
    if share < SPLITS["train"]:
        return "train"
    return "val" if share < SPLITS["train"] + SPLITS["val"] else "test"


def stratified(subject_ids: Sequence[str], strata: Sequence[str], earlier: Mapping[str, str]) -> list[str]:
    """Splits whose sizes in each stratum are the exact shares, rounded up or down, and so are their sums over all.

    Strata come one after the other. Of n subjects a split gets floor(share n); who is left goes to the splits that all
    strata so far have given the least for their share (D'Hondt 1878), else every stratum would round in favour of the
    same split, and rare strata would lie in training alone. Earlier subjects count where they are, also where that is
    beyond the quota.
    """
    members: dict[str, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    found = [earlier.get(subject_id, "") for subject_id in subject_ids]
    given = Counter[str]()
    for stratum in sorted(members):
        indices = members[stratum]
        have = Counter(found[i] for i in indices if found[i])
        given.update(have)
        quota = {name: share * len(indices) for name, share in _SHARES.items()}
        new = sorted((i for i in indices if not found[i]), key=lambda i: (_hash(subject_ids[i]), subject_ids[i]))
        for i in new:
            open_ = [name for name in _SHARES if have[name] + 1 <= quota[name]]
            open_ = open_ or [name for name in _SHARES if have[name] < quota[name]] or list(_SHARES)
            found[i] = min(open_, key=lambda name: (given[name] + 1) / _SHARES[name])
            have[found[i]] += 1
            given[found[i]] += 1
    return found


def stratum(labels: Mapping[str, float]) -> str:
    """Sex and diseases, as far as they are known: ``male dcm``, ``female``, ``hcm``; empty: nothing is."""
    sex = {1.0: ["male"], 0.0: ["female"]}.get(labels.get("male", -1.0), [])
    return " ".join([*sex, *(name for name in DISEASES if labels.get(name) == 1)])


def _hash(subject_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(b"split" + subject_id.encode(), digest_size=8).digest(), "big")
