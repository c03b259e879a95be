"""What is known of the tensors that come past while the losses run: one record each, found by identity."""

import weakref
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Note = TypeVar("Note")


@dataclass(eq=False, slots=True, weakref_slot=True)
class Value(Generic[Note]):
    """What is known of one tensor: its `number`, in the order in which values go into ops and come out (0: not yet).

    And what the walker that met it `note`s of it. Where unseen ops are watched for, `version` is that of the tensor
    when it was last seen with a history.
    """

    reference: weakref.ref[Tensor]
    number: int = 0
    version: int = -1
    note: Note | None = None


class Values(Generic[Note]):
    """The records of tensors. It keeps none of these alive, and is not taken in where an id comes again."""

    def __init__(self) -> None:
        """Starts without any."""
        self.known: dict[int, Value[Note]] = {}

    def of(self, tensor: Tensor) -> Value[Note]:
        """The record of a tensor."""
        value = self.known.get(id(tensor))
        if value is None or value.reference() is not tensor:
            value = self.known[id(tensor)] = Value(weakref.ref(tensor))
        return value

    def rename(self, old: Tensor, new: Tensor) -> None:
        """Another tensor is known as this one is."""
        value, other = self.of(old), self.of(new)
        other.number, other.version = value.number, new._version
        if value.note is not None:
            self.note(new, value.note)

    def noted(self, tensor: Tensor) -> Note | None:
        """What is noted of a tensor, if anything is."""
        value = self.known.get(id(tensor))
        return value.note if value is not None and value.reference() is tensor else None

    def note(self, tensor: Tensor, note: Note) -> None:
        """Notes something of a tensor, until it dies."""
        value = self.of(tensor)
        value.note = note
        own = weakref.ref(value)  # no cycle, which would keep the note for long

        def forget(_: object) -> None:
            if (dead := own()) is not None:
                dead.note = None

        value.reference = weakref.ref(tensor, forget)
