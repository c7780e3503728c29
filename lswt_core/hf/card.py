"""Model card of an exported run: architecture, training and evaluation, read from the run
directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lswt_core.errors import CheckpointError
from lswt_core.recipe import Chosen, Recipe
from lswt_core.recipe.toml_writer import flat
from lswt_core.reporting.run_report import read_metrics
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_duration
from lswt_core.train.environment import read_record

METRICS = {  # metric of an evaluation -> label, format
    "eval/loss": ("loss, nats per token", ".4f"),
    "eval/perplexity": ("perplexity", ",.2f"),
    "eval/bits_per_byte": ("bits per byte", ".4f"),
    "eval/accuracy": ("top-1 accuracy", ".2%"),
    "eval/unigram_perplexity": ("perplexity of a unigram model", ",.1f"),
    "eval/tokens": ("held-out tokens", ",.0f"),
}
LIMITS = (
    "A pretrained language model without instruction tuning: it continues text, it has learnt"
    " whatever its data holds, and nothing was done to make it truthful or harmless. What was"
    " measured is listed above; nothing else was."
)


def model_card(
    run: Path,
    recipe: Recipe,
    step: int,
    address: str,
    *,
    code: bool,
    needs_code: bool,
    picture: bool,
) -> str:
    """Return Markdown with the Hub's front matter. ``step`` is the checkpoint's, ``address`` what
    the model is loaded by, ``code`` whether its code is included, ``needs_code`` whether no
    package has some of it. Raises CheckpointError if the run's environment record cannot be read.
    """
    entries = [entry for entry in read_metrics(run / "metrics.jsonl") if entry["step"] <= step]
    environment = read_environment(run / "environment.json")
    curves = "\n\n![Curves of the run](curves.png)" if picture else ""
    sections = [
        front_matter(recipe),
        f"# {run.resolve().name}",
        summary(recipe, environment),
        f"## Use\n\n{usage(address, code, needs_code)}",
        f"## Training\n\n{training_table(recipe, entries, environment, step)}{curves}",
        f"## Evaluation\n\n{evaluation_table(entries)}",
        f"## Components\n\n{component_table(environment)}",
        "## Recipe\n\nResolved, with every default written out:\n\n"
        f"```toml\n{recipe.dump().strip()}\n```",
        f"## Limits\n\n{LIMITS}",
    ]
    citations = collect_citations(recipe.components())
    if citations:
        bibtex = "\n".join(citations)
        sections.append(
            f"## Citations\n\nOf the methods this model uses:\n\n```bibtex\n{bibtex}\n```"
        )
    return "\n\n".join(sections) + "\n"


def read_environment(path: Path) -> dict[str, Any]:
    """Return the run's record of its machine and model."""
    try:
        return read_record(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error})\n"
            "  fix: give the run's command once more, which writes it again"
        ) from error


def front_matter(recipe: Recipe) -> str:
    """Return the YAML metadata that the Hub indexes."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- lswt",
        "- pretraining",
    ]
    data = recipe.one("data")
    if data.name == "hf" and not Path(data.options["path"]).exists():
        lines += ["datasets:", f"- {data.options['path']}"]
    return "\n".join([*lines, "---"])


def summary(recipe: Recipe, environment: Mapping[str, Any]) -> str:
    """Return one paragraph on the architecture."""
    model = recipe.model
    memories = ", ".join(chosen.name for chosen in recipe.many("memory").values()) or "none"
    heads = f"{model.n_heads} heads"
    if model.n_kv_heads not in (None, model.n_heads):
        heads += f" that share {model.n_kv_heads} key/value heads"
    return (
        'A decoder of the LSWTransformer family ("Long-Short-Working Transformer") with'
        f" {environment['parameters']['total']:,} parameters: {model.n_layers} layers of width"
        f" {model.d_model}, {heads}, positional encoding:"
        f" {recipe.one('positional').name}, memories: {memories}, feed-forward:"
        f" {recipe.one('ffn').name}. Pretrained with lswt-core."
    )


def usage(address: str, code: bool, needs_code: bool) -> str:
    """Return how to load the model and generate with it."""
    cache = "The cache that `generate` uses is the model's own memory, bounded by its length."
    if code:
        imports, trust = "", ", trust_remote_code=True"
        replaces = (
            "With `lswt-core` installed, `import lswt_core.hf` replaces `trust_remote_code`. "
        )
        note = f"{'' if needs_code else replaces}{cache}"
    else:
        imports = (
            "import lswt_core.hf  # registers the model; pip install lswt-core and the packages"
            " listed below\n"
        )
        trust, note = "", cache
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{imports}
tokenizer = AutoTokenizer.from_pretrained({address!r}{trust})
model = AutoModelForCausalLM.from_pretrained({address!r}{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{note}"""


def training_table(
    recipe: Recipe, entries: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], step: int
) -> str:
    """Return data, hyperparameters and cost."""
    train, optimizer = recipe.train, recipe.one("optimizer")
    last: Mapping[str, Any] = next((entry for entry in reversed(entries) if "tokens" in entry), {})
    embeddings = recipe.embedding.warm_start
    if embeddings == "none":
        embeddings = "random at the start"
    device = f"{environment['device']}, {environment['processes']} process(es)"
    rows = [
        ("text", describe_source(recipe.one("data"))),
        ("tokenizer", recipe.one("tokenizer").name),
        ("updates", f"{step:,} of {train.total_steps:,}"),
        ("tokens seen", f"{last.get('tokens', step * train.tokens_per_step):,}"),
        ("batch", f"{train.batch_size} sequences of {train.seq_len} new tokens"),
        ("optimizer", f"{optimizer.name}, peak learning rate {optimizer.options['lr']:g}"),
        ("word embeddings", embeddings),
        ("precision", environment["precision"]),
        ("device", f"{device}, {environment['machine']['processor']}"),
    ]
    if "seconds" in last:
        rate = last["tokens"] / last["seconds"]
        rows.append(("time", f"{format_duration(last['seconds'])} ({rate:,.0f} tokens per second)"))
    return Table(("", ""), rows, text_columns=(0, 1)).markdown()


def describe_source(data: Chosen) -> str:
    """Return the name of a data source with its options."""
    options = [
        f"{key} = {value!r}"
        for key, value in flat(data.plain_options()).items()
        if value not in ("", None)
    ]
    return f"{data.name} ({', '.join(options)})" if options else data.name


def evaluation_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the metrics of the last evaluation."""
    last = next((entry for entry in reversed(entries) if entry.get("eval/loss") is not None), None)
    if last is None:
        return "The run was not evaluated."
    rows = [
        (label, format(last[name], style))
        for name, (label, style) in METRICS.items()
        if last.get(name) is not None
    ]
    table = Table(("metric", ""), rows, text_columns=(0, 1)).markdown()
    return f"On held-out text of the same source, after update {last['step']:,}:\n\n{table}"


def component_table(environment: Mapping[str, Any]) -> str:
    """Return each component with the package that provides it."""
    rows = [(f"`{name}`", package) for name, package in environment["components"].items()]
    return Table(("component", "package"), rows, text_columns=(0, 1)).markdown()


def collect_citations(components: Sequence[Chosen]) -> list[str]:
    """Return the BibTeX entries of these components, each once."""
    citations: dict[str, None] = {}
    for component in components:
        for entry in re.split(r"(?m)^(?=@)", component.offer.citation):
            if entry.strip():
                citations[entry.strip()] = None
    return list(citations)
