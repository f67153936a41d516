"""Pseudonyms: a keyed hash of the name that a source gives a subject."""

from __future__ import annotations

import hashlib

from kmtr.types import InputError


def pseudonym(subject: str, key: bytes) -> str:
    """``p-`` and 16 hexadecimal digits: BLAKE2b (RFC 7693) of `subject`, keyed with `key`, 64 bits long.

    The same name and key give the same pseudonym on any machine. Without the key nobody can tell it from a random
    number; with it anybody can try names, so a key that guards people is secret, long and random. Two subjects
    among a million share a pseudonym with a chance of 3e-8 (n^2 / 2^65).

    Raises:
        InputError: an empty name, or a key that is not 1 to 64 bytes long.
    """
    if not subject:
        raise InputError("subject: expected a name to make a pseudonym of, got an empty one")
    if not 1 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise InputError(f"subject_key: expected 1 to {hashlib.blake2b.MAX_KEY_SIZE} bytes, got {len(key)}")
    return f"p-{hashlib.blake2b(subject.encode(), key=key, digest_size=8).hexdigest()}"
