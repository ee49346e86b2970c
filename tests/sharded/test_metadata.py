"""`.metadata`: what older torch can read, what is used again from step to step, and what does not make a checkpoint."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from ckpt.commit.layout_exchange import LayoutExchange
from ckpt.errors import CorruptError
from ckpt.sharded.chunks import Box
from ckpt.sharded.contents import Description, Item, Key, encode
from ckpt.sharded.metadata import MetadataWriter

PROPERTIES = TensorProperties.create_from_tensor(torch.zeros(1))
DESCRIPTION = Description([Key("a.w", (4, 3), PROPERTIES), Key("n", None, None)], {"a.w": ("a", "w"), "n": ("n",)})
FILES = ["__0_0.distcp", "__1_0.distcp"]


def rows(first: int, count: int) -> Item:
    return Item(0, Box((first, 0), (count, 3), (0, 0)))


def layout(*items: Item, at: int = 0) -> str:
    return encode(items, [(at + 100 * number, 50) for number in range(len(items))])


GOOD = [layout(rows(0, 2)), layout(rows(2, 2), Item(1, None))]


def make(writer: MetadataWriter, layouts: list[str], step: int = 1) -> bytes:
    return writer.make(DESCRIPTION, FILES, layouts, Path(f"/steps/step-{step:012d}"))


def test_it_says_what_lies_where() -> None:
    found = pickle.loads(make(MetadataWriter(), GOOD))
    assert found.planner_data == {"a.w": ("a", "w"), "n": ("n",)}
    places = {index: (info.relative_path, info.offset, info.length) for index, info in found.storage_data.items()}
    assert places == {
        MetadataIndex("a.w", (0, 0)): ("__0_0.distcp", 0, 50),
        MetadataIndex("a.w", (2, 0)): ("__1_0.distcp", 0, 50),
        MetadataIndex("n"): ("__1_0.distcp", 100, 50),
    }
    assert str(found.storage_meta.checkpoint_id) == "/steps/step-000000000001"


def test_a_directory_of_any_name() -> None:
    directory = Path(os.fsdecode(b"/steps \xff/step-1"))
    for _ in range(2):
        found = pickle.loads(MetadataWriter().make(DESCRIPTION, FILES, GOOD, directory))
        assert found.storage_meta.checkpoint_id == str(directory)


def test_of_another_step_it_is_made_of_the_last_one() -> None:
    """And says what it would say if it were made anew."""
    writer = MetadataWriter()
    first = pickle.loads(make(writer, GOOD, 1))
    second = pickle.loads(make(writer, GOOD, 2))
    moved = pickle.loads(make(writer, [layout(rows(0, 2), at=7), GOOD[1]], 3))
    far = pickle.loads(writer.make(DESCRIPTION, FILES, GOOD, Path("/another place/step-000000000004")))
    ids = [found.storage_meta.checkpoint_id for found in (first, second, moved, far)]
    assert ids == [*(f"/steps/step-{step:012d}" for step in (1, 2, 3)), "/another place/step-000000000004"]
    assert len({found.storage_meta.save_id for found in (first, second, moved, far)}) == 4
    assert moved.storage_data[MetadataIndex("a.w", (0, 0))].offset == 7
    for found in (second, far):
        assert dataclasses.replace(found, storage_meta=first.storage_meta) == first


def numbers_of_fields(pickled: bytes) -> list[int]:
    """Of the states of tensor properties: how many there are in each."""
    found: list[int] = []

    class Noted(TensorProperties):
        def __setstate__(self, state: Any) -> None:
            found.append(len(state))

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return Noted if name == "TensorProperties" else super().find_class(module, name)

    Unpickler(io.BytesIO(pickled)).load()
    return found


@pytest.mark.parametrize(("compat", "fields"), [(None, 6), ("2.14", 5)])
def test_it_can_be_written_for_older_torch(compat: str | None, fields: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch that notes something more of a tensor, as 2.15 does."""
    state_of = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*state_of(self)[:5], "more"))
    made = make(MetadataWriter(compat), GOOD)
    assert numbers_of_fields(made) == [fields] and pickletools.optimize(made)


@pytest.mark.parametrize(
    ("layouts", "text"),
    [
        ([layout(rows(0, 2)), layout(rows(2, 1), Item(1, None))], "not written all of 'a.w'"),
        ([layout(rows(0, 2)), layout(rows(0, 2), Item(1, None))], "two ranks have written the same part of 'a.w'"),
        ([layout(rows(0, 2)), layout(rows(3, 2), Item(1, None))], "not written all of 'a.w', or parts that are not of it"),
        ([layout(rows(0, 2)), layout(rows(2, 2))], "not written all of 'n'"),
        ([layout(rows(0, 4), Item(1, None)), layout(Item(1, None))], "two ranks have written the same part of 'n'"),
        ([layout(rows(0, 4)), layout(Item(0, None))], "a value on one rank and a tensor on another"),
    ],
)
def test_parts_that_do_not_make_the_whole_are_refused(layouts: list[str], text: str) -> None:
    with pytest.raises(CorruptError, match=text):
        make(MetadataWriter(), layouts)


def test_what_several_ranks_have_nothing_of_is_noted_once() -> None:
    nothing = Item(0, Box((4, 0), (0, 3), (0, 0)))
    found = pickle.loads(make(MetadataWriter(), [layout(rows(0, 4), nothing, Item(1, None)), layout(nothing)]))
    assert [tuple(chunk.sizes) for chunk in found.state_dict_metadata["a.w"].chunks] == [(4, 3), (0, 3)]


# ---- how layouts come to rank 0 --------------------------------------------------------------------------------------


def test_a_layout_is_told_until_a_save_with_it_was_published() -> None:
    rank, lead = (LayoutExchange(MetadataWriter()) for _ in range(2))
    own, asked = lead.say("zero"), []

    def ask(question: Any) -> list[str]:
        asked.append(question["layouts"])
        return ["", rank.reply(question, 1)]

    assert rank.say("one").text == "one" and rank.say("one").text == "one"
    rank.note_published()
    short = rank.say("one")
    assert short.text == "" and len(short.digest) == 32
    assert lead.complete([own, short], ask) == ["zero", "one"] and asked == [[1]], "rank 0 has not heard of it before"
    assert lead.complete([own, short], ask) == ["zero", "one"] and asked == [[1]], "now it has"
    assert rank.say("two").text == "two"
    rank.note_published()
    failure = lead.complete([own, rank.say("two")], lambda _: ["", "something else"])
    assert getattr(failure, "ranks", None) == (1,), "what it is told must be what the rank has"
