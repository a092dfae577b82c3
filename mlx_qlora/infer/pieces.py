"""New tokens become text piece by piece, in time that grows with their number alone."""

from mlx_qlora.data.tokenizer import Tokenizer

UNREADABLE = "\ufffd"  # what bytes that are no UTF-8 (yet) are decoded to


class Pieces:
    """Decodes token by token; the pieces join to the text of all tokens.

    Each time only a short window is decoded. It begins with a token behind which nothing depends
    on what came before: one that shows a character that is neither a space (SentencePiece drops
    spaces at a beginning) nor part of one that spans tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._bytes = _byte_tokens(tokenizer)
        self._window: list[int] = []
        self._told = 0  # characters of the window's text that were returned

    def add(self, token: int) -> str:
        """The text that became certain with this token; often one token late, or empty."""
        self._window.append(token)
        text = self._decode(self._window)
        # A character may go on in the next token; and of bytes in a row, `tokenizers` shows all
        # as unreadable if one of them is.
        if token in self._bytes or text.endswith(UNREADABLE):
            return ""
        piece, self._told = text[self._told :], len(text)
        alone = self._decode([token])
        if alone.strip() and UNREADABLE not in alone:
            self._window, self._told = [token], len(alone)
        return piece

    def end(self) -> str:
        """What was held back, once no token follows."""
        return self._decode(self._window)[self._told :] if self._window else ""


def _byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of SentencePiece's 256 tokens for single bytes, where the tokenizer has them."""
    ids = (tokenizer._codec.token_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)


class Answer:
    """Tokens in, text out, up to an end token or a stop text.

    Of several stop texts the one that is complete first counts. What may be the beginning of one
    is held back until more is known.

    Attributes:
        ids: the tokens so far, without one that ended the text.
        ended: whether no more tokens are wanted.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]) -> None:
        self.ids: list[int] = []
        self.ended = False
        self._ends = tokenizer.eos_ids
        self._stop: list[str] | None = stop  # None once one was found
        self._pieces, self._held = Pieces(tokenizer), ""

    def add(self, token: int) -> str:
        """The text that became certain with this token."""
        if token in self._ends:
            self.ended = True
            return ""
        self.ids.append(token)
        return self._up_to_stop(self._pieces.add(token), last=False)

    def end(self) -> str:
        """What was held back, once no token follows."""
        return self._up_to_stop(self._pieces.end(), last=True)

    def _up_to_stop(self, piece: str, last: bool) -> str:
        if self._stop is None:
            return ""
        text = self._held + piece
        found = [(at + len(each), at) for each in self._stop if (at := text.find(each)) >= 0]
        if found:
            self.ended, self._stop, self._held = True, None, ""
            return text[: min(found)[1]]
        held = 0 if last else max((_begun(text, each) for each in self._stop), default=0)
        sure = len(text) - held
        self._held = text[sure:]
        return text[:sure]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
