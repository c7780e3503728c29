"""Recall by distance: how often a model gives the answers of documents that ask for what they said
so many segments before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import ROWS, segments_of
from lswt_core.interfaces import IGNORE
from lswt_core.plugin_api.pytree import detach_state, tree_map

# The names of a task's documents begin with the number of segments between fact and question,
# perhaps behind the names of the mixtures' sources that they come from.
DISTANCE = re.compile(r"(?:^|/)distance (\d+)/")


class RecallPoint(NamedTuple):
    """The answers at one distance."""

    distance: int  # segments between a fact and its question
    accuracy: Mean  # share of scored tokens whose label is the most likely one


class Chance(NamedTuple):
    """What is possible by the frequencies of the answers alone, estimated without the bias of
    knowing those of the very answers that are scored.
    """

    accuracy: float  # of the answer that is the most frequent in the other half of the answers
    loss: float  # in nats: the entropy, with the correction of Miller and Madow (1955)
    answers: int  # different ones


def recall_by_distance(model: LoadedModel, text: Text) -> list[RecallPoint]:
    """Return the accuracy at every distance of a text of recall tasks. Raises UsageError for other
    texts.
    """
    return [
        RecallPoint(distance, measure_accuracy(model, text, np.array(own)))
        for distance, own in sorted(documents_by_distance(text).items())
    ]


def chance_level(text: Text) -> Chance:
    """Return the level of chance of a text of recall tasks. Raises UsageError for other texts."""
    documents = [number for own in documents_by_distance(text).values() for number in own]
    labels = np.concatenate([text.labels[number] for number in documents])
    answers = labels[labels != IGNORE]
    halves = answers[::2], answers[1::2]
    hits = sum(hits_of_most_frequent(*two) for two in (halves, halves[::-1]))
    _, counts = np.unique(answers, return_counts=True)
    shares = counts / len(answers)
    entropy = -(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * len(answers))
    return Chance(hits / len(answers), float(entropy), len(counts))


def hits_of_most_frequent(seen: np.ndarray, asked: np.ndarray) -> int:
    """Return how many of the answers ``asked`` are the most frequent of those that were seen."""
    if not len(seen):
        return 0
    values, counts = np.unique(seen, return_counts=True)
    return int((asked == values[counts.argmax()]).sum())


def documents_by_distance(text: Text) -> dict[int, list[int]]:
    """Return the documents of recall tasks by distance. Raises UsageError if there is none."""
    documents: defaultdict[int, list[int]] = defaultdict(list)
    for number, name in enumerate(text.names):
        found = DISTANCE.search(name)
        if found is not None:
            documents[int(found[1])].append(number)
    if not documents:
        raise UsageError(f"the documents of {text.name!r} are not of a recall task")
    return documents


@torch.no_grad()
def measure_accuracy(model: LoadedModel, text: Text, documents: np.ndarray) -> Mean:
    """Return the accuracy on some documents, read in segments as the model was trained."""
    longest_first = sorted(documents, key=lambda number: -len(text.documents[number]))
    hits, owners = [], []
    for begin in range(0, len(longest_first), ROWS):
        rows = np.array(longest_first[begin : begin + ROWS])
        state, device = None, next(model.decoder.parameters()).device
        for _, inputs, labels in segments_of(text, rows, model.seq_len):
            alive = len(inputs)
            state = tree_map(lambda tensor, alive=alive: tensor[:alive], state)  # type: ignore[misc]
            with model.precision.autocast(device):
                states, state = model.decoder(inputs.to(device), state)
                logits = model.decoder.vocabulary.logits(states)
            state = detach_state(state)
            scored = labels != IGNORE
            hits.append((logits.argmax(-1).cpu() == labels)[scored].double().numpy())
            owners.append(rows[:alive, None].repeat(model.seq_len, 1)[scored.numpy()])
    return mean_over_tokens(np.concatenate(hits), np.concatenate(owners))
