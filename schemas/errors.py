"""The one exception that users see."""

MAX_MESSAGE = 1000
# The allocator of CPUs; CUDA and Triton, which load kernels when they are first called; cuBLAS.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


class SpiffyError(ValueError):
    """Bad input: says in one line what was wrong, where, and what to do.

    The commands print its message and exit with code 2; nothing is half-written. Messages quote
    what others wrote (names, keys, paths), so control characters are escaped, for the line to stay
    one line and a terminal to stay as it is, and what is far too long is cut in the middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shortened(printable(message)))


class PolicyError(SpiffyError):
    """What a policy of the user's does wrong: other decodes would meet it too."""


def option(name: str) -> str:
    """An option as users of the commands and of Python know it, for messages that reach both."""
    return f"--{name.replace('_', '-')} ({name}= in Python)"


def printable(text: str) -> str:
    """The text with everything that is not printable, such as line ends, escaped as in Python."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def said(error: BaseException, most: int | None = None) -> str:
    """What an error of another library says, in one line, of at most so many characters."""
    return " ".join(str(error).split())[:most]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: torch says so by errors of several types, or by words alone."""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or any(words in str(error) for words in _OUT_OF_MEMORY)


def is_of_one_decode(error: BaseException) -> bool:
    """Whether a decode's error is no reason not to go on with others: bad input, NaN, or memory."""
    if isinstance(error, PolicyError):
        return False
    return isinstance(error, SpiffyError) or is_out_of_memory(error)


def _shortened(text: str) -> str:
    half = (MAX_MESSAGE - 5) // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} ... {text[-half:]}"
