"""GPUs by name, with the figures that NVIDIA publishes, for times of machines that are not at hand.

Sources: the whitepapers of the GA102 and Ada architectures, the data sheets of A100 (SXM), H100 (SXM) and L40S.
Products are without sparsity, with sums in single precision. PCIe is what 16 lanes transfer in one direction.
"""

from dataclasses import dataclass

from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.memory.speed import Speed

_PCIE = {4: 31.5e9, 5: 63.0e9}


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        memory: bytes.
        bf16: operations of matrix products in bfloat16 in a second, in 10^12.
        pcie: its generation.
    """

    name: str
    memory: int
    bf16: float
    pcie: int = 4

    @property
    def speed(self) -> Speed:
        """What it does in a second at most; weights are read from the machine's memory."""
        return Speed(self.bf16 * 1e12, _PCIE[self.pcie])


#: In order of memory.
CARDS = {
    card.name: card
    for card in (
        Card("RTX 4080", 16 * 10**9, 97.5),
        Card("RTX 3090", 24 * 10**9, 71),
        Card("RTX 4090", 24 * 10**9, 165.2),
        Card("L40S", 48 * 10**9, 362),
        Card("A100", 80 * 10**9, 312),
        Card("H100", 80 * 10**9, 989.4, pcie=5),
    )
}


def find_card(name: str) -> Card:
    """Return the card of a name, however its letters and spaces are written.

    Raises:
        EmlocError: it is not known.
    """

    def plain(text: str) -> str:
        return text.replace(" ", "").replace("-", "").lower()

    card = next((card for card in CARDS.values() if plain(card.name) == plain(name)), None)
    if card is None:
        raise EmlocError(
            f"There is no card {name!r}.{did_you_mean(name, list(CARDS))}", f"Known are {', '.join(CARDS)}."
        )
    return card
