"""What a file of augmentations has for no passage of the corpus is told from what it has for one."""

from __future__ import annotations

import pytest
import ray.data

from pipelines.stages.augment import _names_in, _unmatched
from prag_core.augmentation.formats import ImportedAugmentations
from prag_core.identity import passage_key
from prag_core.records import Passage, to_table
from tests.helpers.passages import make_augmentation, make_passage

PASSAGES = [make_passage(n) for n in range(3)]
NAMES = (PASSAGES[0].key, *PASSAGES[1].sources, passage_key("", PASSAGES[2].text))


def test_passages_are_matched_by_key_id_and_text() -> None:
    found = _names_in(to_table(Passage, PASSAGES), frozenset({*NAMES, "nobody"}))
    assert found["name"].to_pylist() == sorted(NAMES)


@pytest.mark.slow
def test_augmentations_for_no_passage_are_named(ray_here: str) -> None:
    imported = ImportedAugmentations(dict.fromkeys((*NAMES, "nobody"), make_augmentation(PASSAGES[0])), (), {})
    assert _unmatched(imported, ray.data.from_arrow(to_table(Passage, PASSAGES))) == ["nobody"]
