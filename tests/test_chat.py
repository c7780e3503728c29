"""The data source ``chat``: what is predicted of a conversation, and what of a file is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from lswt_bytes import Bytes
from lswt_records import Chat

from lswt_core.data.scored import as_labels, encode_documents, end_labels, plain_ids
from lswt_core.errors import DataError
from lswt_core.interfaces import IGNORE, Document


def write(path: Path, *lines: object) -> Path:
    """A file with a JSON value a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def say(role: str, content: object) -> dict[str, object]:
    """A message."""
    return {"role": role, "content": content}


def chats(path: Path, *conversations: object, **options: Any) -> Chat:
    """A source of conversations in a new file."""
    return Chat(paths=[str(write(path, *({"messages": one} for one in conversations)))], **options)


def parts_of(document: Document) -> list[str]:
    """What is predicted of a document, "$" for its end."""
    assert document.scored is not None
    return [f"{document.text}$"[begin:end] for begin, end in document.scored]


ASKED = [
    say("user", "2 + 2?"),
    say("assistant", "4"),
    say("user", "é?"),
    say("assistant", "{role}"),
]


@pytest.mark.parametrize(
    ("conversation", "options", "text", "predicted"),
    [
        (
            ASKED,
            {},
            "<|user|>\n2 + 2?\n<|assistant|>\n4\n<|user|>\né?\n<|assistant|>\n{role}\n",
            ["4\n", "{role}\n$"],
        ),
        (ASKED[:3], {"form": "{content};"}, "2 + 2?;4;é?;", ["4;"]),
        (ASKED[:3], {"roles": ["user"]}, None, ["2 + 2?\n", "é?\n$"]),
        (ASKED[:2], {"form": "{role}: {content}</{role}>"}, None, ["4</assistant>$"]),
        ([say("assistant", "")], {"form": "{content}"}, "", ["$"]),
        ([say("user", "a"), say("assistant", ""), say("user", "")], {"form": "{content}"}, "a", []),
        ([], {}, "", []),
    ],
)
def test_turns_of_the_assistant_are_predicted(
    tmp_path: Path,
    conversation: list[object],
    options: dict[str, Any],
    text: str | None,
    predicted: list[str],
) -> None:
    source = chats(tmp_path / "x.jsonl", conversation, **options)
    [document] = source.documents("valid")
    assert parts_of(document) == predicted and source.selects_scored
    assert text is None or document.text == text


def test_labels_of_a_conversation_are_its_predicted_bytes(tmp_path: Path) -> None:
    [document] = chats(tmp_path / "x.jsonl", ASKED).documents("valid")
    tokenizer = Bytes()
    [stored] = encode_documents([document], tokenizer)
    labels = as_labels(stored)[1:]
    assert tokenizer.decode([int(one) for one in labels if one != IGNORE]) == "4\n{role}\n"
    assert tokenizer.decode(plain_ids(stored)[1:].tolist()) == document.text
    assert end_labels(stored[:1], tokenizer.eos_id).tolist() == [tokenizer.eos_id]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"messages": "hi"}, r"x\.jsonl:1: field 'messages' is \"hi\", not a list of messages"),
        ({"message": []}, r"x\.jsonl:1: no field 'messages' .*perhaps 'message'"),
        ({"messages": [say("user", "a"), "b"]}, r"x\.jsonl:1: message 2 is \"b\", not an object"),
        ({"messages": [say("user", None)]}, r"x\.jsonl:1: message 1 is .*null"),
    ],
)
def test_what_is_no_conversation_is_an_error_with_its_line(
    tmp_path: Path, line: object, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        list(Chat(paths=[str(write(tmp_path / "x.jsonl", line))]).documents("valid"))


def test_a_file_in_which_nobody_has_the_roles_is_an_error(tmp_path: Path) -> None:
    asked = [say("human", "a"), say("gpt", "b")]
    source = chats(tmp_path / "x.jsonl", asked, asked)
    with pytest.raises(DataError, match=r"x\.jsonl: .* of 'gpt', 'human', not of 'assistant'"):
        list(source.documents("train"))
    [one] = chats(tmp_path / "y.jsonl", asked, roles=["gpt", "tool"]).documents("valid")
    assert parts_of(one) == ["b\n$"]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"form": "{role}"}, "does not contain {content} once"), ({"roles": []}, "roles is empty")],
)
def test_wrong_forms_and_roles_are_errors(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Chat(paths=["x.jsonl"], **options)


def test_how_messages_are_written_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    forms = [{}, {"form": "{role}{content}"}, {"form": "{content}{role}"}, {"roles": ["user"]}]
    prints = {chats(tmp_path / "x.jsonl", ASKED, **options).fingerprint() for options in forms}
    assert len(prints) == len(forms)
