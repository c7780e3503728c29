"""What a run writes at its end: a text sample, curves and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lswt_core.data.corpus import Corpus
from lswt_core.data.scored import plain_ids
from lswt_core.decode import InferenceEngine, Sample, generate
from lswt_core.decode.sharded_engine import ShardedEngine
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.recipe import Recipe
from lswt_core.reporting.console import Console
from lswt_core.reporting.curves import ReportUnavailable, write_curves
from lswt_core.reporting.metrics_log import read_metrics
from lswt_core.reporting.run_report import write_report
from lswt_core.reporting.units import format_duration
from lswt_core.train.step_context import StepContext

PROMPT_TOKENS = 32  # of a held-out document, if the recipe has no prompt


def open_engine(context: StepContext, seq_len: int) -> InferenceEngine:
    """Inference with the model of a run, which may be cut over ranks."""
    if context.world.size == 1:
        return InferenceEngine(context.loss.decoder, context.precision, seq_len)
    return ShardedEngine(context.loss, context.precision, seq_len)


def write_sample(
    engine: InferenceEngine,
    recipe: Recipe,
    corpus: Corpus,
    directory: Path,
    console: Console,
    stopping: Callable[[], bool],
) -> None:
    """Generate text after the recipe's prompt into sample.txt, if the recipe asks for it. All
    ranks generate the same; the one whose console speaks writes it.
    """
    sample, tokenizer = recipe.sample, corpus.tokenizer
    if not sample.tokens:
        return
    prompt = encode_prompt(sample.prompt, corpus)
    generated = generate(
        engine,
        [tokenizer.bos_id, *prompt],
        Sample(sample.temperature, sample.top_p, seed=recipe.train.seed),
        max_new_tokens=sample.tokens,
        eos_id=tokenizer.eos_id,
        should_stop=stopping,
    )
    ids = list(generated)
    if console.silent:
        return
    text = f"{tokenizer.decode(prompt)}⟦model⟧{tokenizer.decode(ids)}"
    write_atomically(directory / "sample.txt", (text + "\n").encode())
    console.say("sample (the model writes after ⟦model⟧):")
    for line in text.splitlines():
        console.say(f"  | {line}")


def encode_prompt(text: str, corpus: Corpus) -> list[int]:
    """The ids of the recipe's prompt; if it is empty, those that the held-out text begins with."""
    if text:
        return corpus.tokenizer.encode([text])[0]
    ids: list[int] = plain_ids(corpus.valid.ids[1:PROMPT_TOKENS]).tolist()
    return ids


def write_curves_and_report(directory: Path, console: Console) -> None:
    """Plot the metrics logged so far and write report.html; nothing if there are none."""
    if not read_metrics(directory / "metrics.jsonl"):
        return
    try:
        console.say(f"curves: {write_curves(directory)}")
    except ReportUnavailable as error:
        console.warn(str(error))
    console.say(f"report: {write_report(directory)}")


def announce_full_run(console: Console, full: Recipe, tokens_per_second: float) -> None:
    """Print how long the full run would take at the speed of the overlay's."""
    tokens = full.train.total_steps * full.train.tokens_per_step
    console.say(
        f"at this speed ({tokens_per_second:,.0f} tokens/s) the full run of {tokens:,} tokens would"
        f" take {format_duration(tokens / tokens_per_second)} here"
    )
