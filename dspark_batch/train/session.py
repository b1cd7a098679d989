"""One start of a training: gather, take the steps that are left, measure, publish."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from typing import Any, NamedTuple, cast

import mlx.core as mx
import orjson

from dspark_batch import device
from dspark_batch.drafters.drafter_config import FAMILIES, DrafterConfig
from dspark_batch.drafters.dspark import DSparkDrafter
from dspark_batch.drafters.few_tokens import (
    DRAFT_TOKENS,
    draft_tokens,
    reduced,
    worth_drafting,
)
from dspark_batch.drafters.new_config import Sizes, new_config
from dspark_batch.drafters.packaging import load_drafter
from dspark_batch.errors import ModelError, Resumable, UsageError
from dspark_batch.intake.mapping import Render
from dspark_batch.models.checkpoint import read_config, read_weights
from dspark_batch.models.hub import locate
from dspark_batch.models.pairs import DEFAULT_FAMILY, known_pair
from dspark_batch.models.target import ends_of, text_model
from dspark_batch.numerics.arrays import named_arrays
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.output.look import Look
from dspark_batch.pair import Pair, load_pair
from dspark_batch.record.disk import write_text
from dspark_batch.spec.budget import Budget
from dspark_batch.train.batches import choose, padded, steps_of_a_pass
from dspark_batch.train.card import model_card
from dspark_batch.train.corpus import Corpus, Rendering, gather, runs_of
from dspark_batch.train.fit import OPTIMIZER, Schedule, Trainer, compute_dtype, initialize
from dspark_batch.train.learn import drafting_loss, freeze_ends
from dspark_batch.train.loss import DFLASH, DSPARK, LossMix, Terms
from dspark_batch.train.measure import measure
from dspark_batch.train.place import Place, State, stored_weights
from dspark_batch.train.sizes import anchors_of, peak_rate, sizes_for, tokens_per_step
from dspark_batch.train.teacher import Ends, TappedTarget, ends_for_drafter
from dspark_batch.train.training import Asked, Lesson, Observe, Point, Reports, Training

_PASSES = 10  # over all answers, as DeepSpec trains
_WARM_UP = 25  # one step in so many
_CURVE_POINTS, _STATES = 200, 20  # of a training
_MOST_MEASURED, _MEASURED_TOGETHER = 512, 8  # held-out answers
_SEEN = "seen"  # in a state: the terms of the steps behind the last point
_GENTLER = 3  # by how much the rate is smaller that a trained drafter goes on with


class Student(NamedTuple):
    """A drafter in training, and what it learns from."""

    drafter: DSparkDrafter  # whole: it learns from every token
    target: TappedTarget
    config: dict[str, Any]  # as it will be stored
    ends: Ends  # as they will be stored
    mix: LossMix
    drafted: Sequence[int] | None = ()  # the tokens that it drafted before: none if new; None: all


class Session:
    """Holds a training's place while it runs.

    Args:
        to: the directory of the drafter.
        jobs: runs of one target.
        asked: the options.
        observe: told how far it is.
        stop: asked behind each step whether it was the last of this start.
    """

    def __init__(
        self,
        to: str,
        jobs: Sequence[Look],
        asked: Asked,
        observe: Observe,
        stop: Callable[[], bool],
    ) -> None:
        self._place, self._jobs, self._asked = Place(to), jobs, asked
        self._observe, self._stop = observe, stop

    def run(
        self, render: Render, context_length: int, budget: Budget, *, overwrite: bool
    ) -> Training:
        """Go on until the drafter is there; one that is there already is only reported."""
        place, identity = self._place, self._jobs[0].manifest["identity"]
        about = {"runs": runs_of(self._jobs), "target": identity["target"]}
        about |= asdict(self._asked) | {"device": _device(), "optimizer": OPTIMIZER}
        place.begin(about, overwrite=overwrite)
        if place.is_done():
            return Training(**place.report())
        with as_they_come():  # drafts decide no byte, so no row needs padding here
            pair = self._load()
            most = tokens_per_step(pair.target.facts.vocab_size)
            self._observe(Lesson("gathering the answers"))
            reads = Rendering(render, context_length)
            corpus = gather(self._jobs, reads, place.work, by=self._asked.by, most_tokens=most)
            student = _student(pair, self._asked, corpus)
            before = self._measured_before(pair, student, corpus) if self._asked.init else None
            return self._taught(student, corpus, most, budget, before)

    def _load(self) -> Pair:
        job, asked = self._jobs[0], self._asked
        spec = job.spec
        target = spec.target or known_pair(spec.family or DEFAULT_FAMILY).target
        pair = load_pair(
            target=target,
            drafter=asked.init,
            drafter_bits=None,
            target_bits=spec.target_bits,
            trust_remote_code=spec.trust_remote_code,
        )
        there, here = job.manifest["identity"]["target"], pair.config.identity["target"]
        if there != here:
            raise UsageError(
                f"{job.run_dir.out} is a run of another target: {target} has the digest "
                f"{str(here)[:12]}… now and had {str(there)[:12]}… then. Put the old weights back, "
                "or run the job again."
            )
        return pair

    def _taught(
        self,
        student: Student,
        corpus: Corpus,
        tokens: int,
        budget: Budget,
        before: Reports | None,
    ) -> Training:
        drafter = student.drafter
        schedule = _schedule(self._asked, corpus, tokens, drafter.config.hidden_size)
        loss = drafting_loss(
            drafter,
            student.target,
            student.mix,
            lambda width: anchors_of(width, drafter.block_size),
        )
        trainer = Trainer(drafter, loss, schedule)
        curve = self._learn(trainer, schedule, corpus, tokens, budget)
        trainer.finish()
        weights = stored_weights(drafter, student.ends)
        drafted = _drafted(student, corpus)
        self._observe(Lesson("measuring", schedule.steps, schedule.steps, curve))
        result = Training(
            to=self._place.out.name,
            about=_about(student, schedule, tokens, drafted),
            answers=len(corpus.learnt),
            held_out=min(_MOST_MEASURED, len(corpus.held_out)),
            left_out=dict(corpus.left_out),
            before=before,
            after=_measured(_as_stored(drafter.config, weights, drafted), student.target, corpus),
            curve=curve,
        )
        files = {
            "config.json": _json(student.config),
            "report.json": _json(asdict(result)),
            "README.md": model_card(result, self._jobs[0]),
        }
        if drafted is not None:
            files[DRAFT_TOKENS] = orjson.dumps(drafted).decode()
        with suppress(ModuleNotFoundError):  # matplotlib comes with the extra [report]
            from dspark_batch.train.page import training_page

            files["report.html"] = training_page(result)
        self._place.publish(files, weights)
        return result

    def _learn(
        self, trainer: Trainer, schedule: Schedule, corpus: Corpus, tokens: int, budget: Budget
    ) -> list[Point]:
        """Take the steps that are left, and return the whole curve."""
        place, steps, learnt = self._place, schedule.steps, corpus.learnt
        done, arrays = place.state() or State(0, {})
        if done:
            trainer.restore(arrays)
        curve, every = place.curve(done), max(1, steps // _CURVE_POINTS)
        state_every = every * max(1, steps // (_STATES * every))
        seen = list(arrays.get(_SEEN, ()))
        self._observe(Lesson("training", done, steps, curve))
        for step, rows, width in choose(corpus.lengths(learnt), steps, tokens, schedule.seed, done):
            batch = padded([corpus.pair(learnt[row]) for row in rows], width)
            progress = mx.array(step / steps)
            seen.append(mx.stack(list(trainer.step(*batch, schedule.key(step), progress))))
            if step % every == 0 or step == steps:
                curve.append(self._point(step, steps, seen))
                seen = []
                self._observe(Lesson("training", step, steps, curve))
            is_asked = self._stop()
            is_over = is_asked or (step < steps and not budget.allows_one_more())
            if is_over or step % state_every == 0 or step == steps:
                kept = {_SEEN: mx.stack(seen)} if seen else {}
                place.save_state(State(step, trainer.state() | kept))
            if is_over:
                why = "stopped as asked" if is_asked else "the time is over"
                raise Resumable(
                    f"{place.out}: {why} after step {step} of {steps}; the same command goes on "
                    "from there."
                )
        return curve

    def _point(self, step: int, steps: int, seen: list[mx.array]) -> Point:
        """Note the mean terms of some steps, unless the loss is no number."""
        terms: Any = mx.stack(seen).mean(axis=0).tolist()
        point: Point = {"step": step} | dict(zip(Terms._fields, terms, strict=True))
        if not isfinite(point["loss"]):
            raise ModelError(
                f"{self._place.out}: the loss was no number up to step {step} of {steps}, so this "
                "drafter would learn nothing more. Start over with --overwrite and another "
                "--seed. If that ends alike, the target computes no numbers for some answer."
            )
        self._place.add_to_curve(point)
        return point

    def _measured_before(self, pair: Pair, student: Student, corpus: Corpus) -> Reports:
        """Measure the drafter that is gone on with, in the first start only."""
        path = self._place.work / "before.json"
        if not path.exists():
            self._observe(Lesson("measuring the drafter as it was"))
            used = cast(DSparkDrafter, pair.drafter)  # `load_pair` was given it
            used.set_dtype(compute_dtype())
            write_text(path, _json(_measured(used, student.target, corpus)))
        return orjson.loads(path.read_bytes())


def _device() -> str:
    """Name the kind of device, whose last bits decide the weights."""
    return "cpu" if device.is_cpu() else "metal" if device.is_metal() else "cuda"


def _student(pair: Pair, asked: Asked, corpus: Corpus) -> Student:
    if asked.init is not None:
        return _trained_student(pair, asked.init)
    model, facts = pair.target.model, pair.target.facts
    sizes = sizes_for(facts, asked)
    target = TappedTarget(model, sizes.taps)
    ends = ends_for_drafter(model, facts, target.logit_scale(facts.logit_softcap))
    mask = _mask_token(ends.embedding, corpus, pair.config.stop_ids)
    config = new_config(sizes, facts, vars(text_model(model).args), mask)
    drafter = DSparkDrafter(DrafterConfig.from_dict(config))
    initialize(drafter, mx.random.key(asked.seed))
    freeze_ends(drafter, ends)
    return Student(drafter, target, config, ends, DSPARK if sizes.kind == "dspark" else DFLASH)


def _trained_student(pair: Pair, init: str) -> Student:
    """Go on with a drafter, whole; its embedding and head stay as they are stored."""
    directory, facts = locate(init).directory, pair.target.facts
    config, weights = read_config(directory), read_weights(directory)
    if config.get("architectures", [None])[0] not in FAMILIES or config.get("quantization"):
        raise UsageError(
            f"--init {init}: expected a drafter in DeepSpec's packaging ({', '.join(FAMILIES)}) "
            "that is not quantised. Train a new one without --init."
        )
    ends = Ends(
        weights["embed_tokens.weight"],
        weights.get("lm_head.weight", weights["embed_tokens.weight"]),
    )
    drafter = load_drafter(directory, facts, ends_of(pair.target.model), reduces=False)
    freeze_ends(drafter)
    mix = DSPARK if drafter.has_confidence else DFLASH
    target = TappedTarget(pair.target.model, drafter.tap_ids)
    drafted = draft_tokens(directory, facts.vocab_size)
    return Student(drafter, target, config, ends, mix, drafted)


def _mask_token(embedding: mx.array, corpus: Corpus, stop_ids: frozenset[int]) -> int:
    """Choose the last token that no answer or prompt has, ends no answer, and has an embedding.

    A row of zeros would make all slots behind the anchor alike.
    """
    norms = mx.linalg.norm(embedding.astype(mx.float32), axis=-1)
    has_row: Any = (norms > 0.1 * norms.mean()).tolist()
    seen = corpus.seen(len(has_row))
    ids = range(len(has_row) - 1, -1, -1)
    fits = (i for i in ids if has_row[i] and not seen[i] and i not in stop_ids)
    found = next(fits, None)
    if found is None:
        raise UsageError(
            "every token of the vocabulary occurs in these answers, so none is left that could "
            "stand for a masked one. Name fewer runs."
        )
    return found


def _schedule(asked: Asked, corpus: Corpus, tokens: int, hidden_size: int) -> Schedule:
    steps = asked.steps or _PASSES * steps_of_a_pass(corpus.lengths(corpus.learnt), tokens)
    rate = peak_rate(hidden_size) / (_GENTLER if asked.init is not None else 1)
    return Schedule(steps=steps, peak_lr=rate, warmup=max(1, steps // _WARM_UP), seed=asked.seed)


def _drafted(student: Student, corpus: Corpus) -> list[int] | None:
    """Choose the tokens that are worth drafting, those of before among them; None: all."""
    if student.drafted is None:
        return None
    return worth_drafting(corpus.answered(student.drafter.config.vocab_size), student.drafted)


def _as_stored(
    config: DrafterConfig, weights: Mapping[str, mx.array], drafted: Sequence[int] | None
) -> DSparkDrafter:
    """Make the drafter that others will load."""
    if drafted is not None:
        config, weights = reduced(config, weights, drafted)
    drafter = DSparkDrafter(config)
    own = dict(named_arrays(drafter))
    drafter.load_weights([(name, weights[name]) for name in own])
    drafter.set_dtype(compute_dtype())
    return drafter


def _measured(drafter: DSparkDrafter, target: TappedTarget, corpus: Corpus) -> Reports:
    samples = [corpus.sample(row) for row in corpus.held_out[:_MOST_MEASURED]]
    return measure(drafter, target, samples, batch=_MEASURED_TOGETHER)


def _about(
    student: Student, schedule: Schedule, tokens: int, drafted: Sequence[int] | None
) -> dict[str, Any]:
    config, drafter = student.config, student.drafter
    sizes = Sizes(
        kind="dspark" if student.mix is DSPARK else "dflash",
        layers=drafter.num_layers,
        block=drafter.block_size,
        taps=drafter.tap_ids,
        rank=config["markov_rank"],
    )
    trained = sum(a.size for _, a in named_arrays(drafter))
    if drafter.config.own_embedding:
        trained -= student.ends.embedding.size
    if drafter.config.own_head:
        trained -= student.ends.head.size
    return asdict(sizes) | {
        "mask_token_id": config["mask_token_id"],
        "draft_tokens": len(drafted or ()) or drafter.config.vocab_size,
        "trained_parameters": trained,
        "steps": schedule.steps,
        "tokens_per_step": tokens,
        "peak_rate": schedule.peak_lr,
        "seed": schedule.seed,
        "device": _device(),
    }


def _json(content: object) -> str:
    return orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
