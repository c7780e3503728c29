"""The model card of an exported run: what the model is, how it came to be and how it does, read
from the run directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lswt_core.errors import CheckpointError
from lswt_core.recipe import Chosen, Recipe
from lswt_core.reporting.metrics_log import read_metrics
from lswt_core.reporting.units import format_duration
from lswt_core.train.environment import read_record

MEASURES = {  # of an evaluation: metric -> row of the table, format
    "eval/loss": ("loss, nats per token", ".4f"),
    "eval/perplexity": ("perplexity", ",.2f"),
    "eval/bits_per_byte": ("bits per byte", ".4f"),
    "eval/accuracy": ("accuracy of the likeliest token", ".2%"),
    "eval/unigram_perplexity": ("perplexity of token frequencies alone", ",.1f"),
    "eval/tokens": ("held-out tokens", ",.0f"),
}


def model_card(
    run: Path, recipe: Recipe, step: int, address: str, *, code: bool, picture: bool
) -> str:
    """Markdown with the front matter of the Hub; ``step`` is the checkpoint's, ``address`` what the
    model is loaded by, ``code`` whether its code lies beside it. Raises CheckpointError where the
    run's record cannot be read.
    """
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if entry["step"] <= step]
    surroundings = recorded_surroundings(run / "environment.json")
    parts = [
        front_matter(recipe),
        f"# {recipe_name(run)}",
        summary(recipe, surroundings),
        "## Use\n\n" + usage(address, code),
        "## Training\n\n"
        + training(recipe, entries, surroundings, step)
        + ("\n\n![Curves of the run](curves.png)" if picture else ""),
        "## Evaluation\n\n" + evaluation(entries),
        "## Components\n\n" + components(surroundings),
        (
            "## Recipe\n\nResolved, every default written"
            f" out:\n\n```toml\n{recipe.dump().strip()}\n```"
        ),
        (
            "## Limits\n\nA language model as pretraining leaves it: it continues text, it has"
            " learnt whatever its data holds, and nothing was done to make it truthful or harmless."
            " What was measured stands above; nothing else was."
        ),
    ]
    cited = citations(recipe.components())
    parts += (
        [
            "## Citations\n\nOf the methods this model is made with:\n\n```bibtex\n"
            + "\n".join(cited)
            + "\n```"
        ]
        if cited
        else []
    )
    return "\n\n".join(parts) + "\n"


def recorded_surroundings(path: Path) -> dict[str, Any]:
    """What a run has recorded of its machine and model."""
    try:
        return read_record(path)
    except (OSError, ValueError) as error:
        cure = "give the run's command once more, which writes it anew"
        raise CheckpointError(f"{path} is missing or damaged ({error})\n  fix: {cure}") from error


def recipe_name(run: Path) -> str:
    """What the run is called: its directory's name."""
    return run.resolve().name


def front_matter(recipe: Recipe) -> str:
    """What the Hub sorts models by."""
    lines = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- lswt",
        "- pretraining",
    ]
    data = recipe.one("data")
    if data.name == "hf" and not Path(data.options["path"]).exists():
        lines += ["datasets:", f"- {data.options['path']}"]
    return "\n".join(["---", *lines, "---"])


def summary(recipe: Recipe, surroundings: Mapping[str, Any]) -> str:
    """One paragraph."""
    model, numbers = recipe.model, surroundings["parameters"]
    memories = ", ".join(chosen.name for chosen in recipe.many("memory").values()) or "none"
    return (
        'A decoder of the LSWTransformer family ("Long-Short-Working Transformer") with'
        f" {numbers['total']:,} parameters: "
        f"{model.n_layers} layers of width {model.d_model}, {model.n_heads} heads, positions by"
        f" {recipe.one('positional').name}, "
        f"memories: {memories}, feed-forward: {recipe.one('ffn').name}. Pretrained with "
        "lswt-core."
    )


def usage(address: str, code: bool) -> str:
    """How the model is loaded."""
    first = (
        ""
        if code
        else (
            "import lswt_core  # registers the model; pip install lswt-core and the packages listed"
            " below\n"
        )
    )
    trust = ", trust_remote_code=True" if code else ""
    note = (
        "With `lswt-core` installed, `import lswt_core` replaces `trust_remote_code`. "
        if code
        else ""
    ) + "The cache that `generate` uses is the model's own memory, bounded by its length."
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{first}
tokenizer = AutoTokenizer.from_pretrained({address!r})
model = AutoModelForCausalLM.from_pretrained({address!r}{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{note}"""


def training(
    recipe: Recipe, entries: Sequence[Mapping[str, Any]], surroundings: Mapping[str, Any], step: int
) -> str:
    """Data, length and cost."""
    train, data = recipe.train, recipe.one("data")
    last: Mapping[str, Any] = next((entry for entry in reversed(entries) if "tokens" in entry), {})
    source = ", ".join(
        f"{key} = {value!r}" for key, value in data.options.items() if value not in ("", None)
    )
    rows = [
        ("text", f"{data.name} ({source})" if source else data.name),
        ("tokenizer", recipe.one("tokenizer").name),
        ("updates", f"{step:,} of {train.total_steps:,}"),
        ("tokens seen", f"{last.get('tokens', step * train.tokens_per_step):,}"),
        ("batch", f"{train.batch_size} rows of {train.seq_len} new tokens"),
        (
            "optimizer",
            (
                f"{recipe.one('optimizer').name}, peak learning rate"
                f" {recipe.one('optimizer').options['lr']:g}"
            ),
        ),
        (
            "word embeddings",
            (
                recipe.embedding.warm_start
                if recipe.embedding.warm_start != "none"
                else "random at the start"
            ),
        ),
        ("precision", surroundings["precision"]),
        (
            "device",
            (
                f"{surroundings['device']}, {surroundings['processes']} process(es),"
                f" {surroundings['machine']['processor']}"
            ),
        ),
    ]
    if "seconds" in last:
        rows += [
            (
                "time",
                (
                    f"{format_duration(last['seconds'])} ({last['tokens'] / last['seconds']:,.0f} tokens per"
                    " second)"
                ),
            )
        ]
    return table(("", ""), rows)


def evaluation(entries: Sequence[Mapping[str, Any]]) -> str:
    """The last evaluation."""
    last = next((entry for entry in reversed(entries) if entry.get("eval/loss") is not None), None)
    if last is None:
        return "None was made."
    rows = [
        (words, format(last[name], style))
        for name, (words, style) in MEASURES.items()
        if last.get(name) is not None
    ]
    return f"On held-out text of the same source, after update {last['step']:,}:\n\n" + table(
        ("measure", ""), rows
    )


def components(surroundings: Mapping[str, Any]) -> str:
    """Who supplied what."""
    return table(
        ("component", "package"),
        [(f"`{name}`", package) for name, package in surroundings["components"].items()],
    )


def citations(chosen: Sequence[Chosen]) -> list[str]:
    """BibTeX of these components, each entry once."""
    found = [
        entry.strip()
        for one in chosen
        for entry in re.split(r"(?m)^(?=@)", one.offer.citation)
        if entry.strip()
    ]
    return list(dict.fromkeys(found))


def table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    """Two columns of Markdown."""
    lines = [
        f"| {head[0]} | {head[1]} |",
        "| --- | --- |",
        *(f"| {left} | {right} |" for left, right in rows),
    ]
    return "\n".join(lines)
