"""The map in the order of its keys, held against a dict."""

from __future__ import annotations

import random

import pytest

from binderfs_fuse.engine.sorted_map import SortedMap

BOTTOM, TOP = -(1 << 70), 1 << 70


def neighbours(model: dict[int, str], key: int) -> tuple[str | None, str | None]:
    """What a sorted list says that the values before and after a key are."""
    smaller = [each for each in model if each < key]
    larger = [each for each in model if each > key]
    return (model[max(smaller)] if smaller else None), (model[min(larger)] if larger else None)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_a_dict_in_order(seed: int) -> None:
    """Whatever is added and removed, all keys are found, in order, and those that are not there are not."""
    choices = random.Random(seed)
    keys = [choices.choice((number, number << 60, -number)) for number in range(60)]
    model: dict[int, str] = {}
    tree: SortedMap[str] = SortedMap()
    for _ in range(600):
        key = choices.choice(keys)
        if key in model:
            del model[key]
            tree.remove(key)
        else:
            model[key] = tree_value = str(key)
            tree.add(key, tree_value)
        other = choices.choice(keys)
        assert neighbours(model, other) == (tree.before(other), tree.after(other))
        assert (model.get(other), other in model) == (tree.get(other), other in tree)

        assert sorted(model.items()) == list(tree.items())
        assert (tree.first(), tree.last()) == (tree.after(BOTTOM), tree.before(TOP))
    assert [model[key] for key in sorted(model)] == list(tree.values())
    assert (sorted(model), len(model), len(model)) == (list(tree), len(tree), tree.count)


def test_a_missing_key_is_an_error() -> None:
    """It can be asked for, and be taken for granted."""
    tree: SortedMap[str] = SortedMap()
    tree.add(1, "one")
    with pytest.raises(KeyError):
        tree[2]

    assert "one" == tree[1]
    assert (None, None) == (SortedMap().first(), SortedMap().last())


def test_it_is_balanced_whatever_the_keys_are() -> None:
    """Keys in ascending order, which a plain tree would make a list of, stand some thirty deep at most."""
    tree: SortedMap[int] = SortedMap()
    for key in range(2000):
        tree.add(key, key)

    def depth(entry: object) -> int:
        return 0 if entry is None else 1 + max(depth(entry.left), depth(entry.right))  # type: ignore[attr-defined]

    assert depth(tree._root) < 60
