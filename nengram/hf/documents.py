"""Documents inside a text: n-grams begin anew at the separator, as they did where the model was trained.

Training text is a separator followed by a document, over and over, and no n-gram looks back across a separator. Whoever hands ids to a
model of transformers has no argument to say that with, but the ids say it themselves. So the rule goes to where rows are made from ids:
it then holds in a packed row, in a prompt of several documents, and across the chunks that a cache is filled by.
"""

from typing import Any

from nengram.address import Addresser, AddressSpec, StreamState


class Documents:
    """An `Addresser` for which every position of the separator is a start, by its compressed id."""

    def __init__(self, addresser: Addresser, separator_cid: int) -> None:
        self.addresser, self.separator_cid = addresser, separator_cid

    @property
    def spec(self) -> AddressSpec:
        """That of the addresser."""
        return self.addresser.spec

    def new_state(self, batch: int) -> StreamState:
        """That of the addresser."""
        return self.addresser.new_state(batch)

    def __call__(
        self, cids_BT: Any, *, start_BT: Any = None, blocked_BT: Any = None, state: Any = None
    ) -> dict[int, Any]:
        """As `Addresser`, with more starts."""
        starts_BT = cids_BT == self.separator_cid
        if start_BT is not None:
            starts_BT = starts_BT | start_BT
        if blocked_BT is not None:
            starts_BT = starts_BT & ~blocked_BT
        return self.addresser(cids_BT, start_BT=starts_BT, blocked_BT=blocked_BT, state=state)
