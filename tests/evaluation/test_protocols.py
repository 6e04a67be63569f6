"""Each protocol asks the rows it names and hides the adapters it names, no more and no fewer."""

from __future__ import annotations

import pytest

from loracompose.evaluation.protocols import PROTOCOLS, get_protocol
from loracompose.evaluation.tasks import clusters
from tests.evaluation.material import CLUSTERS, task_rows

NAMES = [*CLUSTERS, "stranger"]  # an adapter that is no task's is never hidden


def hidden(name):
    rows = PROTOCOLS[name].rows(task_rows(), None, 0, 5)
    found = PROTOCOLS[name].excluded(rows, clusters(rows), NAMES)
    return {row.task: set(names) for row, names in zip(rows, found, strict=True)}


@pytest.mark.parametrize("name", ["in-domain", "unseen", "mixed"])
def test_nothing_is_hidden_in_the_whole_pool(name):
    assert hidden(name) == {task: set() for task in CLUSTERS}


def test_masking_hides_the_own_adapter_alone():
    assert hidden("masked") == {task: {task} for task in CLUSTERS}


def test_masking_clusters_hides_every_adapter_of_the_rows_cluster():
    language, numbers = {"french", "mood"}, {"sql", "sums"}
    assert hidden("cluster-masked") == {"french": language, "mood": language, "sql": numbers, "sums": numbers}


def test_a_task_without_adapter_hides_nothing():
    rows = task_rows()
    assert PROTOCOLS["masked"].excluded(rows, clusters(rows), ["stranger"]) == [frozenset()] * len(rows)


def test_unseen_phrasings_are_those_of_the_named_template():
    rows = PROTOCOLS["unseen"].rows(task_rows(), None, 0, 5)
    assert [row.template for row in rows] == [5] * 4
    with pytest.raises(ValueError, match="needs rows of template 7"):
        PROTOCOLS["unseen"].rows(task_rows(), None, 0, 7)


def test_the_mixed_stream_has_the_rows_of_the_pool_in_another_order():
    plain = PROTOCOLS["in-domain"].rows(task_rows(), 2, 0, 5)
    mixed = PROTOCOLS["mixed"].rows(task_rows(), 2, 0, 5)
    assert set(mixed) == set(plain)
    assert [row.task for row in plain] == sorted(row.task for row in plain)
    assert [row.task for row in mixed] != sorted(row.task for row in mixed)


def test_an_unknown_protocol_is_refused_with_those_there_are():
    with pytest.raises(LookupError, match="no protocol 'ood'; there are in-domain, masked"):
        get_protocol("ood")
