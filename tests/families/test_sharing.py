"""One vocabulary of sharing: what a setting takes is a part of it."""

from __future__ import annotations

from typing import get_args

import pytest

from pocketrec.families import sharing


@pytest.mark.parametrize("name", ["BlockSharing", "RowSharing", "ThresholdSharing", "ScaleSharing"])
def test_every_setting_takes_words_of_the_one_vocabulary(name):
    assert set(get_args(getattr(sharing, name))) < set(get_args(sharing.Sharing))


def test_every_word_is_explained_and_taken_by_some_setting():
    taken = {word for name in vars(sharing) if name.endswith("Sharing") and name != "Sharing"
             for word in get_args(getattr(sharing, name))}  # fmt: skip
    assert taken == set(get_args(sharing.Sharing))
    assert all(f"``{word}``" in (sharing.__doc__ or "") for word in taken)
