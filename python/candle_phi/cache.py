"""What a model keeps of prompts: their keys and values."""
# Decisions: docs/design/python.md

from typing import Never

from . import options
from .messages import Prompt
from .progress import wait_for
from .prompts import Prompting
from .results import CacheInfo
from .signatures import hides_unknown


class Caching(Prompting):
    """The methods of a `Phi` that fill its prefix cache, and say what is in it."""

    @hides_unknown
    def warm(self, prompt: Prompt, *, pin: bool = False, **unknown: Never) -> None:
        """Computes the keys and values of a prompt and keeps them, for prompts that begin with it.

        >>> system = {"role": "system", "content": "You answer in one sentence."}
        >>> phi.warm([system], pin=True)
        >>> phi.generate([system, {"role": "user", "content": "What is icing?"}]).usage.cached_tokens
        11

        The call waits for a slot of `max_concurrent`.

        Args:
            prompt: a prompt as `stream` takes it: a str (one user turn), messages, or token ids.
            pin: evict them after all others, such as those of a system message that many calls begin with.

        Raises:
            ContextLengthError: the prompt does not fit the context.
            BusyError, ClosedError, ForkError: as in `stream`.
            TypeError, ValueError: an option or a message that is not valid.
            MemoryError: the KV cache does not fit the available memory.
        """
        checked = options.checked(options.WARM, {"pin": pin, **unknown})
        ids = self._prompt_ids(prompt, False, None, False)
        wait_for(self._model.warm(ids, pin=checked["pin"], scope=None), None)

    def cache_info(self) -> CacheInfo:
        """What is kept of prompts and chats now.

        Raises:
            ClosedError: the model is closed.
        """
        return CacheInfo(*self._model.cache_info())
