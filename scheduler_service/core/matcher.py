"""Which tokens may follow a text under a constraint, by llguidance."""

import json

import llguidance

from scheduler_service.core.grammar_jobs import Compile

MAX_MESSAGE_CHARS = 500
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,  # no limit holds for it
    verbose_errors=False,
)


class GrammarError(Exception):
    """A client's grammar is wrong, allows nothing, or is too complex."""


class Compiler:
    """Turns grammars into matchers over the tokens of one model."""

    def __init__(self, tokenizer_json: str, vocab_size: int) -> None:
        """Raises: ValueError for a tokenizer that is neither byte-level nor with byte fallback."""
        description = json.loads(tokenizer_json)
        vocab, added = description["model"]["vocab"], description["added_tokens"]
        num_tokens = 1 + max([len(vocab) - 1, *(token["id"] for token in added)])
        end = next((token["id"] for token in added if token["special"]), None)
        if end is None:
            raise ValueError("it has no special token")
        self.vocab_size = vocab_size
        self.end_token_id = end  # says that a text may end; which tokens end a request is the request's matter
        self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=max(num_tokens, vocab_size), eos_token=end)

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher of an empty text. Raises: GrammarError."""
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(_error_of(matcher))
        return matcher


class ConstrainedText:
    """The generated tokens of one request, and the mask for the next one. Masks are integers: bit i is token i."""

    def __init__(self, compiler: Compiler, matcher: llguidance.LLMatcher, job: Compile) -> None:
        """`matcher` has seen nothing and is this text's alone; the tokens of `job` are not consumed."""
        self._matcher = matcher
        self._vocabulary = (1 << compiler.vocab_size) - 1
        self._end = 1 << compiler.end_token_id
        self._num_tokens = 0
        self._min_tokens = job.min_tokens
        self._banned = _bits(job.banned_token_ids)
        self._endings = _bits(job.stop_token_ids) | _bits(job.end_token_ids)
        self._ends = _bits(job.stop_token_ids) & _bits(job.end_token_ids) & ~self._banned

    def consume(self, token: int) -> None:
        """Append a token. A token that the text could not have, or a grammar at its limits, shows in next_mask."""
        self._num_tokens += 1
        self._matcher.consume_token(token)

    def next_mask(self) -> int:
        """What may follow; 0 where the text is complete and no token of the model can say so.

        Banned tokens, and before min_tokens those that end the request, are left out as long as anything else is left.
        Raises: GrammarError.
        """
        mask = int.from_bytes(self._matcher.compute_bitmask(), "little")
        if self._matcher.is_error():
            raise GrammarError(_error_of(self._matcher))
        may_end = bool(mask & self._end) and self._matcher.is_accepting()  # a grammar may name that token, too
        text, ends = mask & self._vocabulary, 0
        if may_end:
            text, ends = text & ~self._end, self._ends
        if not text and not may_end:
            raise GrammarError("none of the model's tokens goes on as the constraint wants")
        unwanted = self._banned | (self._endings if self._num_tokens < self._min_tokens else 0)
        return (text | ends) & ~unwanted or (ends if may_end else text)


def _bits(token_ids: list[int]) -> int:
    if not token_ids:
        return 0
    flags = bytearray((max(token_ids) >> 3) + 1)
    for token in token_ids:
        flags[token >> 3] |= 1 << (token & 7)
    return int.from_bytes(flags, "little")


def _error_of(matcher: llguidance.LLMatcher) -> str:
    error = matcher.get_error().removesuffix("\n<non-verbose/>").rstrip()
    if error.startswith("NoExtensionBias"):
        return "no text satisfies the constraint"
    return error[:MAX_MESSAGE_CHARS]
