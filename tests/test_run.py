"""Both halves together, on the bundled pair."""

import pytest
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.job.spec import Spec
from dspark_batch.run import open_pair


@pytest.mark.parametrize(("asked", "taken"), [(None, "bfloat16"), ("float16", "float16")])
def test_the_number_type_of_the_manifest_is_kept_unless_another_is_asked_for(asked, taken):
    spec = Spec(inputs=("in.jsonl",), out="out.jsonl", dtype=asked)
    opened = open_pair(spec, {"identity": {"dtype": "bfloat16"}})
    assert opened.identity["dtype"] == taken


def without_metrics(path):
    return [row | {"metrics": None} for row in rows_in(path)]


def test_an_interrupted_job_ends_with_the_rows_of_one_that_was_not(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("one", "two"), b"nope", *prompts("three"))
    options = {"opener": open_pair, "max_tokens": 9, "dtype": "float32"}

    def interrupt(tick):
        if tick.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, observe=interrupt, **options)
    assert start(tmp_path, **options).resumed == 2
    start(tmp_path, out=f"{tmp_path}/calm.jsonl", **options)
    assert without_metrics(tmp_path / "out.jsonl") == without_metrics(tmp_path / "calm.jsonl")
