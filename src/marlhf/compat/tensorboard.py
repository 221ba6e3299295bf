"""Undocumented parts of TensorBoard: the message in an event file."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from marlhf.compat import needs


# private: tensorboard.compat.proto.event_pb2.Event (2.18 to 2.21)
# why: TensorBoard's readers give events, but not the bytes that they take in the file
# remove when: a SummaryWriter can drop the events after a step
@needs(
    "tensorboard.compat.proto.event_pb2:Event.FromString",
    "tensorboard.compat.proto.event_pb2:Event.STEP_FIELD_NUMBER",
)
def event_step(message: bytes) -> int | None:
    """Step of an event; None where the message cannot be decoded."""
    try:
        return Event.FromString(message).step
    except DecodeError:
        return None
