"""An item that is given up costs its job one failure row, until it is asked again."""

import json

import pytest
from small_jobs import rows_in, write_lines

from dspark_batch.errors import Resumable
from dspark_batch.opening import open_with
from dspark_batch.pair import load_pair
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec

PROMPTS = [f"Write {n} in words." for n in (5, 62, 7, 118, 90, 31)]


class GivesUp:
    """An engine that gives up the item that began last, once the first answer is there."""

    def __init__(self, engine):
        self._engine = engine
        self.given_up = None

    def generate(self, stream, may_begin):
        begun = []

        def begins(item):
            begun.append(item)
            return may_begin(item)

        for outcome in self._engine.generate(stream, begins):
            yield outcome
            if self.given_up is None:
                self.given_up = begun[-1]
                self._engine.cancel(self.given_up)


def answers(rows):
    told = [{k: v for k, v in row.items() if k != "metrics"} for row in rows]
    return json.dumps(told).encode()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_job_that_was_stopped_with_an_item_given_up_ends_as_if_nothing_had_been(
    tmp_path, temperature
):
    pair, engines, asked = load_pair("tiny"), [], []
    write_lines(tmp_path / "in.jsonl", *({"prompt": prompt} for prompt in PROMPTS))

    def job(name, wrap=lambda engine: engine, **options):
        def open_engine(spec, manifest):
            opened = open_with(pair, spec)
            engines.append(wrap(opened.engine))
            return opened._replace(engine=engines[-1])

        out, stop = tmp_path / f"{name}.jsonl", options.pop("stop", lambda: False)
        # By other rounds the item that is given up could end together with the first answer.
        options = {"max_tokens": 16, "slots": 2, "draft_length": 3} | options
        options |= {"temperature": temperature}
        spec = Spec(inputs=(f"{tmp_path}/in.jsonl",), out=str(out), **options)
        run(spec, open_engine=open_engine, stop=stop)
        return rows_in(out)

    def is_asked_after_four():
        asked.append(1)
        return len(asked) > 4

    undisturbed = job("undisturbed")
    with pytest.raises(Resumable):
        job("out", GivesUp, stop=is_asked_after_four)
    rows = job("out")
    given_up = engines[-2].given_up.index
    assert [row["error"] and row["error"]["code"] for row in rows] == [
        "cancelled" if n == given_up else None for n in range(len(PROMPTS))
    ]
    others = [n for n in range(len(PROMPTS)) if n != given_up]
    assert answers([rows[n] for n in others]) == answers([undisturbed[n] for n in others])
    again = job("out", retry_where=("error.code=cancelled",))
    assert answers(again) == answers(undisturbed)
